"""The loop, around a least-squares problem that knows no config file."""

import functools
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image

import distrain_jax as dj
from distrain_jax import train
from distrain_jax.train import loop

ROWS = 16


def loss_fn(params, batch, key):
  noise = jax.random.uniform(key, minval=0.9, maxval=1.1)
  error = batch["x"] @ params["w"] - batch["y"]
  return noise * jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


class Batches:
  """A plain iterator; `events` has what happens when batch i is taken."""

  def __init__(self, events=()):
    self.taken, self.events = 0, dict(events)

  def __next__(self):
    self.taken += 1
    happens = self.events.get(self.taken, lambda batch: batch)
    rng = np.random.default_rng(self.taken)
    x = rng.normal(size=(ROWS, 3)).astype(np.float32)
    return happens({"x": x, "y": x @ np.array([1.0, 2, 3], np.float32)})

  def get_state(self):
    return {"taken": self.taken}

  def set_state(self, state):
    self.taken = state["taken"]


def nan(batch):
  return batch | {"y": batch["y"] * np.nan}


def huge(batch):
  return batch | {"y": batch["y"] + 1e3}


def interrupt(batch):
  os.kill(os.getpid(), signal.SIGTERM)
  return batch


def evaluate(params, split):
  del split
  distance = params["w"] - jnp.array([1.0, 2, 3])
  return {"loss": float(jnp.sum(distance**2)), "accuracy": 0.5}


@pytest.fixture(scope="module")
def run_of(mesh):
  """run_of(action, spike) -> the guarded run on 4 workers, compiled once."""

  @functools.cache
  def make(action="count", spike=0.0):
    method = dj.ddp(loss_fn, optax.adam(0.05))
    return dj.distribute(dj.guard(method, action=action, spike=spike), mesh(4))

  return make


def configure(steps=8, **changes):
  c = train.default_config()
  c.steps, c.log.every, c.compilation_cache = steps, 1, ""
  c.evaluation.every = c.checkpoint.every = 0
  c.update_from_flattened_dict(changes)
  return c


@pytest.fixture
def experiment(run_of):
  """experiment(steps, events={}, evaluate=..., **config) -> Experiment."""

  def make(steps=8, events=(), evaluate=evaluate, **changes):
    c = configure(steps, **changes)
    action = "skip" if c.bad_step.action == "skip" else "count"
    return train.Experiment(
      config=c,
      run=run_of(action, c.bad_step.spike),
      key=jax.random.key(0),
      params=lambda: {"w": jnp.zeros(3)},
      batches=lambda: Batches(events),
      evaluate=evaluate,
    )

  return make


def host(tree):
  return jax.tree.map(np.array, tree)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, host(a), host(b))


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


def test_the_latest_and_the_best_are_kept(experiment, tmp_path):
  losses = iter([0.9, 0.2, 0.5, 0.7, 0.6, 0.0])  # the last: of the test split
  x = experiment(
    steps=10,
    evaluate=lambda *_: {"loss": next(losses)},
    **{"evaluation.every": 2, "checkpoint.every": 2, "checkpoint.keep": 1},
  )
  train.train(x, tmp_path)
  assert checkpoints(tmp_path) == ([4, 10], 4)


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
  def signalled(params, split):
    if split == "test":
      interrupt({})
    return evaluate(params, split)

  result = train.train(experiment(evaluate=signalled), tmp_path)
  assert "test_loss" in result.metrics
  assert checkpoints(tmp_path)[0] == [8]


def never(*args):
  raise AssertionError("a finished run has nothing to do")


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


def test_simulated_workers_train_and_resume_too(tmp_path):
  def x(events=()):
    return train.Experiment(
      config=configure(),
      run=dj.simulate(dj.ddp(loss_fn, optax.adam(0.05)), workers=4),
      key=jax.random.key(0),
      params=lambda: {"w": jnp.zeros(3)},
      batches=lambda: Batches(events),
      evaluate=evaluate,
    )

  with pytest.raises(train.Interrupted):
    train.train(x({4: interrupt}), tmp_path / "parts")
  got = train.train(x(), tmp_path / "parts")
  assert_same(got, train.train(x(), tmp_path / "whole"))


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
