"""The loop: what it writes, reads and keeps, and when."""

import functools
import json
import sys

import jax
import pytest
from matplotlib import image

from distrain_jax import train
from distrain_jax.train import loop


def never(*args):
  raise AssertionError("a finished run has nothing to do")


def logged(folder, name):
  return [x["step"] for x in train.read_metrics(folder) if name in x]


def checkpoints(folder):
  with train.Checkpoints(folder / "checkpoints") as c:
    return c.steps, c.best()


def test_a_run_by_hand_has_the_whole_folder(experiment, tmp_path):
  x = experiment(steps=8, **{"evaluation.every": 3, "checkpoint.every": 4})
  result = train.train(x, tmp_path)
  assert logged(tmp_path, "loss") == list(range(1, 9))
  assert logged(tmp_path, "validation_loss") == [3, 6, 8]
  assert logged(tmp_path, "test_loss") == [8]
  assert checkpoints(tmp_path)[0] == [4, 8]
  assert json.loads((tmp_path / "config.json").read_text())["steps"] == 8
  assert image.imread(tmp_path / "curves.png").std() > 0.01
  assert result.metrics["test_loss"] < 14.0  # where it started
  assert int(result.state.inner.step) == 8


def test_lines_are_written_every_so_often_and_at_the_last_step(
  experiment, tmp_path
):
  train.train(experiment(steps=8, **{"log.every": 3}), tmp_path)
  assert logged(tmp_path, "loss") == [3, 6, 8]


class Number:
  """A metric on its way from the devices: to read it is to wait for it."""

  def __init__(self, read):
    self._read = read

  def __float__(self):
    self._read()
    return 1.0


def test_metrics_of_a_step_are_read_while_the_next_one_runs(
  experiment, tmp_path
):
  events = []

  def step(state, batch, key):
    n = len([e for e in events if e.startswith("step")]) + 1
    events.append(f"step {n}")
    read = functools.partial(events.append, f"read {n}")
    return state, {"loss": Number(read)}

  def evaluate(params, split):
    events.append(split)
    return {"loss": 1.0}

  x = experiment(steps=6, evaluate=evaluate, **{"evaluation.every": 4})
  train.train(x._replace(run=x.run._replace(step=step)), tmp_path)
  assert " ".join(events).replace("step ", "s").replace("read ", "r") == (
    "s1 s2 r1 s3 r2 s4 r3 r4 validation s5 s6 r5 r6 validation test"
  )


def test_the_latest_and_the_best_are_kept(experiment, tmp_path):
  losses = iter([0.9, 0.2, 0.5, 0.7, 0.6, 0.0])  # the last: of the test split
  x = experiment(
    steps=10,
    evaluate=lambda *_: {"loss": next(losses)},
    **{"evaluation.every": 2, "checkpoint.every": 2, "checkpoint.keep": 1},
  )
  train.train(x, tmp_path)
  assert checkpoints(tmp_path) == ([4, 10], 4)


def test_a_missing_package_is_found_before_anything_is_made(
  experiment, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "wandb", None)
  x = experiment(**{"log.wandb": "project"})
  with pytest.raises(ImportError, match="pip install"):
    train.train(x._replace(params=never), tmp_path)


def traces(folder):
  return list((folder / "profile").rglob("*.xplane.pb"))


def test_the_profilers_window_is_written_where_it_ends_or_the_run_does(
  experiment, tmp_path, capsys
):
  window = {"profile.start": 3, "profile.steps": 2}
  inside, beyond = tmp_path / "inside", tmp_path / "beyond"
  train.train(experiment(steps=6, **window), inside)
  assert len(traces(inside)) == 1
  assert f"profile in {inside / 'profile'}" in capsys.readouterr().err
  train.train(experiment(steps=3, **window), beyond)
  assert len(traces(beyond)) == 1
  # A run that goes on from inside the window has none to end.
  train.train(experiment(steps=6, **window), beyond)
  assert len(traces(beyond)) == 1


def test_xlas_programs_are_kept_where_the_config_says(tmp_path, monkeypatch):
  updates = {}
  monkeypatch.setattr(jax.config, "update", updates.__setitem__)
  loop.use_compilation_cache("")
  assert not updates
  loop.use_compilation_cache(str(tmp_path))
  assert updates["jax_compilation_cache_dir"] == str(tmp_path)
  assert updates["jax_persistent_cache_min_compile_time_secs"] == 0.0
