"""The network that sees elements: 30 numbers each, how far each one moves.

Those of muLO without the time, and two more: the gradient cut at 0.1, and over
the root of the second moment. Computed as in `tiles`: normalisers are folded
into the first kernel, what belongs to a row or a column is computed there, and
one tile after another.

Letters in shapes: s a tensor's shape, one axis or more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.learned import tiles
from distrain_jax.learned.moments import Moments, factored_axes, sides

# Rows of the first kernel, by what they read.
ELEMENT = (*range(15), 27, 28, 29)
ROW = (15, 16, 17, 21, 22, 23)
COL = (18, 19, 20, 24, 25, 26)


class Net(NamedTuple):
  """The network of one tensor, normalisers folded in; kernels (out, in)."""

  element: jax.Array  # (4, 18)
  row: jax.Array  # (4, 6)
  col: jax.Array  # (4, 6)
  b0: jax.Array  # (4,)
  w1: jax.Array  # (4, 4)
  b1: jax.Array  # (4,)
  w2: jax.Array  # (3, 4)
  b2: jax.Array  # (3,)


def inputs(grad: jax.Array, param: jax.Array, moments: Moments) -> tiles.Inputs:
  """Of one tensor; without a floor where nothing is factored, unlike muLO's."""
  side = sides(moments.factors, grad.shape)
  if factored_axes(grad.shape) is None:
    side = side._replace(momentum_row=jax.lax.rsqrt(side.row))
  return tiles.Inputs(grad[None], param[None], moments.m, moments.v[None], side)


def element_features(x: tiles.Inputs) -> jax.Array:
  """The 18 features of one element, (18, *s), not normalised."""
  root = jax.lax.rsqrt(x.v + 1e-6)
  side = x.sides
  return jnp.concatenate(
    [
      x.grad,
      jnp.clip(x.grad, -0.1, 0.1),
      x.param,
      x.m,
      x.v,
      x.m * root,
      root,
      x.grad * side.grad_row * side.grad_col,
      x.grad * root,
      x.m * side.momentum_row * side.momentum_col,
    ]
  )


def _fold(mixture, element, side, eps) -> Net:
  """`Net` from mean squares of the element's features and from the sides."""
  kernel = mixture["w0"]

  def scaled(rows, mean_square):
    scale = jax.lax.rsqrt(eps + mean_square)
    return (kernel[np.asarray(rows)] * scale[:, None]).T

  mean = lambda x: tiles.sum_squares(tiles.of_sides(x)) / (x.size // 3)
  return Net(
    element=scaled(ELEMENT, element),
    row=scaled(ROW, mean(side.row)),
    col=scaled(COL, mean(side.col)),
    b0=mixture["b0"],
    w1=mixture["w1"].T,
    b1=mixture["b1"],
    w2=mixture["w2"].T,
    b2=mixture["b2"],
  )


def _network(net: Net, x: tiles.Inputs, exp_mult, precision) -> jax.Array:
  """d exp(exp_mult mag) of a tile, (*s)."""
  shape = x.grad.shape[1:]

  def dot(kernel, x):
    y = jnp.matmul(kernel, x.reshape(x.shape[0], -1), precision=precision)
    return y.reshape(-1, *x.shape[1:])

  bias = lambda b: b.reshape(-1, *(1,) * len(shape))
  y = dot(net.element, element_features(x)) + bias(net.b0)
  # A row's or a column's share: (4, *s) with 1 where an axis was averaged.
  y += dot(net.row, tiles.of_sides(x.sides.row))
  y += dot(net.col, tiles.of_sides(x.sides.col))
  y = jax.nn.relu(dot(net.w1, jax.nn.relu(y)) + bias(net.b1))
  d, mag, _ = dot(net.w2, y) + bias(net.b2)
  return d * jnp.exp(exp_mult * mag)


def direction(
  mixture: dict[str, jax.Array],
  grad: jax.Array,
  param: jax.Array,
  moments: Moments,
  *,
  exp_mult: float,
  feature_eps: float,
  precision: str,
  tile: int | None = None,
) -> jax.Array:
  """d exp(exp_mult mag), the step before its scale and sign, (*s), float32.

  Args:
    mixture: of this tensor, see `hyper.mixtures`.
    grad: (*s), float32.
    param: (*s), float32.
    moments: after this gradient, float32.
    exp_mult: of the network's second output.
    feature_eps: under the root of the normaliser.
    precision: of the matrix products.
    tile: elements computed at once, about; see `tiles.sized`.
  """

  def by(tile):
    def run(mixture, grad, param, moments):
      whole = inputs(grad, param, moments)
      parts = tiles.cut_up(whole, tile)
      sizes = tiles.mean_squares(parts, grad.size, element_features)
      net = _fold(mixture, sizes, whole.sides, feature_eps)
      go = lambda x: _network(net, x, exp_mult, precision)
      return tiles.over_tiles(parts, grad.shape, go)

    return run

  return tiles.sized(by, tile, grad.size, mixture, grad, param, moments)
