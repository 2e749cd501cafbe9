"""Sharding each leaf of a tree along one of its own dimensions.

Nothing is flattened or padded: a piece has as many axes as its leaf, and the
collectives work on the leaf's own shape.

Letters in shapes: N workers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.method import Params
from distrain_jax.shard import Shard


class Cut(NamedTuple):
  """A tree in parts, each of its structure, with None for the others' leaves.

  A leaf's place says how it is cut, which its piece's shape would not.
  """

  # pieces[d]: this worker's pieces of the leaves that are cut along dimension
  # d; as many as the leaf with most of them has dimensions.
  pieces: tuple[Params, ...]
  whole: Params  # leaves that all workers hold


def dimension(x: Any, workers: int) -> int | None:
  """Which dimension of an array (or of its shape and dtype) is cut.

  The largest that the workers divide, the last one only if no other can be:
  its elements are neighbours in memory, and XLA for TPU makes a whole
  all-reduce of a scatter along it. The first of three or more is avoided too:
  it may be the layers that a model scans over, which are better gathered one
  by one. None: not to be cut.

  >>> dimension(jax.ShapeDtypeStruct((16, 128, 256), jnp.float32), 8)
  1
  >>> dimension(jax.ShapeDtypeStruct((16, 3, 256), jnp.float32), 8)
  2
  >>> dimension(jax.ShapeDtypeStruct((16, 3, 3), jnp.float32), 8)
  0
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return None
  fits = [d for d, size in enumerate(x.shape) if size and size % workers == 0]
  if len(x.shape) > 2:
    fits = [d for d in fits if d > 0] or fits
  fits = [d for d in fits if d < len(x.shape) - 1] or fits
  return max(fits, key=lambda d: (x.shape[d], d), default=None)


def cut(tree: Params, workers: int, worker: jax.Array) -> Cut:
  """One worker's pieces of a whole tree."""

  def piece(x, d):
    size = x.shape[d] // workers
    return jax.lax.dynamic_slice_in_dim(x, worker * size, size, d)

  return _sort(tree, workers, piece)


def joined(parts: Cut) -> Params:
  """One tree of what the parts hold."""
  one = lambda *xs: next((x for x in xs if x is not None), None)
  return jax.tree.map(one, *parts.pieces, parts.whole, is_leaf=_is_none)


def sorted_like(tree: Params, like: Cut) -> Cut:
  """What `joined` joined: the tree's leaves, each in its part."""
  one = lambda old, new: None if old is None else new
  part = lambda old: jax.tree.map(one, old, tree, is_leaf=_is_none)
  return Cut(tuple(map(part, like.pieces)), part(like.whole))


def shards(parts: Cut, axis: str) -> Params:
  """One tree, with a `Shard` for each piece."""
  one = lambda d: lambda x: Shard(x, d, axis, x.dtype)
  pieces = tuple(jax.tree.map(one(d), t) for d, t in enumerate(parts.pieces))
  return joined(parts._replace(pieces=pieces))


def stack(tree: Params, workers: int) -> Cut:
  """The pieces of all workers, (N, ...), of a whole tree."""
  return _sort(tree, workers, lambda x, d: _stack(x, d, workers))


def unstack(parts: Cut) -> Params:
  """The whole tree from the pieces of all workers, (N, ...)."""
  pieces = (
    jax.tree.map(lambda x, d=d: _unstack(x, d), tree)
    for d, tree in enumerate(parts.pieces)
  )
  return joined(parts._replace(pieces=tuple(pieces)))


def restack(stacked: Any, whole: Any, target: Any, workers: int) -> Any:
  """Any state of the pieces' shapes for another number of workers.

  Args:
    stacked: leaves (N, ...): pieces, or the same array on all workers.
    whole: the tree of ShapeDtypeStructs as one worker alone would have it.
    target: as one of the new workers has it.
    workers: their number.

  Returns:
    Leaves (workers, ...): the same elements.
  """

  def one(x, whole, target):
    d = _differs(x.shape[1:], whole.shape)
    x = x[0] if d is None else _unstack(x, d)
    d = _differs(target.shape, whole.shape)
    if d is None:
      return jnp.broadcast_to(x, (workers, *x.shape))
    return _stack(x, d, workers)

  return jax.tree.map(one, stacked, whole, target)


def _sort(tree, workers, piece):
  leaves, treedef = jax.tree.flatten(tree)
  dims = [dimension(x, workers) for x in leaves]

  def part(d):
    one = lambda x, at: None if at != d else x if d is None else piece(x, d)
    return treedef.unflatten(map(one, leaves, dims))

  rank = max((x.ndim for x in leaves), default=0)
  return Cut(tuple(map(part, range(rank))), part(None))


def _stack(x, d, workers):
  shape = (*x.shape[:d], workers, x.shape[d] // workers, *x.shape[d + 1 :])
  return jnp.moveaxis(x.reshape(shape), d, 0)


def _unstack(x, d):
  x = jnp.moveaxis(x, 0, d)
  return x.reshape(*x.shape[:d], -1, *x.shape[d + 2 :])


def _differs(piece, whole) -> int | None:
  pairs = enumerate(zip(piece, whole))
  return next((d for d, (a, b) in pairs if a != b), None)


def _is_none(x) -> bool:
  return x is None
