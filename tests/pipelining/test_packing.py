"""Trees that differ by worker, in arrays that do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax.pipelining.packing import TILE, packing
from distrain_jax.pipelining.partition import cut_evenly

SHAPES = st.lists(
  st.tuples(
    st.lists(st.integers(1, 3), max_size=2).map(tuple),
    st.sampled_from(["float32", "int32"]),
  ),
  max_size=3,
)


def tree(shapes, seed):
  rng = np.random.default_rng(seed)
  leaves = {
    f"leaf_{i}": jnp.asarray(rng.integers(0, 99, shape), dtype)
    for i, (shape, dtype) in enumerate(shapes)
  }
  return leaves


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.lists(SHAPES, min_size=1, max_size=3), min_size=1, max_size=4)
)
def test_what_is_packed_comes_out_and_all_workers_have_the_same_shapes(workers):
  held = [
    [tree(shapes, 10 * w + i) for i, shapes in enumerate(parts)]
    for w, parts in enumerate(workers)
  ]
  where = packing(held)
  packed = [where.pack(parts, w) for w, parts in enumerate(held)]
  kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), p) for p in packed]
  zeros = jax.tree.map(lambda x: (x.shape, x.dtype), where.zeros())
  assert all(k == zeros for k in kinds)
  for w, parts in enumerate(held):
    jax.tree.map(
      np.testing.assert_array_equal, where.unpack(packed[w], w), parts
    )


def test_what_all_have_alike_is_not_flattened_whatever_its_keys():
  block = lambda name: {name: jnp.zeros((2, 3)), "z": jnp.zeros(4)}
  where = packing([[block("a"), jnp.zeros(7)], [jnp.zeros(9), block("b")]])
  assert len(where.alike) == 1
  assert where.columns == {"float32": TILE}  # 9, in whole tiles
  assert where.used == (28, 36)
  assert where.padding() == (4 * TILE - 28, 4 * TILE - 36)


def test_a_worker_that_has_nothing_packs_zeros():
  where = packing([[jnp.ones(3)], None])
  assert where.parts[1] is None
  assert len(where.alike) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.data())
def test_no_other_cut_has_a_lighter_heaviest_stage(costs, data):
  count = data.draw(st.integers(1, len(costs)))
  parts = cut_evenly(costs, count)
  assert [i for part in parts for i in part] == list(range(len(costs)))
  assert all(len(part) for part in parts)
  assert len(parts) == count
  heaviest = max(sum(costs[i] for i in part) for part in parts)
  assert heaviest == brute_force(costs, count)


def brute_force(costs, count):
  if count == 1:
    return sum(costs)
  return min(
    max(sum(costs[:i]), brute_force(costs[i:], count - 1))
    for i in range(1, len(costs) - count + 2)
  )


def test_more_stages_than_blocks_are_refused():
  with pytest.raises(ValueError, match="2 blocks cannot be cut into 3 stages"):
    cut_evenly([1, 1], 3)
