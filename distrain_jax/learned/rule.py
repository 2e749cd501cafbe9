"""The learned rule as it is written down: 39 features and a small network.

For the features see Metz et al., 2022, https://arxiv.org/abs/2203.11860, and
table 2 of Thérien et al., 2024, https://arxiv.org/abs/2406.00153 (whose time
feature lacks the -1 of the code that made its results). Slow, and the measure
of the faster forms (`tiles`).

Letters in shapes: s a parameter's shape, h hidden units.
"""

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.learned.moments import Moments, sides
from distrain_jax.learned.theta import Theta

TIMES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)


def time_features(count: jax.Array) -> jax.Array:
  """Where in training we are, (11,): tanh(count / x - 1) for 11 scales x."""
  return jnp.tanh(count.astype(jnp.float32) / np.float32(TIMES) - 1)


def features(
  grad: jax.Array, param: jax.Array, moments: Moments
) -> list[jax.Array]:
  """The 28 features of the elements, not normalised, each of shape s.

  Args:
    grad: (*s), float32.
    param: (*s), float32.
    moments: after this gradient, float32.
  """
  shape = grad.shape
  side = sides(moments.factors, shape)
  whole = lambda x: jnp.broadcast_to(x, (3, *shape))
  root = jax.lax.rsqrt(moments.v + 1e-6)
  # Python's + joins lists: features in the order of theta's first kernel.
  return (
    [grad, param, *moments.m, moments.v]
    + [m * root for m in moments.m]
    + [root]
    + list(grad[None] * side.grad_row * side.grad_col)
    + list(whole(side.row))
    + list(whole(side.col))
    + list(whole(jax.lax.rsqrt(side.row + 1e-8)))
    + list(whole(jax.lax.rsqrt(side.col + 1e-8)))
    + list(moments.m * side.momentum_row * side.momentum_col)
  )


def normalise(feature: jax.Array, eps: float) -> jax.Array:
  """A feature over the root of its mean square over the parameter."""
  return feature * jax.lax.rsqrt(eps + jnp.mean(feature * feature))


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
) -> jax.Array:
  """d exp(exp_mult mag), the step before its scale and sign.

  Args:
    theta: the learned numbers.
    grad: (*s), float32; s has one axis or more.
    param: (*s), float32.
    moments: after this gradient, float32.
    count: (), updates made before this one.
    exp_mult: of the network's second output.
    feature_eps: under the root of the normaliser.
    precision: of the matrix products.

  Returns:
    (*s), float32.
  """
  own = [normalise(f, feature_eps) for f in features(grad, param, moments)]
  time = time_features(count)
  time = jnp.broadcast_to(time, (*grad.shape, time.size))
  x = jnp.concatenate([jnp.stack(own, -1), time], -1)  # (*s, 39)
  x = x.reshape(-1, x.shape[-1])

  def layer(x, name):
    y = jnp.matmul(x, theta[f"w{name}"], precision=precision)
    return y + theta[f"b{name}"][None]

  x = jax.nn.relu(layer(x, 0))
  x = jax.nn.relu(layer(x, 1))
  d, mag = layer(x, 2).T
  return (d * jnp.exp(exp_mult * mag)).reshape(grad.shape)
