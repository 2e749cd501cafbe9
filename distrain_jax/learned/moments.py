"""The averages that the learned rule looks at, for one parameter.

Three momenta, a second moment, and three factored second moments as in
Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235), without
bias correction. The axis of the decays leads, so that the others keep the
layout of the parameter.

Letters in shapes: s a parameter's shape without its leading stacked axes,
n those axes (layers of a scanned model), which every statistic keeps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Moments(NamedTuple):
  """Of one parameter of shape (*n, *s)."""

  m: jax.Array  # (3, *n, *s)
  v: jax.Array  # (*n, *s)
  # Two axes or more: (3, *n, *s) without the largest axis of s, and without
  # the second largest. Else: one array (3, *n, *s), nothing factored.
  factors: tuple[jax.Array, ...]


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
  """The second largest and the largest axis; None below two axes.

  Of equals the later one counts as larger.

  >>> factored_axes((3, 3, 8, 4)), factored_axes((6, 6)), factored_axes((7,))
  ((3, 2), (0, 1), None)
  """
  if len(shape) < 2:
    return None
  order = np.argsort(shape, kind="stable")
  return int(order[-2]), int(order[-1])


def init_moments(x: Any, stacked: int, dtype: Any) -> Moments:
  """Zeros for a parameter (or its shape), of which `stacked` axes are layers."""
  shape = tuple(x.shape)
  zeros = lambda *shape: jnp.zeros(shape, dtype)
  axes = factored_axes(shape[stacked:])
  if axes is None:
    factors = (zeros(3, *shape),)
  else:
    factors = tuple(zeros(3, *_without(shape, stacked + a)) for a in axes[::-1])
  return Moments(zeros(3, *shape), zeros(*shape), factors)


def _without(shape, axis):
  return shape[:axis] + shape[axis + 1 :]


def _average(rate, old, new):
  """rate old + (1 - rate) new, for each rate of the leading axis of old."""
  rate = rate.reshape(-1, *(1,) * new.ndim)
  old = old.astype(jnp.float32)
  return rate * old + (1 - rate) * new[None]


def next_moments(
  rates: tuple[jax.Array, jax.Array, jax.Array],
  old: Moments,
  grad: jax.Array,
  stacked: int,
) -> Moments:
  """The averages after one gradient.

  Args:
    rates: as `decay_rates` gives them.
    old: before; of any floating dtype.
    grad: (*n, *s), float32.
    stacked: how many axes n has.

  Returns:
    Moments of float32.
  """
  momentum, second, factored = rates
  square = grad * grad
  axes = factored_axes(grad.shape[stacked:])
  m = _average(momentum, old.m, grad)
  v = _average(second, old.v[None], square)[0]
  square = square + 1e-30
  if axes is None:
    return Moments(m, v, (_average(factored, old.factors[0], square),))
  factors = tuple(
    _average(factored, f, square.mean(stacked + axis))
    for f, axis in zip(old.factors, axes[::-1])
  )
  return Moments(m, v, factors)


class Sides(NamedTuple):
  """The factored moments as they meet an element, float32.

  Each is (3, *s) with 1 where an axis of s was averaged away. An element's
  adafactor preconditioner of gradients is grad_row * grad_col, of momenta
  momentum_row * momentum_col.
  """

  row: jax.Array
  col: jax.Array
  grad_row: jax.Array
  grad_col: jax.Array
  momentum_row: jax.Array
  momentum_col: jax.Array


def sides(factors: tuple[jax.Array, ...], shape: tuple[int, ...]) -> Sides:
  """`Sides` of one layer.

  Args:
    factors: `Moments.factors` of a parameter without stacked axes.
    shape: of the parameter, one axis or more.
  """
  root = lambda x: jax.lax.rsqrt(jnp.maximum(x, 1e-9))
  axes = factored_axes(shape)
  if axes is None:
    (f,) = factors
    one = jnp.ones((3,) + (1,) * len(shape), jnp.float32)
    momentum = jax.lax.rsqrt(f + 1e-6)
    return Sides(f, f, root(f + 1e-9), one, momentum, one)
  smaller, larger = axes
  row = jnp.expand_dims(factors[0], 1 + larger)
  col = jnp.expand_dims(factors[1], 1 + smaller)
  mean = row.mean(1 + smaller, keepdims=True)
  grad_row, grad_col = root(row / (mean + 1e-9)), root(col)
  return Sides(row, col, grad_row, grad_col, grad_row, grad_col)
