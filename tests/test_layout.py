"""The flat layout: a tree cut into N rows and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax import layout

pytestmark = pytest.mark.core

SHAPES = [(), (0,), (8,), (2, 3), (2, 2, 2)]
DTYPES = [jnp.float32, jnp.bfloat16]
few = settings(max_examples=15, deadline=None, derandomize=True)


@st.composite
def trees(draw):
  """Nested containers of small arrays, all elements different."""
  kinds = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
  node = lambda inner: (
    st.lists(inner, max_size=3)
    | st.tuples(inner, st.none())
    | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
  )
  tree = draw(st.recursive(kinds.map(lambda k: [np.empty(k[0], k[1])]), node))
  start = 0

  def fill(x):
    nonlocal start
    start += x.size
    values = np.arange(start - x.size, start) % 256 + 1  # exact in bfloat16
    return values.reshape(x.shape).astype(x.dtype)

  return jax.tree.map(fill, tree)


workers = st.sampled_from([1, 3, 8])


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)

  def one(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

  jax.tree.map(one, a, b)


def put_together(pieces, tree):
  """The definition: pieces side by side, without the padding at the end."""

  def one(x, *parts):
    flat = np.concatenate([np.asarray(p).ravel() for p in parts])
    assert not flat[x.size :].any()  # padding is zero
    return flat[: x.size].reshape(x.shape)

  return jax.tree.map(one, tree, *pieces)


@few
@given(trees(), workers)
def test_pieces_are_the_tree_in_order_with_its_ranks(tree, n):
  flat = layout.make_layout(tree, n)
  pieces = [flat.pieces(tree, w) for w in range(n)]
  assert_equal(put_together(pieces, tree), tree)

  def one(x, piece):
    assert piece.ndim == max(1, x.ndim)
    assert piece.size == -(-x.size // n)
    assert piece.dtype == x.dtype

  jax.tree.map(one, tree, pieces[0])


@few
@given(trees(), workers)
def test_unpack_undoes_pack(tree, n):
  flat = layout.make_layout(tree, n)
  rows = flat.rows(tree)
  buffers = flat.pack(rows)
  assert set(buffers) == {str(x.dtype) for x in rows}
  assert all(x.ndim == 3 and x.shape[0] == n for x in buffers.values())
  again = flat.unpack(buffers, [x.dtype for x in rows])
  assert_equal(again, rows)


@few
@given(trees(), workers)
def test_gathered_pieces_are_the_tree_on_every_worker(tree, n):
  flat = layout.make_layout(tree, n)

  def fn(worker):
    return flat.all_gather(flat.pieces(tree, worker), "i")

  if jax.tree.leaves(tree):
    whole = jax.vmap(fn, axis_name="i")(jnp.arange(n))
    jax.tree.map(lambda x: assert_equal(x[0], x[-1]), whole)
    assert_equal(jax.tree.map(lambda x: x[0], whole), tree)


@few
@given(trees(), workers)
def test_reduce_scatter_gives_the_pieces_of_the_mean_in_float32(tree, n):
  flat = layout.make_layout(tree, n)

  def fn(worker):
    mine = jax.tree.map(lambda x: x * (worker + 1).astype(x.dtype), tree)
    return flat.reduce_scatter(mine, "i", wire_dtype=jnp.float32)

  if jax.tree.leaves(tree):
    stacked = jax.vmap(fn, axis_name="i")(jnp.arange(n))
    pieces = [jax.tree.map(lambda x, w=w: x[w], stacked) for w in range(n)]
    mean = jax.tree.map(
      lambda x: x.astype(np.float32) * np.float32((n + 1) / 2), tree
    )
    got = put_together(pieces, mean)
    # Products with worker + 1 round in bfloat16.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), got, mean
    )


@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
def test_what_was_summed_in_low_precision_is_divided_in_float32(wire_dtype):
  tree = {"low": jnp.ones(5, jnp.bfloat16), "plain": jnp.ones(3)}
  flat = layout.make_layout(tree, 3)
  mean = lambda _: flat.reduce_scatter(tree, "i", wire_dtype)
  pieces = jax.vmap(mean, axis_name="i")(jnp.arange(3))
  assert {x.dtype for x in pieces.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
  ("size", "shape"),
  [(20001, (8, 1280)), (2 * 900_000 - 30, (880, 1024))],
)
def test_long_buffers_are_cut_in_whole_tiles(size, shape):
  tree = {"a": np.arange(float(size), dtype=np.float32), "b": np.ones(3, "f")}
  flat = layout.make_layout(tree, 2)
  buffers = flat.pack(flat.rows(tree))
  large = max(buffers.values(), key=lambda x: x.size)
  assert large.shape == (2, *shape)
  assert large.shape[1] % 8 == large.shape[2] % 256 == 0
  rows = flat.unpack(buffers, [jnp.float32] * 2)
  assert_equal(rows, flat.rows(tree))


def test_large_leaves_travel_alone():
  tree = [np.ones(n, "f") for n in (5, layout.ALONE, 7, layout.ALONE + 1)]
  flat = layout.make_layout(tree, 4)
  buffers = flat.pack(flat.rows(tree))
  columns = {name: x.size // 4 for name, x in buffers.items()}
  assert set(columns) == {"float32", "float32/1", "float32/3"}
  assert columns["float32"] == 2 + 2
  assert columns["float32/1"] >= layout.ALONE // 4
  rows = flat.unpack(buffers, [jnp.float32] * 4)
  assert_equal(rows, flat.rows(tree))


def test_each_dtype_has_its_own_buffer_in_leaf_order():
  tree = [
    np.full(4, 1, "f"),
    jnp.full(4, 2, jnp.bfloat16),
    np.full(4, 3, "f"),
  ]
  flat = layout.make_layout(tree, 2)
  buffers = flat.pack(flat.rows(tree))
  np.testing.assert_array_equal(buffers["float32"][0, 0], [1, 1, 3, 3])
  np.testing.assert_array_equal(buffers["bfloat16"][0, 0], [2, 2])


def test_a_layout_needs_only_shapes_and_is_hashable():
  tree = {"w": np.zeros((2, 3), "f"), "s": np.zeros((), "f")}
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))
  flat = layout.make_layout(shapes, 4)
  assert flat == layout.make_layout(tree, 4)
  assert hash(flat) == hash(layout.make_layout(tree, 4))
  assert [leaf.columns for leaf in flat.leaves] == [1, 2]


def stack(tree, n):
  """State as a run holds it: pieces with a worker axis, and a counter."""
  flat = layout.make_layout(tree, n)
  pieces = [flat.pieces(tree, w) for w in range(n)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *pieces)
  return {"pieces": stacked, "count": jnp.full(n, 5)}


@few
@given(trees(), workers, workers)
def test_restacked_state_is_that_of_the_other_number_of_workers(tree, n, m):
  if not jax.tree.leaves(tree):
    return
  one = jax.tree.map(lambda x: x[0], stack(tree, m))
  target = jax.eval_shape(lambda: one)
  assert_equal(layout.restack(stack(tree, n), target, m), stack(tree, m))


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(layout, "TILES", (2, 4))
  monkeypatch.setattr(layout, "LANES", 8)
  monkeypatch.setattr(layout, "ALONE", 100)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_buffers_have_a_tile_for_each_part_or_are_one_row(parts, small_tiles):
  sizes = (90, 3, 350, 1, 64)
  tree = [np.arange(n, dtype=np.float32) + 1 for n in sizes]
  flat = layout.make_layout(tree, 3)
  rows = flat.rows(tree)
  buffers = flat.pack(rows, parts)
  large = [x for x in buffers.values() if x.shape[1] > 1]
  assert len(large) == 2 or parts == 5
  for x in large:
    assert x.shape[1] >= 2 * parts
    assert x.shape[1] % 2 == x.shape[2] % 4 == 0
  assert_equal(flat.unpack(buffers, [jnp.float32] * len(sizes)), rows)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_large_leaf_is_cut_as_it_lies_in_memory(parts, small_tiles):
  tree = [np.arange(24 * 8, dtype=np.float32).reshape(24, 8), np.ones(5, "f")]
  flat = layout.make_layout(tree, 3)
  buffers = flat.pack(flat.rows(tree), parts)
  np.testing.assert_array_equal(buffers["float32/0"], tree[0].reshape(3, 8, 8))


def test_small_leaves_and_large_ones_keep_their_places(small_tiles):
  """Leaves of their own between small ones, their numbers of two digits."""
  sizes = [120 if i in (0, 2, 10) else i for i in range(12)]
  tree = [np.full(n, i, np.float32) for i, n in enumerate(sizes)]
  flat = layout.make_layout(tree, 4)
  gather = lambda w: flat.all_gather(flat.pieces(tree, w), "i")
  whole = jax.jit(jax.vmap(gather, axis_name="i"))(jnp.arange(4))
  assert_equal([x[3] for x in whole], tree)
