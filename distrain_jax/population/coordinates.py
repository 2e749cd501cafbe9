"""Chosen coordinates: taken out of leaves, and put back, in place.

XLA for TPUs copies leaves here in two ways (see `_once`, and `_AT_ONCE`), which
cost ResNet-50 70 % of its parameters, and other models more, at a step's peak.
What takes and puts a few coordinates therefore goes by `in_place`, which tells
it there how many of them one operation may have. Compiled programs are all that
was seen of this: for 36 leaves of 4 MB on v5e, 140 MB of temporaries by jax
0.12, where there are 187 without.

Letters in shapes: k chosen coordinates of a leaf, or of a layer of it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.population.selection import Chosen, Piece, Plan

_INSIDE = "promise_in_bounds"  # indices are, so nothing need check
# Of more indices into one leaf, XLA for TPUs lays it out as a row first; all
# these rows live from when values are taken to when others are put.
_AT_ONCE = 1000
# With more parts than this, a loop over them: fewer operations, but XLA may copy
# the leaf once on entering it.
_PARTS = 16

# (trees, most coordinates of an operation or None) -> trees
Update = Callable[[Any, int | None], Any]


def in_place(update: Update, trees: Any) -> Any:
  """`update(trees, None)`, so that donated trees are not held twice.

  Args:
    update: keeps structure, shapes and dtypes.
    trees: arrays that the caller has no more use for.
  """
  return jax.lax.platform_dependent(
    trees,
    tpu=functools.partial(_once, update),
    default=lambda trees: update(trees, None),
  )


def _once(update: Update, trees: Any) -> Any:
  """By a loop that runs once, since the state of a loop stays where it is.

  Otherwise leaves are written to in fast memory, and what they were before is
  kept beside the donated arrays that are to hold what comes out.
  """
  # The compiler would take away a loop whose end it knows.
  end = jax.lax.optimization_barrier(jnp.ones((), jnp.int32))
  start = jnp.zeros((), jnp.int32), trees
  step = lambda state: (state[0] + 1, update(state[1], _AT_ONCE))
  return jax.lax.while_loop(lambda state: state[0] < end, step, start)[1]


def take(
  plan: Plan, chosen: Chosen, leaves: list[jax.Array], most: int | None = None
) -> list[jax.Array]:
  """The chosen values, (k,) of each piece and last of the pool."""
  out = []
  for x, pieces, where in zip(leaves, plan.leaves, chosen.where):
    if pieces:
      values = _get_by_parts(x, _index(x, pieces, where), most)
      ends = np.cumsum([at.size for at in where])[:-1]
      out += jnp.split(values, ends)
  if plan.pool:
    pool = _side_by_side(plan, leaves)
    out.append(_get(pool, chosen.pool))
  return out


def put(
  plan: Plan,
  chosen: Chosen,
  leaves: list[jax.Array],
  values: list[jax.Array],
  most: int | None = None,
) -> list[jax.Array]:
  """The leaves with values in the place of what was taken."""
  rest, out = iter(values), list(leaves)
  for i, (pieces, where) in enumerate(zip(plan.leaves, chosen.where)):
    if not pieces:
      continue
    new = jnp.concatenate([next(rest) for _ in pieces])
    index = _index(out[i], pieces, where)
    out[i] = _set_by_parts(out[i], index, new, most)
  if plan.pool:
    pool = _side_by_side(plan, leaves)
    pool = _set(pool, chosen.pool, next(rest))
    start = 0
    for i in plan.pooled:
      x = leaves[i]
      part = pool[start : start + x.size]
      out[i] = part.reshape(x.shape).astype(x.dtype)
      start += x.size
  return out


def _get(x: jax.Array, at) -> jax.Array:
  return x.at[at].get(mode=_INSIDE)


def _set(x: jax.Array, at, values: jax.Array) -> jax.Array:
  return x.at[at].set(values, mode=_INSIDE, unique_indices=True)


def _cut(x: jax.Array, most: int | None) -> tuple[Any, list[jax.Array]]:
  """(k,) in parts: (n, most) for a loop, or None; and a list of the rest."""
  if most is None or x.size <= most:
    return None, [x]
  whole = x.size // most * most if x.size > most * _PARTS else 0
  rest = [x[i : i + most] for i in range(whole, x.size, most)]
  return x[:whole].reshape(-1, most) if whole else None, rest


def _get_by_parts(
  x: jax.Array, at: list[jax.Array], most: int | None
) -> jax.Array:
  """`_get`, of at most so many at a time; `at` has an index for each axis."""
  many, few = zip(*(_cut(axis, most) for axis in at))
  found = [_get(x, part) for part in zip(*few)]
  if many[0] is not None:
    found.insert(0, jax.lax.map(lambda part: _get(x, part), many).ravel())
  return jnp.concatenate(found)


def _set_by_parts(
  x: jax.Array, at: list[jax.Array], values: jax.Array, most: int | None
) -> jax.Array:
  """`_set`, as `_get_by_parts`."""
  many, few = zip(*(_cut(a, most) for a in (*at, values)))
  if many[0] is not None:
    body = lambda i, x: _set(x, tuple(a[i] for a in many[:-1]), many[-1][i])
    x = jax.lax.fori_loop(0, len(many[0]), body, x)
  for *part, some in zip(*few):
    x = _set(x, tuple(part), some)
  return x


def _index(
  x: jax.Array, pieces: tuple[Piece, ...], where: list[jax.Array]
) -> list[jax.Array]:
  """Of all pieces, for each axis: a flat view of a large array could be a copy.

  All pieces together, so that a leaf is read in the same way as it is written
  to: otherwise XLA for TPUs lays it out anew in between.
  """
  found = []
  for piece, at in zip(pieces, where):
    if piece.layer is None:
      found.append(jnp.unravel_index(at, x.shape))
    else:
      first = jnp.full_like(at, piece.layer)
      found.append((first, *jnp.unravel_index(at, x.shape[1:])))
  return [jnp.concatenate(axis) for axis in zip(*found)]


def _side_by_side(plan: Plan, leaves: list[jax.Array]) -> jax.Array:
  """The small leaves as one vector, in a dtype that holds all of them."""
  small = [leaves[i].ravel() for i in plan.pooled]
  dtype = jnp.result_type(*small)
  return jnp.concatenate([x.astype(dtype) for x in small])
