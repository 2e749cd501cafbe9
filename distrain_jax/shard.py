"""One parameter, cut along a dimension, that is gathered where it is used.

What only moves elements, and leaves the cut dimension alone, is done to the
piece: no worker needs the others' for it. N: workers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Shard:
  """This worker's piece of an array; only floating ones are cut."""

  piece: jax.Array
  dim: int  # the pieces lie side by side along it
  axis: str  # of the workers
  # In which it travels and is used: the piece's dtype, or a narrower one.
  # Cotangents are summed over the workers in the piece's.
  dtype: Any

  @property
  def shape(self) -> tuple[int, ...]:
    size = self.piece.shape[self.dim] * lax.axis_size(self.axis)
    return self._sized(self.piece.shape, self.dim, size)

  def gathered(self) -> jax.Array:
    """The whole array; its gradient is a reduce-scatter."""
    return _gather(
      self.axis, self.dim, self.dtype, self.piece.dtype, self.piece
    )

  def like(self, shape, dim: int) -> tuple[int, ...]:
    """The shape of this worker's piece of `shape`, cut along dim."""
    return self._sized(shape, dim, self.piece.shape[self.dim])

  def holding(self, piece: jax.Array, dim: int) -> "Shard":
    return dataclasses.replace(self, piece=piece, dim=dim)

  @staticmethod
  def _sized(shape, dim, size):
    return (*shape[:dim], size, *shape[dim + 1 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather(axis, dim, wire, dtype, piece):
  del dtype
  return lax.all_gather(piece.astype(wire), axis, axis=dim, tiled=True)


def _gather_fwd(axis, dim, wire, dtype, piece):
  return _gather(axis, dim, wire, dtype, piece), None


def _gather_bwd(axis, dim, wire, dtype, _, ct):
  del wire  # as DDP's gradients do, these add up in the parameter's dtype
  ct = ct.astype(dtype)
  return (lax.psum_scatter(ct, axis, scatter_dimension=dim, tiled=True),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def moved(name: str, shard: Shard, params: dict) -> list[Shard] | None:
  """A primitive that moves elements, done to the piece.

  Args:
    name: of the primitive, in `MOVES`.
    shard: its only operand.
    params: the primitive's.

  Returns:
    One Shard per result, or None where it needs the other workers' pieces.
  """
  out = MOVES[name](shard, params)
  return [out] if isinstance(out, Shard) else out


def _transpose(s: Shard, params) -> Shard:
  order = params["permutation"]
  return s.holding(lax.transpose(s.piece, order), order.index(s.dim))


def _reshape(s: Shard, params) -> Shard | None:
  new, shape = params["new_sizes"], s.shape
  if params.get("dimensions") is None:
    for dim, size in enumerate(new):
      before = math.prod(new[:dim]) == math.prod(shape[: s.dim])
      if before and size == shape[s.dim]:
        return s.holding(s.piece.reshape(s.like(new, dim)), dim)
  return None


def _squeeze(s: Shard, params) -> Shard | None:
  gone = params["dimensions"]
  if s.dim in gone:
    return None
  dim = s.dim - sum(d < s.dim for d in gone)
  return s.holding(lax.squeeze(s.piece, gone), dim)


def _broadcast_in_dim(s: Shard, params) -> Shard | None:
  shape, to = params["shape"], params["broadcast_dimensions"]
  if math.prod(shape) != math.prod(s.shape) or shape[to[s.dim]] == 1:
    return None  # it would travel as large as it has become
  piece = lax.broadcast_in_dim(s.piece, s.like(shape, to[s.dim]), to)
  return s.holding(piece, to[s.dim])


def _slice(s: Shard, params) -> Shard | None:
  start, limit = params["start_indices"], params["limit_indices"]
  strides = params["strides"] or (1,) * len(start)
  if limit[s.dim] - start[s.dim] < s.shape[s.dim] or strides[s.dim] != 1:
    return None
  limit = s.like(limit, s.dim)
  return s.holding(lax.slice(s.piece, start, limit, strides), s.dim)


def _split(s: Shard, params) -> list[Shard] | None:
  if params["axis"] == s.dim:
    return None
  parts = lax.split(s.piece, params["sizes"], params["axis"])
  return [s.holding(part, s.dim) for part in parts]


def _rev(s: Shard, params) -> Shard | None:
  if s.dim in params["dimensions"]:
    return None
  return s.holding(lax.rev(s.piece, params["dimensions"]), s.dim)


def _convert(s: Shard, params) -> Shard | None:
  dtype = params["new_dtype"]
  floating = jnp.issubdtype(dtype, jnp.floating)
  if floating and jnp.promote_types(dtype, s.dtype) == s.dtype:
    return dataclasses.replace(s, dtype=dtype)
  return None


MOVES: dict[str, Callable[[Shard, dict], Any]] = {
  "broadcast_in_dim": _broadcast_in_dim,
  "convert_element_type": _convert,
  "reshape": _reshape,
  "rev": _rev,
  "slice": _slice,
  "split": _split,
  "squeeze": _squeeze,
  "transpose": _transpose,
}
