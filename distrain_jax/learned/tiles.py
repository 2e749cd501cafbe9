"""The learned rule in 16 inputs an element, over one tile after another.

Equal to `rule`, to rounding. What need not be computed for each element is
not: normalisers are folded into the first kernel's rows; the time features,
the same for all, into its bias; and the 12 features that belong to a row or a
column reach the hidden layer from there. That leaves 16 of 39 inputs. Tiles
bound what is alive at once: hidden units of one tile, not of the parameter.

Letters in shapes: s a parameter's shape; b rows of a tile; k tiles; r what
follows the tiled axis; h hidden units; l lanes, the elements of a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.learned.moments import Moments, Sides, sides
from distrain_jax.learned.rule import time_features
from distrain_jax.learned.theta import Theta

# Elements of a tile. On a CPU some hundred kB of hidden units, which a cache
# holds; an accelerator is idle between tiles unless each is some work for it.
CPU_TILE, TILE = 4096, 2**20
# Rows of theta's first kernel, by what they read.
ELEMENT = (*range(13), 25, 26, 27)
ROW = (13, 14, 15, 19, 20, 21)
COL = (16, 17, 18, 22, 23, 24)
TIME = 28


class Folded(NamedTuple):
  """The network with normalisers and time folded in; kernels (out, in)."""

  element: jax.Array  # (h, 16)
  row: jax.Array  # (h, 6)
  col: jax.Array  # (h, 6)
  b0: jax.Array  # (h,)
  w1: jax.Array  # (h, h)
  b1: jax.Array  # (h,)
  w2: jax.Array  # (2, h)
  b2: jax.Array  # (2,)


class Inputs(NamedTuple):
  """Arrays that all broadcast to a parameter's shape s, or to (3, *s)."""

  grad: jax.Array  # (1, *s)
  param: jax.Array  # (1, *s)
  m: jax.Array  # (3, *s)
  v: jax.Array  # (1, *s)
  sides: Sides


def element_features(x: Inputs) -> jax.Array:
  """The 16 features of one element, (16, *s), not normalised."""
  root = jax.lax.rsqrt(x.v + 1e-6)
  side = x.sides
  grads = x.grad * side.grad_row * side.grad_col
  momenta = x.m * side.momentum_row * side.momentum_col
  parts = [x.grad, x.param, x.m, x.v, x.m * root, root, grads, momenta]
  return jnp.concatenate(parts)


def of_sides(x: jax.Array) -> jax.Array:
  """A row's or a column's 6 features of its 3 averages."""
  return jnp.concatenate([x, jax.lax.rsqrt(x + 1e-8)])  # (6, *s with ones)


def sum_squares(x: jax.Array) -> jax.Array:
  """Of each feature, over all but the first axis."""
  return jnp.sum(x * x, axis=tuple(range(1, x.ndim)))


