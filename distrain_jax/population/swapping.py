"""Exchanges of chosen coordinates: shuffled, or averaged.

Every function is a member's own, under a named axis, and is given trees that
are exchanged alike: parameters, and moments that follow them.

Letters in shapes: N members, K chosen coordinates of each tree, c = K/N.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.gradients import at_least_float32
from distrain_jax.population import coordinates, selection

# TPUs lay N values side by side out as 128: of so many rows at a time.
_CHUNK = 8192
Axes = str | tuple[str, str]
# (values (K,), first (K/N,), key) -> what takes their place, (K,). Coordinate
# gN + i belongs to part (first[g] + i) % N; the key is shared.
Exchange = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def exchange_chosen(
  trees: Sequence[Any],
  rates: Sequence[np.ndarray],
  key: jax.Array,
  exchange: Exchange,
  axes: Axes,
) -> list[Any]:
  """Exchanges the same few coordinates of each tree, as one message a dtype.

  Args:
    trees: each of the same structure and shapes.
    rates: of each leaf, see `rates.layer_rates`.
    key: shared by all members.
    exchange: what becomes of the values; K is a multiple of N.
    axes: the members'.
  """
  shapes = [x.shape for x in jax.tree.leaves(trees[0])]
  plan = selection.make_plan(shapes, rates, jax.lax.axis_size(axes))
  if not plan.count:
    return list(trees)
  update = functools.partial(_exchange, plan, key, exchange)
  return coordinates.in_place(update, list(trees))


def _exchange(plan, key, exchange, trees, most) -> list[Any]:
  """As `exchange_chosen`; `most` as of `coordinates.take`."""
  flat = [jax.tree.flatten(tree) for tree in trees]
  choice_key, part_key, route_key = jax.random.split(key, 3)
  chosen = selection.choose(plan, choice_key)
  taken = [coordinates.take(plan, chosen, x, most) for x, _ in flat]  # (k,)s
  # Of a coordinate, not of a value: its moments belong to the same part.
  n = plan.members
  first = jax.random.randint(part_key, (plan.count // n,), 0, n)
  ends = np.cumsum([piece.count // n for piece in plan.pieces])[:-1]
  first = jnp.split(first, ends)
  given = _by_dtype(taken, first, lambda *x: exchange(*x, route_key))
  if chosen.moved is not None:
    given = _keep_some(plan, chosen.moved, taken, given)
  return [
    treedef.unflatten(coordinates.put(plan, chosen, leaves, values, most))
    for (leaves, treedef), values in zip(flat, given)
  ]


def shuffle_parts(
  values: jax.Array, first: jax.Array, key: jax.Array, axes: Axes
) -> jax.Array:
  """Permutes each part of K/N coordinates among the members, differently.

  Part b of member n goes to member dest(b, n) = tau[(sigma[n] + rho[b]) % N],
  with random permutations tau, sigma and rho that all members share: a random
  Latin square. Each part's permutation is uniform on all N! of them; and each
  member sends one part to each, the least that can travel.

  Of N coordinates in a row each belongs to another part, from a random one
  on. So two that lie further apart share a part with chance 1/N: the expected
  product of their deviations from the mean becomes 0, as by independent
  permutations.

  Args:
    values, first, key: see `Exchange`.
    axes: the members'.
  """
  n, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  tau, sigma, rho = (permutation(k, n) for k in jax.random.split(key, 3))
  where_tau, where_rho, where_sigma = map(inverse, (tau, rho, sigma))
  parts = _by_part(values, first, n)  # (N, c)
  # Row d of what is sent: the part b with dest(b, me) = d.
  sent = parts[where_rho[(where_tau - sigma[me]) % n]]
  got = all_to_all(sent, axes)  # by sender
  # Part b comes from the member s with dest(b, s) = me.
  parts = got[where_sigma[(where_tau[me] - rho) % n]]
  return _by_place(parts, first)


def _by_part(values: jax.Array, first: jax.Array, n: int) -> jax.Array:
  """(K,) of which N in a row belong to N parts, from `first` on -> (N, c)."""

  def sort(values, first):
    slot = (jnp.arange(n)[None] - first[:, None]) % n  # where a part's is
    return jnp.take_along_axis(values.reshape(-1, n), slot, 1).T

  def by_chunks(values, first):
    whole = first.size // _CHUNK * _CHUNK
    chunks = values[: whole * n].reshape(-1, _CHUNK * n)
    chunks = chunks, first[:whole].reshape(-1, _CHUNK)
    # As rows: of (-1, N, _CHUNK) the compiler would again make N the last axis.
    many = jax.lax.map(lambda chunk: sort(*chunk).ravel(), chunks)
    many = many.reshape(-1, n, _CHUNK).swapaxes(0, 1).reshape(n, -1)
    rest = sort(values[whole * n :], first[whole:])
    return jnp.concatenate([many, rest], 1)

  return _chunked_on_tpus(sort, by_chunks, values, first)


def _by_place(parts: jax.Array, first: jax.Array) -> jax.Array:
  """Undoes `_by_part`: (N, c) -> (K,)."""
  n = parts.shape[0]

  def sort(parts, first):
    part = (jnp.arange(n)[None] + first[:, None]) % n  # whose a place is
    return jnp.take_along_axis(parts.T, part, 1).reshape(-1)

  def by_chunks(parts, first):
    whole = first.size // _CHUNK * _CHUNK
    chunks = parts[:, :whole].reshape(n, -1, _CHUNK).swapaxes(0, 1)
    chunks = chunks, first[:whole].reshape(-1, _CHUNK)
    many = jax.lax.map(lambda chunk: sort(*chunk), chunks)
    rest = sort(parts[:, whole:], first[whole:])
    return jnp.concatenate([many.ravel(), rest])

  return _chunked_on_tpus(sort, by_chunks, parts, first)


def _chunked_on_tpus(sort, by_chunks, x: jax.Array, first: jax.Array):
  if first.size <= _CHUNK:
    return sort(x, first)
  return jax.lax.platform_dependent(x, first, tpu=by_chunks, default=sort)


def average_parts(
  values: jax.Array, first: jax.Array, key: jax.Array, axes: Axes
) -> jax.Array:
  """The members' mean of each coordinate, summed in float32 or wider."""
  del first, key
  mean = jax.lax.pmean(at_least_float32(values), axes)
  return mean.astype(values.dtype)


