"""The learned rule's network as a Pallas kernel for GPUs, by Mosaic.

As `kernel` for TPUs: only the arrays that a step reads and the one that it
writes travel to and from memory. A block of 128 threads takes 4 rows, one after
another, of up to 512 columns, of which a thread has up to 4. A hidden unit of
the first layer is made, told to all units of the second, and forgotten, so that
a thread's registers hold the inputs and the second layer's sums of its
elements, and a weight is loaded once for all of them.

Products are sums in float32 whatever `precision` says, which is never less than
it asks for: tensor cores, which round their inputs, are not used. Per element
that is 1600 multiply-adds, in about 2200 instructions, which an H100 could issue
in 67 ps; an update of a large matrix, sizes of features included, took it 170
(launch/bench_optimizer.py). Hopper and later.

Mosaic, since JAX deprecates Pallas' other way to GPUs, Triton (0.11,
https://docs.jax.dev/en/latest/pallas/CHANGELOG.html). Letters in shapes: r
rows, c columns, l those of a block, h hidden units.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from distrain_jax.learned.tiles import Folded, Inputs

ROWS, THREADS = 4, 128  # of a block
MOST = 4  # columns of a thread: more would not fit into its registers
OLDEST = 9  # compute capability, of Hopper


def fits(shape: tuple[int, ...]) -> bool:
  """Whether a parameter is a matrix of a block or more.

  >>> fits((4, 128)), fits((128,)), fits((3, 3, 64, 256)), fits((64, 10))
  (True, False, False, False)
  """
  return len(shape) == 2 and shape[0] >= ROWS and shape[1] >= THREADS


def supported() -> bool:
  """False if this process has GPUs and they are older than Hopper."""
  capability = getattr(jax.devices()[0], "compute_capability", "")
  major = str(capability).partition(".")[0]
  return not major.isdigit() or int(major) >= OLDEST


def choose_width(c: int) -> int:
  """Columns of a block, l: wide ones work best, overlapping ones work twice.

  >>> [choose_width(c) for c in (128, 250, 512, 640, 1000)]
  [128, 128, 512, 384, 512]
  """

  def cost(each):
    # A unit of the first layer: 48 multiply-adds an element, and about 30
    # instructions however many elements a thread has.
    return pl.cdiv(c, each * THREADS) * (48 * each + 30)

  most = min(MOST, c // THREADS)
  return THREADS * min(range(most, 0, -1), key=cost)


class Given(NamedTuple):
  """What the kernel reads, float32, in the order in which it is read."""

  grad: jax.Array  # (r, c)
  param: jax.Array  # (r, c)
  v: jax.Array  # (r, c)
  m: jax.Array  # (3, r, c)
  row_scale: jax.Array  # (r, 3), the preconditioner's factor of a row
  col_scale: jax.Array  # (3, c), and of a column
  b1: jax.Array  # (h, l), the same in all columns: what sums begin with
  first: jax.Array  # (h, 16), to a unit of the first layer from the inputs
  col_hidden: jax.Array  # (h, c), what a column adds to a unit
  row_hidden: jax.Array  # (r, h), and what a row adds, with b0
  second: jax.Array  # (h, h), from a unit of the first layer to the second
  last: jax.Array  # (2, h)
  b2: jax.Array  # (2,)


def prepare(net: Folded, x: Inputs, width: int) -> Given:
  """Rows and columns meet the network here, not once for each element.

  Args:
    net: the network, normalisers folded in.
    x: (k, r, c) each, or 1 in the place of r or c.
    width: l.
  """
  side = x.sides

  def hidden(kernel, few):
    few = jnp.concatenate([few, jax.lax.rsqrt(few + 1e-8)])
    return jnp.matmul(kernel, few.reshape(6, -1), precision="highest")

  said = hidden(net.row, side.row), hidden(net.col, side.col)
  scales = side.grad_row, side.grad_col
  if side.row.shape[1] == 1:  # the larger axis is that of the rows
    said, scales = said[::-1], scales[::-1]
  rows, columns = (scale.reshape(3, -1) for scale in scales)
  return Given(
    grad=x.grad[0],
    param=x.param[0],
    v=x.v[0],
    m=x.m,
    row_scale=rows.T,
    col_scale=columns,
    b1=jnp.broadcast_to(net.b1[:, None], (net.b1.size, width)),
    first=net.element,
    col_hidden=said[1],
    row_hidden=said[0].T + net.b0[None],
    second=net.w1.T,
    last=net.w2,
    b2=net.b2,
  )


def _features(x: Given, row, columns, spread) -> list[jax.Array]:
  """The 16 of `tiles.element_features`, (l,) each, of one row."""
  grad, param, v = (spread(a[row, columns]) for a in (x.grad, x.param, x.v))
  m = [spread(x.m[i, row, columns]) for i in range(3)]
  scale = [
    x.row_scale[row, i] * spread(x.col_scale[i, columns]) for i in range(3)
  ]
  root = jax.lax.rsqrt(v + 1e-6)
  by_root = [a * root for a in m]
  by_scale = [grad * s for s in scale] + [a * s for a, s in zip(m, scale)]
  return [grad, param, *m, v, *by_root, root, *by_scale]


def _dot(weights, vectors):
  """Of as many numbers and vectors."""
  return functools.reduce(jnp.add, [w * x for w, x in zip(weights, vectors)])


def _row(x: Given, out, row, columns, exp_mult: float, spread) -> None:
  """The network on `columns` of one row."""
  h = x.last.shape[1]
  features = _features(x, row, columns, spread)

  def unit(k, sums):
    value = _dot([x.first[k, f] for f in range(16)], features)
    value += spread(x.col_hidden[k, columns]) + x.row_hidden[row, k]
    value = jnp.maximum(value, 0.0)
    return [s + x.second[k, u] * value for u, s in enumerate(sums)]

  start = [spread(x.b1[u, :]) for u in range(h)]
  sums = jax.lax.fori_loop(0, h, unit, start)
  sums = [jnp.maximum(s, 0.0) for s in sums]
  d, mag = (
    _dot([x.last[k, u] for u in range(h)], sums) + x.b2[k] for k in range(2)
  )
  out[row, columns] = d * jnp.exp(exp_mult * mag)


def _block(
  x: Given, out, block, *, width: int, exp_mult: float, spread: Callable
) -> None:
  """Blocks at the far edges overlap others, and write what those write."""
  r, c = out.shape
  across = pl.cdiv(c, width)
  top = jnp.minimum(block // across * ROWS, r - ROWS)
  columns = pl.ds(jnp.minimum(block % across * width, c - width), width)

  @pl.loop(0, ROWS)
  def _(k):
    _row(x, out, top + k, columns, exp_mult, spread)


@functools.partial(jax.jit, static_argnames=("exp_mult", "interpret"))
def network(
  net: Folded, x: Inputs, exp_mult: float, *, interpret: bool = False
) -> jax.Array:
  """As `tiles.network`, of a whole matrix (r, c) that `fits`.

  Args:
    net: the network, normalisers folded in.
    x: (k, r, c) each, or 1 in the place of r or c.
    exp_mult: of the second output.
    interpret: run as plain JAX, on any backend.
  """
  _, r, c = x.grad.shape
  width = choose_width(c)
  out = jax.ShapeDtypeStruct((r, c), jnp.float32)
  # A single axis of blocks, for the others end at 65535.
  grid = (pl.cdiv(r, ROWS) * pl.cdiv(c, width),)
  options = {"width": width, "exp_mult": exp_mult}

  def interpreted(*refs):
    *given, out = refs
    block = pl.program_id(0)
    _block(Given(*given), out, block, spread=lambda a: a, **options)

  def learned_rule(*refs):  # the kernel's name in a profile
    *given, out = refs
    block = jax.lax.axis_index("block")
    # One column of every 128 a thread. Others would be loaded two or four at
    # once, which where rows are of any length begin anywhere cannot be.
    layout = plgpu.Layout.WG_STRIDED((width,), 1)
    spread = lambda a: plgpu.layout_cast(a, layout)
    _block(Given(*given), out, block, spread=spread, **options)

  if interpret:
    call = pl.pallas_call(interpreted, out, grid=grid, interpret=True)
  else:
    call = plgpu.kernel(
      learned_rule, out_type=out, grid=grid, grid_names=("block",)
    )
  return call(*prepare(net, x, width))
