"""One array of which workers hold a part: its fragments and its shapes.

Letters in shapes: N workers, S places of a worker, O places that it owns, c
elements of a fragment, l layers and g groups that a worker holds, L and G all
of them, F fragments a cell.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.methods.sdp import assignments, exchange
from distrain_jax.methods.sdp.structure import Leaf


class Sampled(NamedTuple):
  """An array of which workers hold a part."""

  leaf: Leaf
  holding: assignments.Holding
  plan: exchange.Plan
  fragments: int  # F of this array's cells

  def rows(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """An array with `size` (layers, groups) -> its fragments (l g F, c)."""
    rows = self.shaped(x, size)
    return rows.reshape(rows.shape[0], -1)

  def shaped(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """As `rows`, with the axes that fragments have: (l g F, ...).

    TPUs lay arrays out in tiles of the last two axes: to make one of them takes
    a copy.
    """
    x, front = self._split(x, size[1])
    x = jnp.moveaxis(x, front, range(len(front)))
    rest = self._inner(x.shape[len(front) :])
    return x.reshape(size[0] * size[1] * self.fragments, *rest)

  def reshaped(self, rows: jax.Array) -> jax.Array:
    """Rows (O, c) with the axes that `shaped` gives them."""
    like, front = self._split(
      jax.ShapeDtypeStruct(self.leaf.shape, rows.dtype), self.holding.size[1]
    )
    rest = [n for i, n in enumerate(like.shape) if i not in front]
    return rows.reshape(rows.shape[0], *self._inner(rest))

  def _inner(self, cell) -> tuple[int, ...]:
    """Axes of a cell -> those of its fragments."""
    if cell and cell[0] % self.fragments == 0:
      return (cell[0] // self.fragments, *cell[1:])
    return (-1,)

  def array(self, rows: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Undoes `rows`."""
    shape = self.shape(size)
    like, front = self._split(jax.ShapeDtypeStruct(shape, rows.dtype), size[1])
    moved = [like.shape[i] for i in front]
    rest = [n for i, n in enumerate(like.shape) if i not in front]
    x = rows.reshape(*moved, *rest)
    return jnp.moveaxis(x, range(len(front)), front).reshape(shape)

  def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
    """Of the array with so many layers and groups."""
    shape = list(self.leaf.shape)
    for at, n, all_ in zip(
      (self.leaf.lanes, self.leaf.axis), size, self.holding.size
    ):
      if at is not None:
        shape[at] = shape[at] // all_ * n
    return tuple(shape)

  @property
  def small(self) -> tuple[int, int]:
    """(l, g)"""
    return self.holding.groups.shape[1:]

  @property
  def factor(self) -> float:
    """What makes up for the absent units, and for the absent blocks."""
    layers = self.holding.of_layers
    groups = self.holding.coverage / layers
    units = 1 / groups if self.leaf.consumer else 1.0
    return units * (1 / layers if self.leaf.writer else 1.0)

  # Below, `roles` are all workers' (N,), and no messages are sent.

  def whole(self, stacked: jax.Array, roles: jax.Array) -> jax.Array:
    """What all workers hold, (N, ...) -> the whole array."""
    own = lambda x, r: exchange.pick(self.rows(x, self.small), self.plan.own, r)
    return self.merge(_each(own, stacked, roles), roles)

  def merge(self, owned: jax.Array, roles: jax.Array) -> jax.Array:
    """What all workers own, (N, O, c) -> the whole array."""
    every = exchange.in_order(self.plan, owned, roles[0])
    return self.array(every, self.holding.size)

  def stack(self, whole: jax.Array, roles: jax.Array) -> jax.Array:
    """The whole array -> what all workers hold, (N, ...)."""
    rows = self.rows(whole, self.holding.size)
    take = lambda r: self.array(
      exchange.pick(rows, self.plan.at, r), self.small
    )
    return _each(take, roles)

  def stack_owned(self, whole: jax.Array, roles: jax.Array) -> jax.Array:
    """The whole array -> what all workers own, (N, O, c)."""
    rows = self.rows(whole, self.holding.size)
    return _each(lambda r: exchange.pick(rows, self.plan.fragments, r), roles)

  def piece(self, owned: jax.Array) -> jax.Array:
    """(O, c) with as many axes as the array has: masks may ask for ndim."""
    if len(self.leaf.shape) == 1:
      return owned.reshape(-1)
    ones = (1,) * (len(self.leaf.shape) - 2)
    return owned.reshape(owned.shape[0], *ones, owned.shape[1])

  def rows_of(self, piece: jax.Array) -> jax.Array:
    """Undoes `piece`; leading axes stay, e.g. of all workers: (..., O, c)."""
    lead = piece.shape[: piece.ndim - len(self.leaf.shape)]
    return piece.reshape(*lead, self.plan.own.shape[1], -1)

  def _split(self, x, groups: int):
    """With an axis of its own for the groups; and what goes to the front."""
    lanes, axis = self.leaf.lanes, self.leaf.axis
    if axis is None:
      return x, [lanes]
    shape = (*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    if isinstance(x, jax.ShapeDtypeStruct):
      shape = [x.shape[axis] // groups if n == -1 else n for n in shape]
      x = jax.ShapeDtypeStruct(shape, x.dtype)
    else:
      x = x.reshape(shape)
    if lanes is None:
      return x, [axis]
    return x, [lanes + (lanes > axis), axis]


def _each(fn, *arrays: jax.Array) -> jax.Array:
  """fn of every worker's, stacked: one by one, so that tables may be static."""
  return jnp.stack([fn(*x) for x in zip(*arrays)])
