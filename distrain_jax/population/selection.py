"""Which coordinates an exchange moves: few, different ones, without a sort.

All members compute the same choice from a key that they share, so that only
values travel. The number of them is static; where rounding up to it would take
too many, a shared draw leaves some in their place, so that every coordinate of
a layer is moved with exactly the layer's rate. That holds up to a rate of (n
rounded down to a multiple of N) / n: of fewer than N coordinates none moves.

Letters in shapes: N members, k chosen coordinates of n.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Leaves below both are chosen from together: apart, rounding each one's count
# up to a multiple of N would multiply what travels.
_FEW = 4  # expected coordinates, over N
_SMALL = 2**16  # coordinates: what is put side by side is copied


class Piece(NamedTuple):
  """A layer of a leaf, or the whole leaf, or all small leaves together."""

  layer: int | None  # index on the leaf's first axis; None: the whole leaf
  size: int  # n
  count: int  # k, a multiple of N
  share: float  # of the chosen ones, those that are moved; in (0, 1]


class Plan(NamedTuple):
  """Static: what is chosen from where."""

  members: int
  leaves: tuple[tuple[Piece, ...], ...]  # of each leaf; () if none or pooled
  pooled: tuple[int, ...]  # the leaves that are chosen from together
  pool: Piece | None
  pool_rates: np.ndarray  # (n of the pool,), float32, over the largest

  @property
  def pieces(self) -> list[Piece]:
    own = [piece for pieces in self.leaves for piece in pieces]
    return own + ([self.pool] if self.pool else [])

  @property
  def count(self) -> int:
    """K: how many coordinates are chosen in all."""
    return sum(piece.count for piece in self.pieces)


class Chosen(NamedTuple):
  """One step's choice, the same on every member."""

  # Of each leaf's pieces, then of the pool: flat indices (k,), int32.
  where: list[list[jax.Array]]
  pool: jax.Array | None
  moved: jax.Array | None  # (K,), bool, in the order of `where`; None: all


def make_plan(
  shapes: Sequence[tuple[int, ...]],
  rates: Sequence[np.ndarray],
  members: int,
) -> Plan:
  """What is chosen from leaves of these shapes.

  Args:
    shapes: of the leaves.
    rates: of each: (), or one for each index of its first axis.
    members: N.
  """
  pooled = tuple(
    i
    for i, (shape, rate) in enumerate(zip(shapes, rates))
    if rate.max(initial=0) > 0
    and math.prod(shape) <= _SMALL
    and _is_pooled(math.prod(shape), rate, members)
  )
  leaves = tuple(
    () if i in pooled else _pieces(shape, rate, members)
    for i, (shape, rate) in enumerate(zip(shapes, rates))
  )
  wide = [_by_coordinate(shapes[i], rates[i]) for i in pooled]
  by_coordinate = np.concatenate(wide) if wide else np.zeros(0)
  most = by_coordinate.max(initial=0)
  pool = _piece(None, by_coordinate.size, float(most), members)
  if pool is None:
    pooled = ()
  relative = (by_coordinate / most if most else by_coordinate).astype(
    np.float32
  )
  return Plan(members, leaves, pooled, pool, relative)


def choose(plan: Plan, key: jax.Array) -> Chosen:
  """The choice that belongs to a key."""
  turn_key, stratum_key, moved_key = jax.random.split(key, 3)
  pieces = plan.pieces
  if not pieces:
    return Chosen([[] for _ in plan.leaves], None, None)
  sizes = jnp.asarray([piece.size for piece in pieces], jnp.int32)
  turns = jax.random.randint(turn_key, (len(pieces),), 0, sizes)
  widths = [jnp.full(p.count, p.size // p.count, jnp.int32) for p in pieces]
  # One place in each stratum, and the strata turned: all different, and each
  # coordinate is chosen as often as any other.
  inside = jax.random.randint(
    stratum_key, (plan.count,), 0, jnp.concatenate(widths)
  )
  flat, start = [], 0
  for i, piece in enumerate(pieces):
    strata = jnp.arange(piece.count, dtype=jnp.int32)
    at = strata * (piece.size // piece.count)
    at += inside[start : start + piece.count]
    flat.append(_wrapped(at, turns[i], piece.size))
    start += piece.count
  pool = flat.pop() if plan.pool else None
  moved = _moved(plan, pool, moved_key)
  rest = iter(flat)
  where = [[next(rest) for _ in leaf] for leaf in plan.leaves]
  return Chosen(where, pool, moved)


def _wrapped(at: jax.Array, turn: jax.Array, size: int) -> jax.Array:
  """(at + turn) % size without a sum that int32 could not hold."""
  return jnp.where(at >= size - turn, at - (size - turn), at + turn)


def _moved(plan: Plan, pool, key) -> jax.Array | None:
  pieces = plan.pieces
  uneven = plan.pool is not None and plan.pool_rates.min() < 1
  if all(piece.share == 1 for piece in pieces) and not uneven:
    return None
  shares = [jnp.full(p.count, p.share, jnp.float32) for p in pieces]
  if uneven:
    shares[-1] = shares[-1] * jnp.asarray(plan.pool_rates)[pool]
  return jax.random.uniform(key, (plan.count,)) < jnp.concatenate(shares)


def _is_pooled(size: int, rate: np.ndarray, members: int) -> bool:
  """Whether rounding to a multiple of N would ask for too much, or too little."""
  each = size // max(rate.size, 1)
  most = rate.max() * each
  return rate.max() * size < _FEW * members or most > each // members * members


def _pieces(shape, rate, members) -> tuple[Piece, ...]:
  """Those of one leaf that have something to move."""
  if rate.ndim:
    size = math.prod(shape[1:])
    found = [_piece(i, size, float(r), members) for i, r in enumerate(rate)]
  else:
    found = [_piece(None, math.prod(shape), float(rate), members)]
  return tuple(piece for piece in found if piece is not None)


def _piece(layer, size: int, rate: float, members: int) -> Piece | None:
  """Rounded up to a multiple of N, but not beyond what there is."""
  if size >= 2**31:
    raise ValueError(
      f"population: a leaf, or a layer of one, has {size} coordinates; "
      "exchanges count up to 2**31 - 1. Stack fewer in one array."
    )
  wanted = rate * size
  # A float's last bit must not make one more of a whole number.
  groups = min(math.ceil(wanted / members - 1e-9), size // members)
  if not groups or not wanted:
    return None
  count = groups * members
  return Piece(layer, size, count, min(1.0, wanted / count))


def _by_coordinate(shape, rate) -> np.ndarray:
  each = math.prod(shape[rate.ndim :])
  return np.repeat(np.ravel(rate), each)
