"""What the workers hold: equal copies, of everything, of equal size."""

import functools

import jax
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj

pytestmark = pytest.mark.core

N, KEY = toys.N, toys.KEY
HOLDERS = {"neuron": 2, "block": 2, "both": 1}
by_case = pytest.mark.parametrize(
  ("level", "masking", "shard"), [case[:3] for case in toys.CASES]
)
by_level = pytest.mark.parametrize("level", HOLDERS)
forward = pytest.mark.parametrize("shard", [False, True])


def copies(ids, values):
  """{element: [(worker, value), ...]} of stacked arrays of one shape."""
  found = {}
  for w in range(N):
    for i, x in zip(ids[w].ravel(), values[w].ravel()):
      found.setdefault(float(i), []).append((w, x))
  return found


def held(tree):
  return {k: x for k, x in tree.items() if x is not None}


@by_level
def test_every_element_has_its_holders_and_what_is_shared_all(level):
  numbers, mine = toys.numbered(toys.start()), toys.ids(level)
  shared = toys.case(level, "forward", False).begun.params.shared
  for k, every in numbers.items():
    if k not in mine:
      np.testing.assert_array_equal(shared[k], np.float32(toys.start()[k]))
      continue
    found, counts = np.unique(mine[k], return_counts=True)
    np.testing.assert_array_equal(found, np.sort(every, axis=None))
    # Of both levels, s is sampled by its layer alone.
    expected = 2 if level == "both" and k == "s" else HOLDERS[level]
    assert set(counts) == {expected}
  sampled = {"neuron": {"a", "b", "c"}}.get(level, {"a", "b", "c", "s"})
  assert set(mine) == sampled


@by_level
def test_what_all_workers_have_together_is_the_model(level):
  case = toys.case(level, "forward", False)
  state = jax.tree.map(np.asarray, case.begun)
  toys.equal(case.run.params(state), toys.float32(toys.start()))


def assert_copies_equal(ids, values):
  for k, x in held(values).items():
    for found in copies(ids[k], x).values():
      assert len({value.tobytes() for _, value in found}) == 1


@by_case
def test_copies_and_their_moments_stay_equal_to_the_bit(level, masking, shard):
  ids = toys.ids(level)
  state = toys.case(level, masking, shard).state
  if masking == "forward":
    assert_copies_equal(ids, state.params.held)
  adam = state.opt_state[0]
  for moments in (adam.mu, adam.nu):
    if not shard:
      assert_copies_equal(ids, {k: moments[k] for k in ids})
    shared = {k: x for k, x in moments.items() if k not in ids and not shard}
    for x in shared.values():
      assert (x == x[:1]).all()


@by_level
@forward
@pytest.mark.parametrize("choose", [min, max])
def test_the_whole_model_is_the_same_whichever_holder_it_is_from(
  choose, level, shard
):
  ids = toys.ids(level)
  case, numbers = (
    toys.case(level, "forward", shard),
    toys.numbered(toys.start()),
  )
  for k, x in held(case.state.params.held).items():
    found = copies(ids[k], x)
    from_one = np.vectorize(lambda i, found=found: choose(found[i])[1])
    np.testing.assert_array_equal(from_one(numbers[k]), case.params[k])
  for k, x in held(case.state.params.shared).items():
    np.testing.assert_array_equal(x, case.params[k])


@by_level
def test_moments_that_are_owned_are_those_that_all_holders_would_have(level):
  """Each element is in one worker's, and all are the same as without owners."""
  for masking in ("forward", "backward"):
    owners = toys.case(level, masking, True).state.opt_state[0]
    all_ = toys.case(level, masking, False).state.opt_state[0]
    for k in toys.NAMES:
      mine = np.asarray(owners.mu[k])
      assert mine.ndim == len(toys.NAMES[k]) + 1 or k == "gain"  # masks ask
      mine = np.sort(mine[mine != 0])
      every = np.asarray(all_.mu[k])
      if every.shape[1:] == toys.start()[k].shape:  # shared
        every = every[0]
      every = np.unique(every)
      assert len(mine) == toys.start()[k].size
      np.testing.assert_allclose(mine, every, rtol=1e-4, atol=1e-7)


