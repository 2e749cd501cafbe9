"""launch/petra_gradients.py as a user meets it: tables, files, refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALL = [
  "--config=configs/petra/digits.py",
  "--devices=4",
  "--config.batch_size=8",
  "--config.model.blocks=2",
  "--config.model.width=4",
  "--config.model.hidden=4",
  "--config.compilation_cache=",
]
COMMANDS = {
  "two": [
    *SMALL,
    "--steps=15",
    "--accumulate=1,2",
    "--probes=2",
    "--depths=1,4",
  ],
  "method": ["--config=configs/digits.py"],
  "buffer": [*SMALL, "--config.method.buffer=input"],
  "devices": [*SMALL, "--devices=5"],
  "steps": [*SMALL, "--steps=8"],
  "rates": [*SMALL, "--learning_rates=0.1,0.2"],
  "depths": [*SMALL, "--depths=0"],
  "argument": [*SMALL, "report"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("petra_gradients")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "petra_gradients.py")
  commands = {}
  for name, arguments in COMMANDS.items():
    given = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
    commands[name] = [script, *given, f"--out={folder / name}"]
  imports = "import distrain_jax.train, distrain_jax.pipelining.quality\n"
  imports += "import sklearn.datasets, matplotlib.figure"
  return run_launchers(commands, folder, imports)


@pytest.fixture(scope="module")
def kept(ran, folder):
  code, _, err = ran("two")
  assert code == 0, err
  return json.loads((folder / "two" / "petra_gradients.json").read_text())


def test_numbers_are_kept_by_stage_and_by_block(kept):
  assert kept["stages"] == ["stem", "block_0", "block_1", "head"]
  assert kept["command"].startswith("python launch/petra_gradients.py --config")
  rates = {k: x["learning_rate"] for k, x in kept["accumulate"].items()}
  assert rates == {"1": 0.025, "2": 0.05}  # the config's is for k = 2
  for x in kept["accumulate"].values():
    assert x["probes"] == 2
    assert list(x["reconstruction"]) == ["block_0", "block_1"]
    for kind in ("", "delayed_"):
      cosine = x[f"{kind}cosine"]
      assert cosine["count"] == [2] * 4
      assert all(-1 <= c <= 1.000001 for c in cosine["mean"])
      assert all(r > 0 for r in x[f"{kind}norm_ratio"]["mean"])
  assert kept["accumulate"]["1"] != kept["accumulate"]["2"]


def test_precisions_are_in_order(kept):
  found = kept["rounding"]
  assert found["depths"] == [1, 4]
  assert found["float32, grid 2^-12"] == [0, 0]
  assert 0 < found["float32"][1] < 1e-6 < 1e-4 < found["streams in bfloat16"][0]


def test_the_tables_are_of_what_is_kept(ran, kept):
  _, out, err = ran("two")
  assert "k = 2: tick 14/15: loss" in err
  x = kept["accumulate"]["2"]
  cosine, ratio = x["cosine"]["mean"][0], x["norm_ratio"]["mean"][0]
  assert f"{cosine:.3f} ({ratio:.2f})" in out
  assert "| 3: head |" in out and "| block_1 |" in out
  error = x["reconstruction"]["block_0"]["mean"]
  assert f"{error:.2e}" in out


@pytest.mark.parametrize("name", ["petra_gradients", "petra_rounding"])
def test_the_pictures_are_there(kept, folder, name):
  with Image.open(folder / "two" / f"{name}.png") as image:
    image.load()
    assert image.format == "PNG" and min(image.size) > 600


MESSAGES = {
  "method": "only petra's gradients are measured. Take a file of configs/petra/",
  "buffer": "only buffer='none' without wire_dtype is measured",
  "devices": "4 blocks cannot be cut into 5 stages",
  "steps": "Take at least --steps=",
  "rates": "one for each of the 3 of --accumulate; got 2",
  "depths": "--depths: numbers above 0, with commas; got '0'",
  "argument": "unknown arguments: ['report']",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_one_line(name, ran, folder):
  code, out, err = ran(name)
  assert code != 0
  assert MESSAGES[name] in out + err
  assert "Traceback" not in out + err
  assert not (folder / name).exists()