def shuffle_independently(
  trees: Sequence[Any], rates: Sequence[np.ndarray], key, axes: Axes
) -> list[Any]:
  """Each coordinate with its layer's probability, by a permutation of its own.

  What WASH's paper states, word for word: a reference that gathers everything
  everywhere. Arguments as of `exchange_chosen`.
  """
  n, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  flat = [jax.tree.flatten(tree) for tree in trees]

  def one(number, rate, *alike):
    coin_key, order_key = jax.random.split(jax.random.fold_in(key, number))
    shape = alike[0].shape
    rate = jnp.asarray(rate, jnp.float32)
    rate = rate.reshape(rate.shape + (1,) * (len(shape) - rate.ndim))
    coin = jax.random.uniform(coin_key, shape) < rate
    order = jax.random.uniform(order_key, (n, *shape)).argsort(0)
    source = order[me]  # (shape): from whom
    pick = lambda x: jnp.take_along_axis(gather(x, axes), source[None], 0)[0]
    return [jnp.where(coin, pick(x), x) for x in alike]

  moved = [
    one(i, rate, *alike) if np.max(rate, initial=0) > 0 else list(alike)
    for i, (rate, *alike) in enumerate(
      zip(rates, *(leaves for leaves, _ in flat))
    )
  ]
  columns = zip(*moved) if moved else [[] for _ in flat]
  return [
    treedef.unflatten(list(leaves))
    for (_, treedef), leaves in zip(flat, columns)
  ]


def permutation(key: jax.Array, n: int) -> jax.Array:
  """(n,) int32, uniformly random, by ranks: n is small, and sorts are slow."""
  x = jax.random.bits(key, (n,))
  i = jnp.arange(n)
  # Equal words would give equal ranks, so places decide between them.
  later = i[:, None] > i[None]
  before = (x[:, None] > x[None]) | ((x[:, None] == x[None]) & later)
  return before.sum(1, dtype=jnp.int32)


def inverse(order: jax.Array) -> jax.Array:
  """(n,) int32: the inverse of a permutation."""
  n = order.shape[0]
  return jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))


def all_to_all(rows: jax.Array, axes: Axes) -> jax.Array:
  """(N, c) by receiver -> (N, c) by sender."""
  if isinstance(axes, str):
    return jax.lax.all_to_all(rows, axes, 0, 0)
  outer, inner = axes
  devices, own = jax.lax.axis_size(outer), jax.lax.axis_size(inner)
  # What the members of one device send, (their senders, receivers, c), is one
  # message from device to device.
  here = jax.lax.all_gather(rows, inner)
  here = here.reshape(own, devices, own, -1).swapaxes(0, 1)
  got = jax.lax.all_to_all(here, outer, 0, 0)  # (devices, senders, mine, c)
  return got[:, :, jax.lax.axis_index(inner)].reshape(rows.shape)


def gather(x: jax.Array, axes: Axes) -> jax.Array:
  """(N, ...): every member's, in order."""
  if isinstance(axes, str):
    return jax.lax.all_gather(x, axes)
  outer, inner = axes
  every = jax.lax.all_gather(jax.lax.all_gather(x, inner), outer)
  return every.reshape(-1, *x.shape)


def _by_dtype(taken, first, exchange) -> list[list[jax.Array]]:
  """Exchanges all values of one dtype together.

  `taken`: of each tree, of each piece; `first`: of each piece.
  """
  parts = [x for values in taken for x in values]
  first = first * len(taken)
  out: list[Any] = [None] * len(parts)
  for dtype in sorted({x.dtype for x in parts}, key=str):
    mine = [i for i, x in enumerate(parts) if x.dtype == dtype]
    together = lambda xs, mine=mine: jnp.concatenate([xs[i] for i in mine])
    new = exchange(together(parts), together(first))
    ends = np.cumsum([parts[i].size for i in mine])[:-1]
    for i, piece in zip(mine, jnp.split(new, ends)):
      out[i] = piece
  rest = iter(out)
  return [[next(rest) for _ in values] for values in taken]


def _keep_some(plan, moved, taken, given) -> list[list[jax.Array]]:
  ends = np.cumsum([piece.count for piece in plan.pieces])[:-1]
  moved = jnp.split(moved, ends)
  choose = lambda m, new, old: jnp.where(m, new, old)
  return [list(map(choose, moved, new, old)) for new, old in zip(given, taken)]
