"""A sharded update, its communication included, beside micro-batches.

One exchange: pending gradient sums are reduce-scattered, each worker turns its
pieces of the sum into new parameters, and these are all-gathered. Nothing of it
depends on the micro-batches that run meanwhile, so both can go on at once. For
XLA to see to it the exchange is cut into slices: a scan over micro-batches
carries one slice of the reduce-scatter an iteration, then comes the update,
then another scan carries one slice of the all-gather an iteration. What a slice
brings is stored in the NEXT iteration, so that its start is scheduled before
all the compute of its own iteration, and its done after.

Letters in shapes: N workers, S slices, R rows of a buffer, C its lanes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import layout as jax_layout

from distrain_jax import compile_options, gradients
from distrain_jax.gradients import at_least_float32
from distrain_jax.layout import LANES, TILES, Layout
from distrain_jax.method import Params

Buffers = dict[str, jax.Array]

# How gradient sums reach the worker that updates them. all_to_all: every worker
# sends each other one its part as it is, and the receiver adds them up in
# float32; as many bytes, but not through a ring, so links between distant
# workers carry more.
REDUCTIONS = ("reduce_scatter", "all_to_all")
# Where a reduce-scatter cannot run beside compute: v5e makes it synchronous,
# v5p an all-reduce.
NO_ASYNC_SCATTER = ("v5e", "v5p")


class Exchange(NamedTuple):
  """How the workers exchange."""

  layout: Layout
  axis: str
  slices: int  # S; 0: not cut, for fewer than two micro-batches
  wire_dtype: Any  # in which the gradient sums travel; None: their own
  reduction: str | None  # of REDUCTIONS; None: the chip's


class _Leg(NamedTuple):
  """One of an exchange's two collectives."""

  talk: Callable[[jax.Array], jax.Array]  # the collective, on a slice
  land: Callable[[jax.Array], jax.Array]  # what is stored of its result
  rows_in: int  # axis of the rows R in what is sent
  rows_out: int  # and in what is stored


def beside(
  exchange: Exchange,
  work: Callable[[Any, jax.Array], Any],
  carry: Any,
  trips: int | jax.Array,
  sent: Buffers,
  turn: Callable[[Params], tuple[Params, Any]],
  wire: Any,
) -> tuple[Any, Params, Any]:
  """Runs micro-batches 0, 1, ... with an exchange beside the first 2 S.

  Args:
    exchange: how.
    work: `(carry, i) -> carry`, micro-batch i.
    carry: what it starts from.
    trips: how many micro-batches, at least 2 S; may differ by worker.
    sent: this worker's gradient sums, to be summed over the workers: `packed`.
    turn: `(pieces of the sum, float32) -> (pieces, out)`: the update.
    wire: how its pieces travel back: `wires.Plain` or `wires.Quantised`.

  Returns:
    `(carry, the whole tree of the gathered pieces, out)`.
  """
  slices = exchange.slices
  scatter, gather = _scatter(exchange), _gather(exchange.axis)
  carry, got = _with_slices(scatter, slices, work, carry, 0, sent, {})
  pieces, out = turn(_unpacked(exchange, got))
  send = wire.encode(exchange.layout, pieces, max(slices, 1))
  # Gradients that have been sent are of no more use: parameters take their
  # place, so that one buffer serves both collectives.
  carry, got = _with_slices(gather, slices, work, carry, slices, send, sent)
  if not isinstance(trips, int) or trips > 2 * slices:
    run = lambda i, carry: work(carry, i)
    carry = jax.lax.fori_loop(2 * slices, trips, run, carry)
  return carry, wire.decode(exchange.layout, got), out


def scatter_sums(exchange: Exchange, sums: Params) -> Params:
  """The pieces of the workers' sum, float32, with nothing beside it."""
  leg = _scatter(exchange)
  send = packed(exchange, sums)
  return _unpacked(
    exchange, {k: leg.land(leg.talk(x)) for k, x in send.items()}
  )


def gather_pieces(exchange: Exchange, pieces: Params) -> Params:
  """The whole tree from every worker's pieces, with nothing beside it."""
  return exchange.layout.all_gather(pieces, exchange.axis)


def packed(exchange: Exchange, sums: Params) -> Buffers:
  """Gradient sums as they travel: {name: (N, R, C)}, in the wire's dtype."""
  dtypes = _wire_dtypes(exchange)
  rows = [x.astype(d) for x, d in zip(exchange.layout.rows(sums), dtypes)]
  return exchange.layout.pack(rows, max(exchange.slices, 1))


def _unpacked(exchange: Exchange, got: Buffers) -> Params:
  layout = exchange.layout
  rows = layout.unpack(got, _wire_dtypes(exchange))
  return layout.as_pieces(at_least_float32(x) for x in rows)


def _wire_dtypes(exchange: Exchange) -> list[Any]:
  return [exchange.wire_dtype or dtype for dtype in exchange.layout.dtypes]


