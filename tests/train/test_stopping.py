"""Runs that stop, and go on: bad steps, signals, the end."""

import os
import signal

import jax
import numpy as np
import pytest

import distrain_jax as dj
from distrain_jax import train


def nan(batch):
  return batch | {"y": batch["y"] * np.nan}


def huge(batch):
  return batch | {"y": batch["y"] + 1e3}


def interrupt(batch):
  os.kill(os.getpid(), signal.SIGTERM)
  return batch


def host(tree):
  return jax.tree.map(np.array, tree)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


def logged(folder, name):
  return [x["step"] for x in train.read_metrics(folder) if name in x]


def checkpoints(folder):
  with train.Checkpoints(folder / "checkpoints") as c:
    return c.steps, c.best()


def never(*args):
  raise AssertionError("a finished run has nothing to do")


def test_nan_stops_a_run_and_it_goes_on_as_the_message_says(
  experiment, tmp_path
):
  often = {"checkpoint.every": 2, "checkpoint.keep": 9}
  with pytest.raises(train.BadStep) as e:
    train.train(experiment(events={5: nan}, **often), tmp_path)
  assert "Step 5: {'grad_norm': nan, 'loss': nan} is not finite" in str(e.value)
  assert "latest checkpoint, of step 4, is from before" in str(e.value)
  assert checkpoints(tmp_path)[0] == [2, 4]
  assert (tmp_path / "curves.png").exists()

  skip = {"bad_step.action": "skip"} | often
  result = train.train(experiment(events={5: nan}, **skip), tmp_path)
  assert int(result.state.bad) == 1
  assert np.isfinite(result.state.inner.params["w"]).all()
  bad = [x["bad_steps"] for x in train.read_metrics(tmp_path) if "mae" in x]
  assert bad == [0] * 4 + [1] * 4

  # Told to stop again, it forgives what it has skipped.
  result = train.train(experiment(steps=10, **often), tmp_path)
  assert int(result.state.inner.step) == 9


def test_nan_at_the_beginning_says_that_nothing_is_saved(experiment, tmp_path):
  with pytest.raises(train.BadStep, match=r"Step 1: .*no checkpoint yet\."):
    train.train(experiment(events={1: nan}), tmp_path)


def test_a_spike_stops_a_run(experiment, tmp_path):
  x = experiment(steps=40, events={30: huge}, **{"bad_step.spike": 4.0})
  with pytest.raises(train.BadStep, match=r"Step 30: .*far above its running"):
    train.train(x, tmp_path)


def test_an_evaluation_that_is_not_finite_stops_before_it_is_saved(
  experiment, tmp_path
):
  """The loss and gradient of step n are of the parameters before it."""
  losses = iter([1.0, float("nan")])
  x = experiment(
    evaluate=lambda *_: {"loss": next(losses)},
    **{"evaluation.every": 2, "checkpoint.every": 2},
  )
  with pytest.raises(train.BadStep, match=r"Step 4: {'validation_loss': nan}"):
    train.train(x, tmp_path)
  assert checkpoints(tmp_path)[0] == [2]


def test_an_interrupted_run_goes_on_to_the_same_bits(experiment, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  want = train.train(experiment(), whole)
  x = experiment(events={3: interrupt})
  with pytest.raises(train.Interrupted) as e:
    train.train(x, parts)
  assert e.value.step == 3
  assert "stopped after step 3" in str(e.value)
  got = train.train(x, parts)
  assert_same(got, want)
  name = "metrics.jsonl"
  assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_during_the_last_evaluation_undoes_nothing(
  experiment, tmp_path
):
  x = experiment()

  def signalled(params, split):
    if split == "test":
      interrupt({})
    return x.evaluate(params, split)

  result = train.train(x._replace(evaluate=signalled), tmp_path)
  assert "test_loss" in result.metrics
  assert checkpoints(tmp_path)[0] == [8]


def test_a_finished_run_gives_its_result_again_at_once(experiment, tmp_path):
  x = experiment()
  first = train.train(x, tmp_path)
  lines = (tmp_path / "metrics.jsonl").read_bytes()
  again = train.train(
    x._replace(evaluate=never, run=x.run._replace(step=never)), tmp_path
  )
  assert again.metrics == first.metrics
  assert_same(again.state, first.state)
  assert (tmp_path / "metrics.jsonl").read_bytes() == lines


def test_a_finished_run_can_be_made_longer_but_not_shorter(
  experiment, tmp_path
):
  train.train(experiment(steps=4), tmp_path)
  result = train.train(experiment(steps=6), tmp_path)
  assert int(result.state.inner.step) == 6
  assert logged(tmp_path, "loss") == list(range(1, 7))
  with pytest.raises(ValueError) as e:
    train.train(experiment(steps=5), tmp_path)
  assert str(e.value).startswith("config.steps=5, but ")
  assert "holds a run of 6 steps" in str(e.value)


def test_simulated_workers_train_and_resume_too(experiment, tmp_path):
  run = dj.simulate(experiment().run.method, workers=4)
  x = experiment(events={4: interrupt})._replace(run=run)
  with pytest.raises(train.Interrupted):
    train.train(x, tmp_path / "parts")
  got = train.train(x, tmp_path / "parts")
  assert_same(
    got, train.train(experiment()._replace(run=run), tmp_path / "whole")
  )
