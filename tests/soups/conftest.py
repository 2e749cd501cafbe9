"""Tiny populations: trees of random numbers, networks, and runs."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from distrain_jax import data, train
from distrain_jax.method import Variables
from distrain_jax.models import zoo

TINY = Path(__file__).parents[1] / "train" / "tiny.py"


@pytest.fixture
def trees():
  """trees(n) -> n Variables with several dtypes and a counter."""

  def make(n, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)

    def one():
      return Variables(
        {
          "dense": {"kernel": draw(3, 4), "bias": draw(4)},
          "block": {
            "conv": {"kernel": draw(2, 2)},
            "norm": {"scale": jax.numpy.asarray(draw(2), "bfloat16")},
          },
        },
        {
          "batch_stats": {"block": {"norm": {"mean": draw(2)}}},
          "count": {"seen": np.int32(7)},
        },
      )

    return [one() for _ in range(n)]

  return make


@pytest.fixture(scope="session")
def tiny():
  """tiny(**{"method.name": "zero1"}) -> a config of few steps, so changed."""
  spec = importlib.util.spec_from_file_location("tiny", TINY)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def make(arg=None, **changes):
    c = module.get_config(arg)
    c.compilation_cache = ""  # it would stay on for other tests
    quiet = {"steps": 3, "evaluation.every": 0, "checkpoint.every": 0}
    with c.unlocked():
      c.update_from_flattened_dict({**quiet, **changes})
    return c

  return make


@pytest.fixture
def one_block(monkeypatch):
  """resnet18 has one block: it compiles sooner."""
  monkeypatch.setitem(zoo.FIXED["resnet18"], "stages", (1,))


class NoBatches:
  """An iterator that a checkpoint can hold."""

  def get_state(self):
    return {"taken": 0}

  def set_state(self, state):
    pass


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory):
  """saved(**changes) -> (folder, run, state): as if trained, on 2 devices.

  All floats of the state are random: workers differ where they can.
  """

  def make(**changes):
    folder, c = tmp_path_factory.mktemp("run") / "run", tiny(**changes)
    info = data.describe(c.data).info
    built = train.program(c, info, jax.devices()[:2])
    state = built.run.init(jax.random.key(0), built.params())
    rng = np.random.default_rng(0)

    def draw(x):
      if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        return x
      values = rng.normal(size=x.shape).astype(np.float32)
      return jax.device_put(jax.numpy.asarray(values, x.dtype), x.sharding)

    state = jax.tree.map(draw, state)
    folder.mkdir()
    (folder / "config.json").write_text(c.to_json_best_effort())
    with train.Checkpoints(folder / "checkpoints") as checkpoints:
      checkpoints.save(3, built.run, state, NoBatches(), None)
    return folder, built.run, state

  return make
