"""Fragments: every element in exactly one, and about equal bytes in each."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from distrain_jax import fragments

SHAPES = st.lists(st.sampled_from([(), (1,), (7, 2), (12, 3), (4, 0), (40,)]))


@given(SHAPES, st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_element_is_in_one_fragment_and_comes_back(shapes, count):
  tree = [np.zeros(shape, np.int32) for shape in shapes]
  cut = fragments.split(tree, count)
  assert len(cut) == count
  for p, fragment in enumerate(cut):
    got = fragments.take(tree, fragment)
    assert not any(np.asarray(x).any() for x in got)  # nobody's until now
    tree = fragments.put(tree, fragment, [jnp.full_like(x, p + 1) for x in got])
    for x in fragments.take(tree, fragment):
      np.testing.assert_array_equal(x, p + 1)
  assert [x.shape for x in tree] == shapes
  assert all((np.asarray(x) > 0).all() for x in tree)


def test_stacked_layers_are_dealt_out_in_turn_and_odd_rows_in_blocks():
  tree = {"layers": np.arange(6), "rows": np.arange(25), "few": np.arange(5)}
  held = [fragments.take(tree, f) for f in fragments.split(tree, 3)]
  few, layers, rows = zip(*[f if len(f) == 3 else [None, *f] for f in held])
  assert [x.ravel().tolist() for x in layers] == [[0, 3], [1, 4], [2, 5]]
  assert [x.tolist() for x in rows] == [
    list(range(8)),
    list(range(8, 16)),
    list(range(16, 25)),
  ]
  assert few[0].ravel().tolist() == [0, 1, 2, 3, 4] and few[1:] == (None, None)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_transformers_fragments_have_about_equal_bytes(count):
  shapes = {"embed": (50257, 64), "mlp": (12, 64, 256), "norm": (64,)}
  tree = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  sizes = [
    sum(tree[sorted(tree)[p.leaf]].size * p.size // p.view[p.dim] for p in f)
    for f in fragments.split(tree, count)
  ]
  assert sum(sizes) == sum(x.size for x in tree.values())
  assert max(sizes) < 1.001 * min(sizes)
