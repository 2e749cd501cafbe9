"""The model of a checkpoint: the same bits, and a start for other runs."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from distrain_jax import data, train
from distrain_jax.models import weights
from distrain_jax.train import experiment, export

SCRIPT = Path(__file__).parents[2] / "launch" / "export.py"
METHODS = {
  "ddp": {},
  "zero1": {"method.param_dtype": "bfloat16"},
  "acco": {},
  "sdp": {"method.coverage": 0.5},
}


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
  """trained(method) -> (folder, the model after its last step)."""
  done = {}

  def run(method):
    if method not in done:
      folder = tmp_path_factory.mktemp(method) / "run"
      x = train.build(small(**{"method.name": method}, **METHODS[method]))
      x = x._replace(evaluate=lambda *_: {"loss": 0.0})  # is not the point
      state = train.train(x, folder).state
      done[method] = folder, jax.tree.map(np.asarray, x.run.params(state))
    return done[method]

  return run


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name, x in b.items():
    np.testing.assert_array_equal(a[name], x)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_has_the_bits_of_the_runs_model(method, trained, tmp_path):
  folder, params = trained(method)
  file = tmp_path / "new" / "x.safetensors"
  made = export.export(folder, file)
  assert made.step == 4
  found, wanted = load_file(file), weights.names(params)
  assert_same(found, wanted)
  assert all(found[name].dtype == x.dtype for name, x in wanted.items())
  assert weights.model_of(file) == {
    "name": "mlp",
    "activation": "relu",
    "classes": 10,
    "mup": False,
    "widths": [24],
  }


def started(c):
  """The model of a new run before its first step."""
  x = train.build(c)
  return x.run.params(x.run.init(x.key, x.params()))


@pytest.mark.parametrize(
  "changes",
  [
    {"method.coverage": 0.25},
    {"method.masking": "backward"},
    {"method.assignment": "shuffled", "method.shard_optimizer": True},
    {"mesh": ConfigDict({"data": 4, "tensor": 2})},
    {"method.name": "zero1"},
  ],
  ids=str,
)
def test_any_split_starts_from_the_same_model(
  changes, small, trained, tmp_path
):
  folder, params = trained("sdp")
  file = tmp_path / "x.safetensors"
  export.export(folder, file)
  method = {} if "method.name" in changes else {"method.name": "sdp"}
  c = small(initial_params=str(file), **method, **changes)
  assert_same(weights.names(started(c)), weights.names(params))


@pytest.fixture(scope="module")
def main():
  spec = importlib.util.spec_from_file_location("export", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main


REFUSED = {
  "coverage": ("sdp", {"method.coverage": 0.25}, "of another model or opt"),
  "table": (
    "sdp",
    {"method.assignment": "shuffled"},
    "made with assignment=cyclic, this run has assignment=shuffled, seed=0",
  ),
  "masking": ("sdp", {"method.masking": "backward"}, "of another model or opt"),
  "method": ("sdp", {"method.name": "ddp"}, "is of sdp, not of ddp"),
  "dtype": ("zero1", {}, "of another model or optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_gives_the_command_that_takes_the_model_along(
  name, small, trained, main, capsys
):
  method, changes, says = REFUSED[name]
  folder, params = trained(method)
  c = small(**{"method.name": method} | changes)
  with pytest.raises(ValueError, match=says) as error:
    train.train(train.build(c), folder)
  command = re.search(
    r"python launch/export\.py (\S+) (\S+) (--step=4), then "
    r"--config\.initial_params=(\S+) in another folder\.$",
    str(error.value),
  )
  assert command[2] == command[4]
  assert main([*command.groups()[:3], "--overwrite"]) == 0
  assert "mlp of step 4" in capsys.readouterr().out
  c.initial_params = command[4]
  assert_same(weights.names(started(c)), weights.names(params))


def test_workers_that_the_split_does_not_fit_are_refused_with_it_too(
  small, trained
):
  folder, _ = trained("sdp")
  thirds = {"method.coverage": 1 / 3, "evaluation.batch_size": 48}
  c = small(**{"method.name": "sdp"}, **thirds)
  info = data.describe(c.data).info
  three = experiment.program(c, info, jax.devices()[:3])
  like = jax.eval_shape(three.params)
  with (
    train.Checkpoints(folder / "checkpoints", reading=True) as checkpoints,
    pytest.raises(
      ValueError, match=r"(?s)is of 8 workers, not of 3, and sdp.*export\.py"
    ),
  ):
    checkpoints.restore(4, three.run, jax.random.key(0), like)


def test_a_save_of_a_run_that_goes_on_is_left_alone(trained, tmp_path):
  folder, _ = trained("ddp")
  partial = folder / "checkpoints" / "5.orbax-checkpoint-tmp"
  partial.mkdir()
  assert export.export(folder, tmp_path / "x.safetensors").step == 4
  assert partial.is_dir()
  partial.rmdir()


def test_what_is_missing_is_told(trained, main, tmp_path, capsys):
  folder, _ = trained("ddp")
  out = tmp_path / "x.safetensors"
  for command, says in (
    ([str(tmp_path / "none"), str(out)], "none/config.json: no such file"),
    ([str(folder), str(out), "--step=3"], "step 3; there are those of 4."),
    ([str(folder), str(folder / "config.json")], "Pass --overwrite"),
  ):
    assert main(command) == 2
    assert says in capsys.readouterr().err
  assert not out.exists()