def _with_slices(leg: _Leg, slices: int, work, carry, first, send, over):
  """`slices` micro-batches from `first` on, with what is sent cut alike.

  Args:
    leg, slices, work, carry: see `beside`.
    first: micro-batch.
    send: {name: array} to be sent.
    over: {name: array} to be written over, where it has the right shape.

  Returns:
    `(carry, {name: what has landed})`.
  """
  is_cut = lambda x: slices and x.shape[leg.rows_in] >= slices
  cut = {k: x for k, x in send.items() if is_cut(x)}
  got = {k: leg.land(leg.talk(x)) for k, x in send.items() if k not in cut}
  if not slices:
    return carry, got

  def message(i):
    parts = {k: _take(x, i, slices, leg.rows_in) for k, x in cut.items()}
    return _joined(parts)

  def talk(messages):
    return {d: leg.talk(x) for d, x in messages.items()}

  def put(stores, news, i):
    landed = {d: leg.land(x) for d, x in news.items()}
    parts = _parted(landed, stores, slices, leg.rows_out, cut)
    return {k: _put(x, parts[k], i, leg.rows_out) for k, x in stores.items()}

  def body(c, i):
    carry, stores, before = c
    stores = _row_major(put(stores, before, jnp.maximum(i - 1, 0)))
    # Not before the last slice is stored: this one can then take its memory.
    stores, sent = jax.lax.optimization_barrier((stores, message(i)))
    return (work(carry, first + i), stores, talk(sent)), None

  # Zeros are for the types' sake; those that matter are written over.
  after = next(iter(send.values())).ravel()[0] if send else None
  late = lambda fn: gradients.late_zeros(jax.eval_shape(fn), after)
  stores = late(lambda: {k: leg.land(leg.talk(x)) for k, x in cut.items()})
  for k, x in stores.items():
    if k in over and (over[k].shape, over[k].dtype) == (x.shape, x.dtype):
      stores[k] = over[k]
  before = late(lambda: talk(message(0)))
  (carry, stores, last), _ = jax.lax.scan(
    body, (carry, stores, before), jnp.arange(slices)
  )
  return carry, got | put(stores, last, slices - 1)


def _row_major(tree: Buffers) -> Buffers:
  """In the layout of the arrays that they come from and become.

  A TPU's compiler would put the sliced axis first, and copy all that is sent
  into that layout and back: 1 byte a parameter more.
  """
  order = lambda x: jax_layout.Layout(tuple(range(x.ndim)))
  as_it_is = lambda x: jax_layout.with_layout_constraint(x, order(x))
  return jax.tree.map(as_it_is, tree)


def _joined(parts: Buffers) -> Buffers:
  """(..., r, C) arrays below one another, one array a dtype: {dtype: (..., R, L)}.

  One collective for all leaves: several would share one window of compute, and
  some chips run no more than one of a kind at once.
  """
  groups: dict[str, list[jax.Array]] = {}
  for k in sorted(parts):  # dicts that have been through JAX are sorted
    groups.setdefault(str(parts[k].dtype), []).append(parts[k])
  return {d: _below_one_another(xs) for d, xs in groups.items()}


def _below_one_another(xs: list[jax.Array]) -> jax.Array:
  if len(xs) == 1:
    return xs[0]
  lanes = math.gcd(LANES, *(x.shape[-2] * x.shape[-1] for x in xs))
  rows = [x.reshape(*x.shape[:-2], -1, lanes) for x in xs]
  missing = -sum(x.shape[-2] for x in rows) % TILES[0]
  if missing:
    shape = (*rows[0].shape[:-2], missing, lanes)
    rows.append(jnp.zeros(shape, rows[0].dtype))
  return jnp.concatenate(rows, -2)


def _parted(messages: Buffers, stores, slices: int, axis: int, sent) -> Buffers:
  """Undoes `_joined`: {name: its part in the shape of a slice of its store}."""
  flat = {d: x.reshape(*x.shape[:-2], -1) for d, x in messages.items()}
  start = dict.fromkeys(flat, 0)
  parts = {}
  for k in sorted(stores):
    shape = list(stores[k].shape)
    shape[axis] = _rows(shape[axis], slices)
    d, size = str(sent[k].dtype), shape[-2] * shape[-1]
    part = flat[d][..., start[d] : start[d] + size]
    parts[k] = part.reshape(shape)
    start[d] += size
  return parts


def _rows(rows: int, slices: int) -> int:
  """Of a slice: whole tiles, where the buffer has them."""
  tile = TILES[0] if rows % TILES[0] == 0 else 1
  return -(-rows // (tile * slices)) * tile


def _take(x: jax.Array, i, slices: int, axis: int) -> jax.Array:
  """Slice i. The last one begins earlier where the rows do not divide.

  Some rows then travel twice, with the same values.
  """
  size = _rows(x.shape[axis], slices)
  at = jnp.minimum(i * size, x.shape[axis] - size)
  return jax.lax.dynamic_slice_in_dim(x, at, size, axis)


def _put(store: jax.Array, new: jax.Array, i, axis: int) -> jax.Array:
  size = new.shape[axis]
  at = jnp.minimum(i * size, store.shape[axis] - size)
  return jax.lax.dynamic_update_slice_in_dim(store, new, at, axis)


def _scatter(exchange: Exchange) -> _Leg:
  """(N, R, C) in the wire's dtype -> (R, C), in that in which it was summed."""
  axis = exchange.axis
  if (exchange.reduction or _best_reduction()) == "all_to_all":
    talk = lambda x: jax.lax.all_to_all(x, axis, 0, 0)
    return _Leg(talk, lambda x: at_least_float32(x).sum(0), 1, 0)
  talk = lambda x: jax.lax.psum_scatter(x, axis, scatter_dimension=0)
  return _Leg(talk, lambda x: x, 1, 0)


def _gather(axis: str) -> _Leg:
  """(R, C) -> (N, R, C)."""
  return _Leg(lambda x: jax.lax.all_gather(x, axis), lambda x: x, 0, 1)


def _best_reduction() -> str:
  device = jax.sharding.get_abstract_mesh().abstract_device
  chip = device and compile_options.KINDS.get(device.device_kind)
  return "all_to_all" if chip in NO_ASYNC_SCATTER else "reduce_scatter"
