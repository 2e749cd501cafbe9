"""Messages between the holders of a cell: sums to its owner, values back.

With forward masking nothing dense is made in a step: for each distance on the
ring there is one message from every worker to the one that far away, with what
the sender holds and the receiver owns, and one back (see `routing` for uneven
ones). With cyclic windows of r of N groups that is r - 1 messages each way of
1/N of the parameters, so (r - 1)/(N - 1) of what an all-reduce sends. Sums are
taken in one order, by the owner alone: all holders get the same bits. A message
waits for the one before it: together they would take as much memory as what they
bring.

Letters in shapes: N workers, S places of a worker, O places that it owns, c
elements of a fragment, m messages' rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distrain_jax.gradients import at_least_float32
from distrain_jax.methods.sdp import routing
from distrain_jax.methods.sdp.assignments import Holding


class Shift(NamedTuple):
  """The messages from every worker w to receivers[w], and back."""

  receivers: tuple[int, ...]  # a permutation of the workers
  places: np.ndarray  # (N, m): the sender's places, S where there is none
  owned: np.ndarray  # (N, m): the receiver's owned places, O where none


class Plan(NamedTuple):
  """Of one holding, or of several draws of it.

  All tables have a row a role, which is a worker: with several draws all
  workers of the first, then all of the next.
  """

  places: int  # S: fragments that a worker has room for
  at: np.ndarray  # (N, S): the fragment at each place, `total` where none
  own: np.ndarray  # (N, O): the place of each owned fragment, S where none
  shifts: tuple[Shift, ...]
  holders: np.ndarray  # (N, O): of each owned fragment; 1 where none
  fragments: np.ndarray  # (N, O): its number among all, their count where none
  total: int  # fragments of all cells


def make_plan(holding: Holding, whole: bool = False, even: bool = True) -> Plan:
  """The messages for a holding.

  Args:
    holding: with owners of F fragments a cell.
    whole: whether the cells are not cut: the first fragment's owner has all.
    even: whether what some send and others do not, over one distance, may go
      with what those send over other ones; see `routing`.
  """
  owners = holding.owners[:, :1] if whole else holding.owners
  total, pieces = owners.size, owners.shape[1]
  n, s = holding.cells.shape[0], holding.cells.shape[1] * pieces
  at = holding.cells[:, :, None] * pieces + np.arange(pieces)
  at = np.minimum(at.reshape(n, s), total)
  owner = owners.reshape(-1)
  owned = [np.flatnonzero(owner == w) for w in range(n)]
  o = max(map(len, owned))
  fragments = _rows(owned, o, total)
  place_of = np.full((n, total + 1), s)
  np.put_along_axis(place_of, at, np.arange(s), axis=1)
  place_of[:, total] = s
  position = np.full(total + 1, o)
  for row in owned:
    position[row] = np.arange(len(row))
  sent = [
    [
      sorted({*at[w]} & {*owned[v].tolist()} if v != w else ())
      for v in range(n)
    ]
    for w in range(n)
  ]
  shifts = []
  for receivers, rows in routing.routes(sent, even).items():
    ids = _rows(rows, max(map(len, rows)), total)  # (N, m), of the sender
    places = np.take_along_axis(place_of, ids, axis=1)
    got = np.empty_like(ids)
    got[list(receivers)] = ids
    shifts.append(Shift(receivers, places, position[got]))
  count = holding.held.sum(0).repeat(pieces)
  return Plan(
    places=s,
    at=at,
    own=np.take_along_axis(place_of, fragments, axis=1),
    shifts=tuple(shifts),
    holders=np.append(count, 1)[fragments],
    fragments=fragments,
    total=total,
  )


def together(plans: list[Plan]) -> Plan:
  """Several draws of one family as one plan: tables below each other."""
  if len(plans) == 1:
    return plans[0]
  places = max(p.places for p in plans)
  owned = max(p.own.shape[1] for p in plans)
  total = plans[0].total

  def stack(tables, none, length):
    """Tables (N, k), whose own numbers for none are given beside them."""
    rows = []
    for table, mine in tables:
      pad = ((0, 0), (0, length - table.shape[1]))
      table = np.where(table == mine, none, table)
      rows.append(np.pad(table, pad, constant_values=none))
    return np.concatenate(rows)

  shifts = []
  for to in sorted({s.receivers for p in plans for s in p.shifts}):
    empty = np.zeros((len(plans[0].at), 0), int)
    found = [
      (p, next((s for s in p.shifts if s.receivers == to), None)) for p in plans
    ]
    m = max(s.places.shape[1] for _, s in found if s)
    sent = [(s.places if s else empty, p.places) for p, s in found]
    got = [(s.owned if s else empty, p.own.shape[1]) for p, s in found]
    shifts.append(Shift(to, stack(sent, places, m), stack(got, owned, m)))
  return Plan(
    places=places,
    at=stack([(p.at, total) for p in plans], total, places),
    own=stack([(p.own, p.places) for p in plans], places, owned),
    shifts=tuple(shifts),
    holders=stack([(p.holders, 1) for p in plans], 1, owned),
    fragments=stack([(p.fragments, total) for p in plans], total, owned),
    total=total,
  )


def to_owners(
  plan: Plan,
  x: jax.Array,
  role: jax.Array,
  axis: str,
  wire_dtype: DTypeLike | None = None,
) -> jax.Array:
  """Means over the holders, at the owners.

  Args:
    plan: of the array's family.
    x: (S, c), this worker's; in place of c several axes, here and below.
    role: this worker's row of the plan's tables.
    axis: the workers' axis.
    wire_dtype: in which the messages travel; None: x's dtype.

  Returns:
    (O, c), float32 or wider; 0 at places that own nothing.
  """
  wire = x.astype(wire_dtype or x.dtype)
  sums = at_least_float32(pick(wire, plan.own, role))
  for shift in plan.shifts:
    sent = pick(wire, shift.places, role)
    got = jax.lax.ppermute(sent, axis, [*enumerate(shift.receivers)])
    sums = _add(sums, got, shift.owned, role)
    wire, sums = jax.lax.optimization_barrier((wire, sums))
  counts = jnp.asarray(plan.holders, sums.dtype)[role]  # (O,)
  return sums / counts.reshape(-1, *[1] * (sums.ndim - 1))


def to_holders(
  plan: Plan, owned: jax.Array, role: jax.Array, axis: str
) -> jax.Array:
  """Owners' values (O, c) at all holders: (S, c), 0 at empty places."""
  got = [owned]
  for shift in plan.shifts:
    # The owner answers the sender.
    back = [(v, w) for w, v in enumerate(shift.receivers)]
    x = jax.lax.ppermute(pick(owned, shift.owned, role), axis, back)
    owned, x = jax.lax.optimization_barrier((owned, x))
    got.append(x)
  # Put in order at last: put into zeros one by one they would be in memory from
  # before the gradients on, because compilers share equal constants.
  tables = [plan.own, *(shift.places for shift in plan.shifts)]
  return pick(jnp.concatenate(got), _order(tables, plan.places), role)


