"""How pieces travel: plain, or the difference in eight bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import layout, wires

pytestmark = pytest.mark.core

N, PARTS = 3, 2


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layout, "TILES", (2, 2))
    patch.setattr(layout, "LANES", 4)
    patch.setattr(layout, "ALONE", 100)
    yield


def make_tree(seed, scale=1.0):
  """Leaves of 70, 3, 1 and 120 elements, the last alone; 3 in bfloat16."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)
  low = jnp.asarray(draw(3), jnp.bfloat16)
  return {"a": draw(10, 7), "b": low, "c": draw(), "d": draw(10, 12)}


def through(wire, tree, workers=N, like=None):
  """`(what all workers make of it, what each of them sent)`."""
  flat = layout.make_layout(tree if like is None else like, workers)

  def worker(w):
    pieces = jax.tree.map(lambda x: x.astype(jnp.float32), flat.pieces(tree, w))
    sent = wire.encode(flat, pieces, PARTS)
    got = {k: jax.lax.all_gather(x, "i") for k, x in sent.items()}
    return wire.decode(flat, got), sent

  return jax.jit(jax.vmap(worker, axis_name="i"))(jnp.arange(workers))


def assert_on_all(got, expected):
  def one(x, y):
    assert x.dtype == y.dtype and x.shape == (N, *y.shape)
    np.testing.assert_array_equal(x, np.broadcast_to(y, x.shape))

  jax.tree.map(one, got, expected)


def test_plain_pieces_arrive_in_each_leafs_own_dtype():
  tree = make_tree(0)
  got, sent = through(wires.Plain(), tree)
  assert_on_all(got, jax.tree.map(jnp.asarray, tree))
  dtypes = {name: x.dtype.name for name, x in sent.items()}
  assert sorted(dtypes.values()) == ["bfloat16", "float32", "float32"]


def test_a_cheaper_dtype_rounds_what_arrives_but_not_its_dtype():
  tree = make_tree(0)
  got, sent = through(wires.Plain("bfloat16"), tree)
  rounded = lambda x: jnp.asarray(x, jnp.bfloat16).astype(x.dtype)
  assert_on_all(got, jax.tree.map(rounded, tree))
  assert {x.dtype.name for x in sent.values()} == {"bfloat16"}


def quantised(tree, base):
  return through(wires.Quantised(base, "i"), tree, like=base)


def test_eight_bits_are_off_by_a_254th_of_their_rows_largest_difference():
  base = make_tree(0)
  tree = jax.tree.map(lambda x, y: x + y, base, make_tree(1, 0.01))
  tree["d"] = base["d"] + 0.001 * make_tree(2)["d"]  # rows of other scales
  got, sent = quantised(tree, base)
  error, rows = np.abs(np.asarray(got["d"]) - tree["d"]).max(), []
  for name, x in sent.items():
    if name.endswith("/scale"):
      assert x.dtype == jnp.float32 and x.shape[2] == 1
      rows.append(np.asarray(x))
    if name.endswith("/steps"):
      assert x.dtype == jnp.int8 and x.shape[1] % PARTS == 0
      assert np.abs(np.asarray(x, int)).max() == 127
  assert len(rows) == 2
  # One row's scale has no part in another's error.
  moved = np.abs(tree["d"] - base["d"]).max()
  assert error <= moved / 254 * 1.001 + 2e-7
  own = min(x.max() for x in rows)
  np.testing.assert_allclose(own, moved / 127, rtol=1e-3)
  error = np.abs(np.asarray(got["a"]) - tree["a"]).max()
  assert 0 < error <= np.abs(tree["a"] - base["a"]).max() / 254 + 2e-7
  assert got["b"].dtype == jnp.bfloat16


def test_what_has_not_moved_arrives_exactly():
  base = make_tree(0)
  got, sent = quantised(base, base)
  assert_on_all(got, jax.tree.map(jnp.asarray, base))
  finite = lambda x: bool(jnp.isfinite(x.astype(jnp.float32)).all())
  assert all(map(finite, sent.values()))


def test_what_is_too_small_for_rows_travels_in_float32():
  base = {"a": np.arange(6, dtype=np.float32), "b": np.ones((), np.float32)}
  tree = jax.tree.map(lambda x: x + np.float32(1 / 3), base)
  got, sent = quantised(tree, base)
  assert {name: x.dtype.name for name, x in sent.items()} == {
    "float32": "float32"
  }
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(tree)):
    np.testing.assert_allclose(x, np.broadcast_to(y, x.shape), atol=1e-6)


def test_on_a_bfloat16_base_only_its_own_rounding_is_seen():
  base = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_tree(0))
  tree = jax.tree.map(
    lambda x, y: x.astype(jnp.float32) + y, base, make_tree(1, 1e-2)
  )
  tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  got, _ = quantised(tree, base)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(tree)):
    assert x.dtype == jnp.bfloat16
    error = np.abs(np.asarray(x, np.float32) - np.asarray(y))
    assert (error <= np.abs(np.asarray(y)) * 2**-8 + 0.04 / 254).all()
