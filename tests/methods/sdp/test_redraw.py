"""Masks that are drawn anew: what is held moves, and nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax.methods.sdp import structure, tables, worker

pytestmark = pytest.mark.core

LEVELS = ("neuron", "block", "both")


def masks(level, assignment, draw):
  """(N, L, M) from the tables, by loops."""
  found = tables.hold(
    STRUCTURE[level],
    toys.N,
    level=level,
    coverage=toys.LEVELS[level],
    assignment=assignment,
    seed=0,
    draw=draw,
  )
  holding = next(h for h in found.values() if h.size[1] > 1 or level == "block")
  layers, groups = holding.size
  held = holding.held.reshape(toys.N, layers, groups)
  on = np.repeat(held, toys.M // groups, axis=2)
  return np.repeat(on, toys.L // layers, axis=1).astype(float)


def structure_of(level):
  shapes = toys.shapes_of(toys.float32(toys.start()))
  layered = level != "neuron"
  return structure.read(toys.NAMES, shapes, level, layered=layered)


STRUCTURE = {level: structure_of(level) for level in LEVELS}


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("assignment", ["shuffled", "rolling"])
@pytest.mark.parametrize("level", ["block", "both"])
def test_steps_equal_plain_loops_with_the_masks_of_each_draw(
  level, assignment, shard
):
  case = toys.trained(
    level, "forward", shard, assignment=assignment, redraw_every=2
  )
  oracle = toys.Oracle(level, "forward", masks(level, assignment, 0))
  seen, used = [], set()
  for i in range(toys.STEPS):
    oracle.on = masks(level, assignment, i // 2)
    oracle.trains = toys.whole_masks(level, oracle.on)
    used.add(oracle.on.tobytes())
    seen.append(oracle.step(toys.batch(i)))
  assert len(used) > 1
  np.testing.assert_allclose(case.seen, seen, rtol=2e-5)
  toys.near(case.params, oracle.p)


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("shard", [False, True])
def test_without_learning_every_number_stays_in_its_place(shard, masking, mesh):
  method = toys.make(
    "neuron",
    tx=optax.sgd(0.0, momentum=0.9),
    masking=masking,
    shard_optimizer=shard,
    assignment="rolling",
    redraw_every=1,
    param_dtype="float32",
  )
  numbers = toys.float32(toys.numbered(toys.start()))
  run = dj.distribute(method, mesh(toys.N))
  state = run.init(toys.KEY, numbers)
  first = toys.numpy(state.params)
  for i in range(toys.N):  # once round the ring
    state, _ = run.step(state, toys.float32(toys.batch(i)), toys.KEY)
    jax.tree.map(np.testing.assert_array_equal, run.params(state), numbers)
    if masking == "forward" and i < toys.N - 1:
      held = np.asarray(state.params.held["a"])
      assert not np.array_equal(held, first.held["a"])
  jax.tree.map(np.testing.assert_array_equal, state.params, first)
  assert run.step.compilations() == 1


def test_a_restored_run_goes_on_in_its_draw_and_on_fewer_workers():
  method = toys.make(
    "block", assignment="shuffled", redraw_every=1, clip_norm=1.0
  )
  run = dj.simulate(method, workers=toys.N)
  state = run.init(toys.KEY, toys.float32(toys.start()))
  for i in range(2):
    state, _ = run.step(state, toys.float32(toys.batch(i)), toys.KEY)
  saved, model = toys.numpy(state), toys.numpy(run.params(state))
  few = dj.simulate(method, workers=2)
  there = few.adopt(saved)
  jax.tree.map(np.testing.assert_array_equal, few.params(there), model)
  back = run.adopt(toys.numpy(there))
  jax.tree.map(np.testing.assert_array_equal, back, saved)


def residual(params, model_state, rows, key):
  """Two blocks that differ in shape, each with a running mean."""
  del key
  h, seen = rows["x"], {}
  for name in ("narrow", "wide"):
    if name in params:
      y = jnp.tanh(h @ params[name]["a"])
      mean = model_state["stats"][name]["mean"]
      seen[name] = {"mean": 0.5 * mean + 0.5 * y.mean(0)}
      h = h + y @ params[name]["c"]
  error = h @ params["v"] - rows["y"]
  return (error**2).mean(), ({}, {"stats": seen})


def blocks_and_statistics():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {
    "narrow": {"a": draw(toys.E, 3), "c": draw(3, toys.E)},
    "wide": {"a": draw(toys.E, 7), "c": draw(7, toys.E)},
    "v": draw(toys.E),
  }
  means = {"narrow": {"mean": draw(3)}, "wide": {"mean": draw(7)}}
  return dj.Variables(params, {"stats": means})


@pytest.mark.parametrize("assignment", ["shuffled", "rolling"])
def test_whole_blocks_move_with_their_statistics(assignment, monkeypatch):
  monkeypatch.setattr(worker, "DRAWS", 3)
  model = blocks_and_statistics()
  method = dj.sdp(
    dj.stateful(residual),
    optax.sgd(0.0),
    names=jax.tree.map(lambda x: (None,) * x.ndim, model),
    shapes=model,
    level="block",
    blocks=("narrow", "wide"),
    assignment=assignment,
    redraw_every=1,
  )
  run = dj.simulate(method, workers=toys.N)
  state = run.init(toys.KEY, model)
  seen = set()
  for _ in range(4):
    rows = toys.float32(toys.same_for_all(0))
    seen.add(np.asarray(state.params.whole["float32"]).tobytes())
    state, _ = run.step(state, rows, toys.KEY)
    now = run.params(state)
    jax.tree.map(np.testing.assert_array_equal, now.params, model.params)
  assert len(seen) > 1
  # All rows are alike: the first block's mean is that of any holder's.
  y = np.tanh(rows["x"] @ model.params["narrow"]["a"]).mean(0)
  start = model.model_state["stats"]["narrow"]["mean"]
  got = now.model_state["stats"]["narrow"]["mean"]
  np.testing.assert_allclose(got, y + (start - y) / 2**4, rtol=1e-5)
