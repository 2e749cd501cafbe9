"""Cutting a tree along its leaves' dimensions, and putting it together."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings

from distrain_jax import pieces

SHAPES = st.lists(st.integers(1, 12), max_size=4).map(tuple)
WORKERS = st.sampled_from([1, 2, 3, 4, 8])
quick = settings(max_examples=40, deadline=None)


def tree_of(shapes):
  """NumPy arrays of distinct numbers in several containers, with a hole."""
  arrays = [np.arange(np.prod(s), dtype=np.float32).reshape(s) for s in shapes]
  return {"list": [arrays, None], "pair": (arrays[:1], {})}


@quick
@given(shape=SHAPES, workers=WORKERS)
def test_the_largest_dimension_between_the_ends_that_fits_is_cut(
  shape, workers
):
  d = pieces.dimension(np.zeros(shape, np.float32), workers)
  fits = [i for i, size in enumerate(shape) if size % workers == 0]
  if len(shape) > 2 and fits != [0]:
    fits = [i for i in fits if i > 0]  # the first may be a scan's
  if fits != [len(shape) - 1]:
    fits = [i for i in fits if i < len(shape) - 1]
  if d is None:
    assert not fits
  else:
    assert d in fits
    assert shape[d] == max(shape[i] for i in fits)
    assert all(shape[i] < shape[d] for i in fits if i > d)


def test_integers_are_not_cut():
  assert pieces.dimension(np.zeros((8, 8), np.int32), 2) is None


@quick
@given(shapes=st.lists(SHAPES, max_size=4), workers=WORKERS)
def test_all_workers_pieces_make_the_tree(shapes, workers):
  tree = tree_of(shapes)
  cuts = [pieces.cut(tree, workers, w) for w in range(workers)]
  for part in cuts:
    joined = pieces.joined(part)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    again = pieces.sorted_like(joined, part)
    assert jax.tree.structure(again) == jax.tree.structure(part)
    jax.tree.map(np.testing.assert_array_equal, again, part)
  stacked = jax.tree.map(lambda *x: np.stack(x), *(c.pieces for c in cuts))
  jax.tree.map(
    np.testing.assert_array_equal, stacked, pieces.stack(tree, workers).pieces
  )
  whole = pieces.unstack(pieces.Cut(stacked, cuts[0].whole))
  assert jax.tree.structure(whole) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, whole, tree)


@quick
@given(shapes=st.lists(SHAPES, min_size=1, max_size=3), n=WORKERS, m=WORKERS)
def test_an_optimizers_state_moves_to_other_workers_and_back(shapes, n, m):
  tree = tree_of(shapes)
  # A trace is a tree like the parameters: the parameters themselves, here.
  init = optax.trace(0.9).init
  state = lambda w, tree: optax.TraceState(pieces.joined(pieces.cut(tree, *w)))

  def stacked(workers):
    each = [state((workers, w), tree) for w in range(workers)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)

  def moved(x, workers):
    target = jax.eval_shape(functools.partial(state, (workers, 0)), tree)
    return pieces.restack(x, jax.eval_shape(init, tree), target, workers)

  there = moved(stacked(n), m)
  jax.tree.map(np.testing.assert_array_equal, there, stacked(m))
  back = moved(there, n)
  jax.tree.map(np.testing.assert_array_equal, back, stacked(n))
