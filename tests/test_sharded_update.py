"""One worker's share of an update against the whole model's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import layout, sharded_update
from distrain_jax.sharded_update import Shard, Sums

pytestmark = pytest.mark.core

TX = optax.adamw(0.1, weight_decay=0.1)


def make_tree(seed, dtype=np.float32):
  """Sizes 15, 5 and 1: nothing divides by the workers."""
  rng = np.random.default_rng(seed)
  shapes = {"w": (3, 5), "b": (5,), "gain": ()}
  draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {k: draw(shape) for k, shape in shapes.items()}


def of_workers(fn, n, *each):
  return jax.jit(jax.vmap(fn, axis_name="i"))(jnp.arange(n), *each)


def started(n, whole=None):
  whole = make_tree(0) if whole is None else whole
  start = lambda w: sharded_update.start("m", TX, whole, "i")
  return of_workers(start, n)


def advanced(shards, grads, count, clip_norm, n):
  """Every worker has its pieces of `grads`, the workers' sum."""
  flat = layout.make_layout(grads, n)

  def one(w, shard):
    sums = Sums(flat.pieces(grads, w), jnp.float32(count))
    return sharded_update.advance(TX, shard, sums, "i", clip_norm)

  return of_workers(one, n, shards)


def whole(stacked, like):
  flat = jax.tree.map(lambda x: np.asarray(x).ravel(), stacked)
  cut = lambda x, p: x[: p.size].reshape(p.shape)
  return jax.tree.map(cut, flat, like)


def near(got, expected):
  one = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
  jax.tree.map(one, got, expected)


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_sharded_equals_unsharded(workers, clip_norm):
  params, count = make_tree(0), 6
  shards, opt_state = started(workers), TX.init(params)
  for seed in (1, 2):
    grads = make_tree(seed)  # a sum over 6 micro-batches
    shards, norms = advanced(shards, grads, count, clip_norm, workers)
    means = jax.tree.map(lambda g: g / count, grads)
    squares = [np.sum(np.square(g)) for g in jax.tree.leaves(means)]
    norm = np.sqrt(sum(squares))
    if clip_norm is not None:
      assert norm > clip_norm
      means = optax.tree.scale(clip_norm / norm, means)
    updates, opt_state = TX.update(means, opt_state, params)
    params = optax.apply_updates(params, updates)
    near(norms, np.full(workers, norm))  # padding adds nothing
    near(whole(shards.masters, params), params)
    near(whole(shards.opt_state[0].mu, params), opt_state[0].mu)
    near(whole(shards.opt_state[0].nu, params), opt_state[0].nu)


def test_without_a_microbatch_the_shard_stays_whatever_the_sums():
  shards = started(4)
  nothing = jax.tree.map(lambda x: x * np.nan, make_tree(1))
  for sums in (nothing, make_tree(1)):
    same, norms = advanced(shards, sums, 0, 1.0, 4)
    jax.tree.map(np.testing.assert_array_equal, same, shards)
    assert norms.tolist() == [0.0] * 4


def test_masters_are_float32_and_exact_whatever_the_parameters_are():
  params = make_tree(0, jnp.bfloat16)
  masters = started(2, params).masters
  assert {x.dtype.name for x in jax.tree.leaves(masters)} == {"float32"}
  jax.tree.map(np.testing.assert_array_equal, whole(masters, params), params)


def test_without_masters_the_optimizer_starts_in_the_parameters_dtype():
  params = make_tree(0, jnp.bfloat16)

  def begun(n):
    start = lambda w: sharded_update.start("m", TX, params, "i", masters=False)
    return of_workers(start, n)

  shard = begun(3)
  assert shard.masters is None
  assert {x.dtype.name for x in jax.tree.leaves(shard.opt_state[0].mu)} == {
    "bfloat16"
  }
  moved = jax.tree.map(lambda x: x + 1, shard)
  there = sharded_update.restack(moved, TX, params, 2)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(begun(2))
  mu, moved_mu = there.opt_state[0].mu, moved.opt_state[0].mu
  near(whole(mu, params), whole(moved_mu, params))


def test_an_optimizer_over_norms_is_refused_by_the_methods_name():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
  start = lambda w: sharded_update.start("m", tx, make_tree(0), "i")
  with pytest.raises(ValueError, match=r"m shards.*clip_norm=\.\.\."):
    of_workers(start, 2)


@pytest.mark.parametrize(("few", "many"), [(1, 4), (3, 8), (4, 4)])
def test_shards_of_other_numbers_of_workers_are_the_same_in_another_cut(
  few, many
):
  shards, _ = advanced(started(few), make_tree(1), 2, None, few)
  expected, _ = advanced(started(many), make_tree(1), 2, None, many)
  there = sharded_update.restack(shards, TX, make_tree(0), many)
  assert isinstance(there, Shard)
  near(there, expected)
  back = sharded_update.restack(there, TX, make_tree(0), few)
  jax.tree.map(np.testing.assert_array_equal, back, shards)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_merged_sums_are_as_many_in_all_and_the_first_has_them(workers):
  low = jnp.asarray([[1.0], [2.0**-8], [2.0**-8]], jnp.bfloat16)
  sums = {"a": jnp.arange(6.0).reshape(3, 2), "low": low}
  merged = sharded_update.merge(sums, workers)
  assert {k: x.shape for k, x in merged.items()} == {
    "a": (workers, 2),
    "low": (workers, 1),
  }
  assert merged["a"][0].tolist() == [6.0, 9.0]
  assert not any(x[1:].any() for x in merged.values())
  # Added up in float32: in bfloat16 1 + 2^-8 is 1.
  assert merged["low"].dtype == jnp.bfloat16
  assert float(merged["low"][0, 0]) == 1 + 2.0**-7
