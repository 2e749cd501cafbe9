"""The coordinate check and the transfer of learning rates, as started."""

import json
import math
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CHECK = str(ROOT / "launch" / "coord_check.py")
TRANSFER = str(ROOT / "launch" / "mup_transfer.py")
SMALL = ["--widths=4,8", "--steps=2", "--seeds=1"]
ADAM = ["--optimizer=mup_adamw", "--optimizer=adamw"]
COMMANDS = {
  "check": [CHECK, "--model=mlp", "--out=in/check", *SMALL, *ADAM],
  "transfer": [TRANSFER, "--task=mlp", "--data=digits", "--out=t", *SMALL],
  "no model": [CHECK, "--model=mpl"],
  "no task": [TRANSFER, "--task=llema"],
}
IMPORTS = """
import jax, optax
from distrain_jax import data, learned, models
from distrain_jax.learned import meta
import matplotlib.figure
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def ran(run_launchers, folder):
  return run_launchers(COMMANDS, folder, IMPORTS)


def read(folder, name):
  png = (folder / f"{name}.png").read_bytes()
  assert png[:4] == b"\x89PNG"
  return json.loads((folder / f"{name}.json").read_text())["results"]


def test_the_check_names_the_layer_farthest_from_1(ran, folder):
  code, out, err = ran("check")
  assert code == 0, err
  results = read(folder, "in/check")
  titles = ["μP, mup_adamw", "SP, adamw"]
  assert list(results) == [f"mlp: {title}" for title in titles]
  lines = out.splitlines()[2:]
  for title, line, found in zip(titles, lines, results.values(), strict=True):
    growth = {k: x[1] / x[0] for k, x in found["moved"].items()}
    assert growth.keys() == {
      "dense_0",
      "dense_1",
      "dense_2",
      "output",
      "whole",
    }
    assert found["growth"] == pytest.approx(growth)
    far = max(growth, key=lambda k: max(growth[k], 1 / growth[k]))
    wanted = f"| mlp | {title} | 4 to 8 | {far} | {growth[far]:.2f} |"
    assert line == wanted


def test_the_transfer_finds_the_best_rates_and_their_drift(ran, folder):
  code, out, err = ran("transfer")
  assert code == 0, err
  (of_mlp,) = read(folder, "t").values()
  assert of_mlp.keys() == {"SP, adamw", "μP, mup_adamw"}
  for setting, found in of_mlp.items():
    best = []
    for width, runs in found["losses"].items():
      assert len(runs) == len(found["powers"]) > 5
      means = [sum(x) / len(x) for x in runs]
      assert all(map(math.isfinite, means))
      best.append(found["powers"][means.index(min(means))])
      assert f"mlp, {setting}, {width}: 2^{best[-1]}, {min(means):.3f}" in out
    assert list(found["best"].values()) == best
    assert found["drift"] == max(best) - min(best)
    assert f"mlp, {setting}: the best rate moves by 2^{found['drift']}\n" in out
    at = found["powers"].index(best[0])
    assert found["transferred"] == found["mean"]["8"][at]
    told = (
      f"mlp, {setting}, 8: {found['transferred']:.3f} at the best rate of 4"
    )
    assert told in out


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("no model", "--model=mpl: one of mlp, resnet, llama."),
    ("no task", "--task=llema: one of mlp, llama."),
  ],
)
def test_unknown_names_are_refused(ran, name, says):
  code, out, err = ran(name)
  assert code != 0
  assert says in out + err