def to_all(
  plan: Plan, owned: jax.Array, role: jax.Array, axis: str
) -> jax.Array:
  """Owners' values (O, c) at every worker: all fragments in order."""
  return in_order(plan, jax.lax.all_gather(owned, axis), role)


def in_order(plan: Plan, every: jax.Array, role: jax.Array) -> jax.Array:
  """All owners' values (N, O, c) -> all fragments in order (total, c).

  role: anyone's of this draw.
  """
  workers = len(every)
  draws = plan.fragments.reshape(-1, every.shape[0] * every.shape[1])
  order = np.empty((len(draws), plan.total + 1), int)
  np.put_along_axis(order, draws, np.arange(draws.shape[1])[None], axis=1)
  flat = every.reshape(-1, every.shape[-1])
  return pick(flat, order[:, : plan.total], role // workers)


def _rows(rows: list, length: int, fill: int) -> np.ndarray:
  out = np.full((len(rows), length), fill)
  for row, values in zip(out, rows):
    row[: len(values)] = list(values)
  return out


def _order(tables: list[np.ndarray], size: int) -> np.ndarray:
  """Numbers below size, (N, k) side by side -> where each is, (N, size)."""
  numbers = np.concatenate(tables, axis=1)
  n, k = numbers.shape
  found = np.full((n, size + 1), k)
  np.put_along_axis(found, numbers, np.arange(k)[None], axis=1)
  return found[:, :size]


def _same(table: np.ndarray) -> bool:
  return bool((table == table[0]).all())


def pick(x: jax.Array, table: np.ndarray, role: jax.Array) -> jax.Array:
  """x[table[role]], 0 beyond the end; static where all workers' rows agree."""
  if _same(table) and (table < x.shape[0]).all():
    return _static(x, table[0])
  return jnp.take(
    x, jnp.asarray(table)[role], axis=0, mode="fill", fill_value=0
  )


def _static(x: jax.Array, rows: np.ndarray) -> jax.Array:
  if len(rows) and (np.diff(rows) == 1).all():
    return jax.lax.slice_in_dim(x, int(rows[0]), int(rows[-1]) + 1)
  return x[rows]


def _add(x, values, table: np.ndarray, role) -> jax.Array:
  return x.at[_index(x, table, role)].add(values.astype(x.dtype), mode="drop")


def _index(x, table: np.ndarray, role):
  if _same(table) and (table < x.shape[0]).all():
    rows = table[0]
    if (np.diff(rows) == 1).all():
      return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
  return jnp.asarray(table)[role]
