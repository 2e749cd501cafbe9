"""launch/reproduce.py as a user meets it: trains, goes on, writes, refuses."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import petra_networks
import pytest
from PIL import Image

from distrain_jax import methods
from distrain_jax.train.config import takes

ROOT = Path(__file__).parents[2]
TABLES = sorted(p.stem for p in (ROOT / "launch/reproductions").glob("*.py"))
QUICK = ["acco", "--seeds=1", "--row=acco", "--out=results"]
COMMANDS = {
  "good": [*QUICK, "--steps=2"],
  "again": [*QUICK, "--steps=2"],
  "other steps": [*QUICK, "--steps=3"],
  "nothing": [],
  "method": ["aco"],
  "row": ["acco", "--row=zero"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="module")
def ran(folder, run_launchers):
  """ran(name) -> (exit code, output, errors) of that command."""
  script = str(ROOT / "launch" / "reproduce.py")
  commands = {
    name: [script, *arguments, "--workdir=runs"]
    for name, arguments in COMMANDS.items()
  }
  imports = "import distrain_jax.train, matplotlib.figure"
  return run_launchers(commands, folder, imports)


def test_the_table_has_the_baseline_and_what_was_asked(ran, folder):
  code, out, err = ran("good")
  assert code == 0, err
  found = json.loads((folder / "results/acco.json").read_text())
  assert list(found["rows"]) == ["ddp", "acco"]
  assert found["steps"] == 2 and found["seeds"] == 1
  assert "reproduce.py acco --seeds=1" in found["command"]
  for row, x in found["rows"].items():
    metrics = folder / f"runs/acco/{row}/seed_0/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    (test,) = (line["test_loss"] for line in lines if "test_loss" in line)
    assert x["test_loss"] == [test]
    assert f"| {row} | {x['validation_loss'][0]:.4f} |" in out
  losses = [x["validation_loss"][0] for x in found["rows"].values()]
  above = found["rows"]["acco"]["percent_above"]
  assert found["rows"]["acco"]["against"] == "ddp"
  assert above == [pytest.approx(100 * (losses[1] / losses[0] - 1))]
  with Image.open(folder / "results/acco.png") as image:
    image.load()
    assert min(image.size) > 600


def test_what_has_finished_is_not_trained_again(ran):
  _, first, trained = ran("good")
  code, second, err = ran("again")
  assert code == 0, err
  assert "step 2/2" in trained and "step 2/2" not in err
  assert second == first


MESSAGES = {
  "other steps": "holds a run with another steps. Choose another --workdir",
  "nothing": "got no method. It is one of acco",
  "method": "got aco. Did you mean 'acco'?",
  "row": "--row=zero: Did you mean 'zero1'?",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_mistake_is_one_line(name, ran):
  code, out, err = ran(name)
  assert code != 0
  assert MESSAGES[name] in err
  assert "Traceback" not in out + err


@pytest.mark.parametrize("name", TABLES)
def test_a_row_differs_from_its_baseline_by_method_or_by_config(
  name, monkeypatch
):
  monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
  table = importlib.import_module(f"launch.reproductions.{name}")
  if callable(table.CLAIM):
    assert table.CLAIM({}).endswith(": not measured.")
    assert table.SCORES
  else:
    assert table.CLAIM[0] in table.ROWS
  configs = {row: table.config(row).to_dict() for row in table.ROWS}
  parts = {row: c.pop("method") for row, c in configs.items()}
  for c in configs.values():  # what a table says follows from the method
    for field in getattr(table, "FOLLOWS", ()):
      part, _, last = field.rpartition(".")
      (c[part] if part else c).pop(last)
  for row, c in configs.items():
    baseline = table.against(row)
    assert c == configs[baseline] or parts[row] == parts[baseline]
  for row, part in parts.items():
    chosen = {k: v for k, v in part.items() if v is not None}
    assert chosen.items() >= table.ROWS[row].items()
    factory = methods.FACTORIES[chosen.pop("name")]
    if takes(factory, "names"):
      w = jax.ShapeDtypeStruct((8, 16), jnp.float32)
      chosen |= {"shapes": {"w": w}, "names": {"w": ("layers", "mlp")}}
      chosen |= {"writers": {"w": True}}
    if takes(factory, "relative_rate"):
      chosen |= {"relative_rate": lambda step: 1.0}
    trained = lambda *_: None
    if part["name"] in methods.PIPELINED:
      trained, params, _ = petra_networks.make("r")
      chosen |= {"shapes": params, "example": petra_networks.batches(1)}
    factory(trained, optax.sgd(0.1), **chosen)


def test_acco_has_the_micro_batches_of_its_baselines(monkeypatch):
  monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
  table = importlib.import_module("launch.reproductions.acco")
  halves = lambda row: methods.HALVES.get(row["name"], 1)
  assert {halves(x) * x["accumulate"] for x in table.ROWS.values()} == {2}


def test_a_run_from_before_an_option_was_there_is_this_one(
  monkeypatch, tmp_path
):
  monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
  reproduce = importlib.import_module("launch.reproduce")
  table = importlib.import_module("launch.reproductions.acco")
  c = table.config("acco")

  def kept(**changes):
    old = json.loads(c.to_json_best_effort())
    del old["optimizer"]["nesterov"], old["method"]["rate"]
    old["method"]["gone"] = None
    old["optimizer"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(old))
    reproduce.check_same(c, tmp_path)

  kept()
  for changes in ({"b1": 0.5}, {"unknown": 1}):
    with pytest.raises(ValueError, match="with another optimizer"):
      kept(**changes)
  c.optimizer.nesterov = True
  with pytest.raises(ValueError, match="with another optimizer"):
    kept()