def fold(
  theta: Theta,
  count: jax.Array,
  element: jax.Array,
  side: Sides,
  eps: float,
) -> Folded:
  """The network for one parameter at one step.

  Args:
    theta: the learned numbers.
    count: (), updates made before this one.
    element: (16,), the mean squares of the element's features.
    side: whose mean squares are taken here; each entry of a row or column
      stands for as many elements as any other.
    eps: under the root of the normaliser.
  """
  kernel = theta["w0"].astype(jnp.float32)

  def scaled(rows, mean_square):
    scale = jax.lax.rsqrt(eps + mean_square)
    return (kernel[np.asarray(rows)] * scale[:, None]).T

  mean = lambda x: sum_squares(of_sides(x)) / (x.size // 3)
  time = jnp.matmul(time_features(count), kernel[TIME:], precision="highest")
  return Folded(
    element=scaled(ELEMENT, element),
    row=scaled(ROW, mean(side.row)),
    col=scaled(COL, mean(side.col)),
    b0=theta["b0"] + time,
    w1=theta["w1"].T,
    b1=theta["b1"],
    w2=theta["w2"].T,
    b2=theta["b2"],
  )


def network(net: Folded, x: Inputs, exp_mult, precision) -> jax.Array:
  """d exp(exp_mult mag) of a tile, (*s)."""
  shape = x.grad.shape[1:]

  def dot(kernel, x):
    return jnp.matmul(kernel, x.reshape(x.shape[0], -1), precision=precision)

  def spread(kernel, side):
    few = of_sides(side)
    y = dot(kernel, few).reshape(-1, *few.shape[1:])
    return jnp.broadcast_to(y, (y.shape[0], *shape)).reshape(y.shape[0], -1)

  hidden = dot(net.element, element_features(x))  # (h, l)
  hidden += spread(net.row, x.sides.row) + spread(net.col, x.sides.col)
  hidden = jax.nn.relu(hidden + net.b0[:, None])
  hidden = jax.nn.relu(dot(net.w1, hidden) + net.b1[:, None])
  d, mag = dot(net.w2, hidden) + net.b2[:, None]
  return (d * jnp.exp(exp_mult * mag)).reshape(shape)


class Cut(NamedTuple):
  """Where a parameter is cut: k tiles of b rows, and what is left over.

  Tile j holds rows j, j + k, j + 2 k, ...: the parameter is seen as (b, k, r)
  and cut along k, which is in one piece on each device if the axis is sharded.
  """

  axis: int
  rows: int  # b
  count: int  # k

  @property
  def covered(self) -> int:
    return self.rows * self.count


def choose_cut(shape: tuple[int, ...], tile: int) -> Cut:
  """Tiles of about `tile` elements along the first axis that is long enough.

  >>> choose_cut((64, 64), 1024)
  Cut(axis=0, rows=16, count=4)
  >>> choose_cut((3, 3, 64, 64), 4096)
  Cut(axis=2, rows=4, count=16)
  """
  size = 1
  for length in shape:
    size *= length
  wanted = -(-size // tile)
  fits = [a for a, length in enumerate(shape) if length >= wanted]
  largest = max(range(len(shape)), key=lambda a: shape[a])
  axis = fits[0] if fits else largest
  rows = max(1, shape[axis] // wanted)
  # A divisor near by leaves nothing over, which would be a program of its own.
  for near in range(rows, max(rows // 2, 1) - 1, -1):
    if shape[axis] % near == 0:
      rows = near
      break
  return Cut(axis, rows, shape[axis] // rows)


def _along(take, long: Inputs, x: Inputs) -> Inputs:
  """`take(array)` on every array that is not broadcast along the cut."""
  return jax.tree.map(lambda cut, a: take(a) if cut else a, long, x)


def _split(cut: Cut, axis: int, a: jax.Array) -> jax.Array:
  """(.., n, ..) to (.., b, k, ..), without what is left over."""
  a = jax.lax.slice_in_dim(a, 0, cut.covered, axis=axis)
  shape = (*a.shape[:axis], cut.rows, cut.count, *a.shape[axis + 1 :])
  return a.reshape(shape)


class Parts(NamedTuple):
  """`Inputs` as tiles."""

  cut: Cut
  at: Callable[[Any], Inputs]  # number of a tile -> its inputs
  rest: Inputs | None  # rows that are left over


def cut_up(whole: Inputs, tile: int) -> Parts:
  """Tiles of about `tile` elements; a small parameter is its own rest."""
  shape = whole.grad.shape[1:]
  cut = choose_cut(shape, tile)
  if cut.count <= 1:
    return Parts(cut._replace(count=0), lambda j: whole, whole)
  axis = 1 + cut.axis  # after the decays
  long = jax.tree.map(lambda a: a.shape[axis] > 1, whole)
  split = _along(lambda a: _split(cut, axis, a), long, whole)

  def at(j) -> Inputs:
    index = jax.lax.dynamic_index_in_dim
    return _along(lambda a: index(a, j, axis + 1, False), long, split)

  rest = None
  if cut.covered < shape[cut.axis]:
    tail = lambda a: jax.lax.slice_in_dim(a, cut.covered, None, axis=axis)
    rest = _along(tail, long, whole)
  return Parts(cut, at, rest)


def inputs(grad: jax.Array, param: jax.Array, moments: Moments) -> Inputs:
  """Of a parameter of one axis or more, without stacked ones."""
  side = sides(moments.factors, grad.shape)
  return Inputs(grad[None], param[None], moments.m, moments.v[None], side)


def mean_squares(
  parts: Parts, size: int, features: Callable = element_features
) -> jax.Array:
  """Of the features of an element, (16,) for those here.

  Args:
    parts: of a parameter.
    size: its number of elements.
    features: `(inputs of a tile) -> (number of features, *s)`.
  """
  squares = lambda x: sum_squares(features(x))
  if parts.rest is not None:
    total = squares(parts.rest)
  else:
    like = jax.eval_shape(lambda: squares(parts.at(0)))
    total = jnp.zeros(like.shape, jnp.float32)
  if parts.cut.count:
    add = lambda j, total: total + squares(parts.at(j))
    total = jax.lax.fori_loop(0, parts.cut.count, add, total)
  return total / size


def over_tiles(
  parts: Parts, shape: tuple[int, ...], go: Callable[[Inputs], jax.Array]
) -> jax.Array:
  """What `go` makes of each tile, put together, `shape` and float32."""
  cut = parts.cut
  if not cut.count:
    return go(parts.rest)

  def put(j, out):
    y = go(parts.at(j))
    return jax.lax.dynamic_update_index_in_dim(out, y, j, cut.axis + 1)

  before, after = shape[: cut.axis], shape[cut.axis + 1 :]
  out = jnp.zeros((*before, cut.rows, cut.count, *after), jnp.float32)
  out = jax.lax.fori_loop(0, cut.count, put, out)
  out = out.reshape(*before, cut.covered, *after)
  if parts.rest is None:
    return out
  return jnp.concatenate([out, go(parts.rest)], cut.axis)


def sized(
  go: Callable[[int], Callable], tile: int | None, size: int, *args: Any
) -> jax.Array:
  """`go(tile)(*args)` of a parameter of `size` elements.

  A tile of None is `CPU_TILE` where the program is compiled for a CPU, `TILE`
  elsewhere.
  """
  if tile is None and size > CPU_TILE:
    return jax.lax.platform_dependent(*args, cpu=go(CPU_TILE), default=go(TILE))
  return go(tile or TILE)(*args)


def direction(
  theta: Theta,
  grad: jax.Array,
  param: jax.Array,
  moments: Moments,
  count: jax.Array,
  *,
  exp_mult: float,
  feature_eps: float,
  precision: str,
  tile: int | None = None,
) -> jax.Array:
  """As `rule.direction`, over tiles of about `tile` elements; see `sized`."""

  def by(tile):
    def run(theta, grad, param, moments, count):
      whole = inputs(grad, param, moments)
      parts = cut_up(whole, tile)
      sizes = mean_squares(parts, grad.size)
      net = fold(theta, count, sizes, whole.sides, feature_eps)
      go = lambda x: network(net, x, exp_mult, precision)
      return over_tiles(parts, grad.shape, go)

    return run

  return sized(by, tile, grad.size, theta, grad, param, moments, count)