OPTIONS = {"clip_norm": toys.CLIP_NORM, "accumulate": 2}


def end(method):
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, toys.float32(toys.start()))
  for i in range(4):
    state, metrics = run.step(state, toys.float32(toys.batch(i)), KEY)
  return run.params(state), metrics


@functools.cache
def end_of_ddp():
  return end(dj.ddp(toys.loss_fn, toys.ADAMW, **OPTIONS))


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("level", ["neuron", "block"])
def test_who_holds_everything_trains_like_ddp(level, masking):
  method = toys.make(level, coverage=1.0, masking=masking, **OPTIONS)
  toys.near(end(method), end_of_ddp(), tolerance=2e-6)


def one_step(run, rows, **rest):
  state = run.init(KEY, toys.float32(toys.start()))
  state, metrics = run.step(state, toys.float32(rows), KEY, **rest)
  return toys.numpy(run.params(state)), metrics


@functools.cache
def dense_step():
  params = toys.float32(toys.start())
  rows = toys.float32(toys.batch(0, toys.ROWS // N))
  grads, _ = jax.jit(jax.grad(toys.loss_fn, has_aux=True))(params, rows, KEY)
  norm = float(optax.tree.norm(grads))
  scale = min(1.0, toys.CLIP_NORM / norm)
  grads = jax.tree.map(lambda g: scale * g, grads)
  updates, _ = toys.ADAMW.update(grads, toys.ADAMW.init(params), params)
  return toys.numpy(optax.apply_updates(params, updates)), norm


@by_level
@forward
def test_a_backward_step_on_equal_rows_is_the_dense_step(level, shard):
  """And so the norm counts each parameter once, whoever holds it."""
  params, metrics = one_step(
    toys.case(level, "backward", shard).run, toys.same_for_all(0)
  )
  expected, norm = dense_step()
  assert norm > toys.CLIP_NORM
  toys.near(params, expected, 2e-6)
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize("coverage", [0.25, 0.75, 1.0])
def test_the_norm_is_the_dense_one_for_any_number_of_holders(coverage):
  method = toys.make(
    masking="backward", coverage=coverage, clip_norm=toys.CLIP_NORM
  )
  run = dj.simulate(method, workers=N)
  params, metrics = one_step(run, toys.same_for_all(0))
  expected, norm = dense_step()
  toys.near(params, expected, 2e-6)
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize("level", ["block", "both"])
def test_backward_copies_are_those_of_all_devices(level, mesh):
  """Of what is said to be equal on all workers, each has its own copy."""
  run = dj.distribute(toys.case(level, "backward", True).run.method, mesh(N))
  state = run.init(KEY, toys.float32(toys.start()))
  for i in range(toys.STEPS):
    state, _ = run.step(state, toys.float32(toys.batch(i)), KEY)
  for x in jax.tree.leaves(state.params.shared):
    shards = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert len(shards) == N
    for copy in shards[1:]:
      np.testing.assert_array_equal(copy, shards[0])


@by_level
@forward
def test_backward_masking_runs_on_what_others_have_updated(level, shard):
  case = toys.case(level, "backward", shard)
  state = jax.tree.map(np.asarray, case.state)
  toys.equal(state.params.shared, case.params)
  moved = jax.tree.map(
    lambda a, b: (a != np.float32(b)).all(), case.params, toys.start()
  )
  assert all(moved.values())  # what a worker does not train has moved as well
  rows = toys.batch(toys.STEPS)
  _, metrics = case.run.step(state, toys.float32(rows), KEY)
  p = jax.tree.map(np.float64, case.params)
  every = np.ones((toys.L, toys.M))
  loss, _ = toys.gradient(p, every, rows["x"], rows["y"])
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
