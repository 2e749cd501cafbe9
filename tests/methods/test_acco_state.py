"""What ACCO holds and sends, and what may be done to a state between steps."""

import functools
import re

import halves
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

KEY, N = halves.KEY, 4
RULE = halves.RULES["adamw"]
LOW = {"wire_dtype": "bfloat16", "param_dtype": "bfloat16"}
small_tiles = halves.small_tiles(rows=2)


def make(accumulate=2, **options):
  options = {"clip_norm": RULE.clip_norm, "wire_dtype": None, **options}
  return dj.acco(halves.loss_fn, RULE.tx, accumulate=accumulate, **options)


@functools.cache
def simulated(workers=N, **options):
  return dj.simulate(make(**options), workers=workers)


def test_other_numbers_of_workers_go_on_from_a_state():
  eight, four = simulated(8), simulated(4)
  state = halves.saved(halves.steps(eight, halves.begin(eight), 3)[0])
  there = four.adopt(state)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(halves.begin(four))
  back = eight.adopt(there)
  halves.equal((back.shard, back.reduced), (state.shard, state.reduced))
  # Gradients that wait are added up on the way, in another order.
  total = lambda grads: jax.tree.map(lambda x: np.sum(x, 0), grads)
  halves.near(total(back.grads), total(state.grads), 1e-6)
  ends = []
  for run, begun in ((eight, state), (eight, back), (four, there)):
    state = begun
    model = halves.saved(run.params(state))
    for i in range(3):
      # Four workers take other rows in the first half: let all be the same.
      micro = jax.tree.map(np.float32, halves.batch(7 + i, 3))
      rows = halves.repeated(micro, 32)
      state, metrics = run.step(state, rows, KEY)
    ends.append((model, run.params(state), metrics))
  halves.near(ends[1], ends[0], 2e-6)
  halves.near(ends[2], ends[0], 5e-6)


def test_the_compiled_round_has_one_exchange_in_its_loop_over_halves(mesh):
  run = dj.distribute(make(), mesh(8))
  rows = jax.tree.map(np.float32, halves.batch(0))
  text = run.step.lower(halves.begin(run), rows, KEY).compile().as_text()
  # XLA for CPU may combine the two buffers' collectives: `w`, and the others.
  found = lambda kind: len(re.findall(rf" {kind}(-start)?\(", text))
  assert 1 <= found("reduce-scatter") <= 2
  assert 1 <= found("all-gather") <= 2
  assert found("all-to-all") == found("collective-permute") == 0


def test_only_the_point_depends_on_the_wire_of_the_estimate():
  exact = simulated(estimate_dtype="float32")
  state = halves.saved(halves.steps(exact, halves.begin(exact), 3)[0])
  expected, metrics = halves.steps(exact, state, 1, first=3)
  model = exact.params(expected)
  for dtype in (None, "bfloat16", "int8"):
    run = simulated(estimate_dtype=dtype)
    got, same = halves.steps(run, state, 1, first=3)
    if dtype is None:  # another program
      halves.near(got, expected)
      continue
    halves.equal((run.params(got), same), (model, metrics))
    halves.equal(got._replace(estimate=()), expected._replace(estimate=()))
    unequal = lambda a, b: (a != b).any()
    points = got.estimate, expected.estimate
    assert any(jax.tree.leaves(jax.tree.map(unequal, *points)))
    if dtype == "bfloat16":
      low = jax.tree.map(lambda x: x.astype("bfloat16"), expected.estimate)
      halves.equal(got.estimate, halves.float32(low))


def test_an_estimate_in_eight_bits_is_off_by_a_part_of_its_step():
  rough, exact = (simulated(estimate_dtype=x) for x in ("int8", "float32"))
  state = halves.saved(halves.steps(exact, halves.begin(exact), 3)[0])
  got, expected = (
    halves.steps(run, state, 1, first=3)[0] for run in (rough, exact)
  )
  theta = halves.whole(expected.shard.masters)
  largest = lambda a, b: max(
    jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b))
  )
  moved = largest(expected.estimate, theta)
  error = largest(got.estimate, expected.estimate)
  assert 0 < error <= moved / 254 + 1e-6


def test_masters_stay_exact_and_points_are_their_roundings():
  run = simulated(**LOW)
  params = halves.float32(halves.start())
  state = run.init(KEY, params)
  halves.equal(halves.whole(state.shard.masters), params)
  state, _ = halves.steps(run, state, 4)
  fields = {"estimate": "bfloat16", "grads": "bfloat16", "reduced": "bfloat16"}
  for name, dtype in fields.items():
    found = {str(x.dtype) for x in jax.tree.leaves(getattr(state, name))}
    assert found == {dtype}
  wide = {x.dtype.name for x in jax.tree.leaves(state.shard)}
  assert wide == {"float32", "int32"}
  # With nothing pending the next commit is of the point where it is.
  nothing = state._replace(count=jnp.zeros(()), reduced_count=jnp.zeros(()))
  pieces = state.shard.masters
  masters = halves.whole(pieces)
  rounded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), masters)
  halves.equal(run.params(nothing), rounded)
  assert not any(x.any() for x in jax.tree.leaves(halves.padding(pieces)))


def with_statistics(params, stats, rows, key, axis=None):
  """A loss with a running mean, which it subtracts where it is everyone's."""
  mean = rows["x"].mean(0)
  if axis:
    mean = jax.lax.pmean(mean, axis)
  loss, aux = halves.loss_fn(params, {**rows, "x": rows["x"] - mean[None]}, key)
  seen = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "n": stats["n"] + 1}
  return loss, (aux, seen)


@pytest.mark.parametrize("stats", ["averaged", "local", "synchronised"])
def test_statistics_pass_through_both_halves_as_ddps_do(stats):
  axis = "data" if stats == "synchronised" else None
  fn = functools.partial(with_statistics, axis=axis)
  loss_fn = dj.stateful(fn, stats=stats)
  options = {"clip_norm": RULE.clip_norm}
  acco = dj.acco(loss_fn, RULE.tx, wire_dtype=None, accumulate=2, **options)
  acco = dj.simulate(acco, workers=4)
  ddp = dj.simulate(
    dj.ddp(loss_fn, RULE.tx, accumulate=4, **options), workers=4
  )
  model = dj.Variables(
    halves.float32(halves.start()),
    {"mean": jnp.zeros(halves.INPUTS), "n": jnp.zeros((), jnp.int32)},
  )
  state, plain = acco.init(KEY, model), ddp.init(KEY, model)
  for i in range(3):
    # The same rows in a worker's four micro-batches; each worker has its own.
    workers = [halves.batch(4 * i + w, 3) for w in range(4)]
    shares = [halves.repeated(rows, 4) for rows in workers]
    rows = jax.tree.map(lambda *x: np.float32(np.concatenate(x)), *shares)
    state, metrics = acco.step(state, rows, KEY)
    plain, expected = ddp.step(plain, rows, KEY)
    halves.near(state.model_state, plain.model_state, 2e-6)
    halves.near(acco.params(state), ddp.params(plain), 2e-6)
    halves.near(metrics["loss"], expected["loss"], 2e-6)
  seen = np.asarray(state.model_state["n"])
  assert (seen == 3 * 4).all() and seen.shape == (
    (4,) if stats == "local" else ()
  )
  few = dj.simulate(acco.method, workers=2)
  there = few.adopt(jax.tree.map(np.array, state))
  halves.near(few.params(there), acco.params(state), 2e-6)
