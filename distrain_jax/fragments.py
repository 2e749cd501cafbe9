"""Cutting a tree into fragments of about equal bytes, fixed in advance.

Douillard et al., "Streaming DiLoCo with overlapping communication", 2025,
https://arxiv.org/abs/2501.18512, deal out a model's layers in turn. Here a
leaf whose rows divide by the fragments is dealt out so, row by row: of layers
that are stacked in one leaf, fragment p gets p, p + P, ... Other leaves with
many rows are cut into blocks of rows, and the rest stay whole, each in the
fragment that has the fewest bytes by then.

Letters in shapes: P fragments, R rows of a leaf.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.method import Params

MANY = 8  # rows a fragment: then blocks differ by an eighth at most


class Piece(NamedTuple):
  """A slice of one leaf, which is seen in another shape."""

  leaf: int  # in the tree's order
  view: tuple[int, ...]
  dim: int  # of the view
  start: int
  size: int


Fragment = tuple[Piece, ...]


def split(tree: Params, count: int) -> list[Fragment]:
  """Cuts a tree of arrays, or of their shapes and dtypes.

  >>> layers = jax.ShapeDtypeStruct((6, 4, 4), jnp.float32)
  >>> [piece.start for (piece,) in split(layers, 3)]  # of 2 layers each
  [0, 1, 2]
  """
  leaves = jax.tree.leaves(tree)
  fragments: list[list[Piece]] = [[] for _ in range(count)]
  held = [0] * count  # bytes
  small = []
  for i, x in enumerate(leaves):
    if x.ndim == 0 or (x.shape[0] % count and x.shape[0] < MANY * count):
      small.append(i)
      continue
    for p, piece in enumerate(_cut(i, x.shape, count)):
      fragments[p].append(piece)
      held[p] += _bytes(x) * piece.size // piece.view[piece.dim]
  for i in sorted(small, key=lambda i: -_bytes(leaves[i])):
    p = held.index(min(held))
    fragments[p].append(Piece(i, (1, *leaves[i].shape), 0, 0, 1))
    held[p] += _bytes(leaves[i])
  return [tuple(sorted(pieces)) for pieces in fragments]


def take(tree: Params, fragment: Fragment) -> list[jax.Array]:
  """The fragment's pieces, each in its view's shape."""
  leaves = jax.tree.leaves(tree)
  return [
    jax.lax.slice_in_dim(leaves[i].reshape(view), start, start + size, axis=dim)
    for i, view, dim, start, size in fragment
  ]


def put(tree: Params, fragment: Fragment, pieces: Sequence[Any]) -> Params:
  """The tree with the fragment's pieces replaced, in its leaves' dtypes."""
  leaves, treedef = jax.tree.flatten(tree)
  for (i, view, dim, start, _), new in zip(fragment, pieces):
    x = leaves[i]
    whole = jax.lax.dynamic_update_slice_in_dim(
      x.reshape(view), new.astype(x.dtype), start, dim
    )
    leaves[i] = whole.reshape(x.shape)
  return treedef.unflatten(leaves)


def _cut(i: int, shape: tuple[int, ...], count: int) -> list[Piece]:
  rows, rest = shape[0], shape[1:]
  if rows % count == 0:
    view = (rows // count, count, *rest)
    return [Piece(i, view, 1, p, 1) for p in range(count)]
  ends = [p * rows // count for p in range(count + 1)]
  return [Piece(i, shape, 0, a, b - a) for a, b in itertools.pairwise(ends)]


def _bytes(x) -> int:
  return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
