"""The network that sees tensors: 30 numbers each, an LSTM, a mixture for each.

All tensors share its weights. They hear of each other by one vector, the
largest output of a layer over all of them.

Letters in shapes: t tensors (each layer of a stacked parameter is one), h units
of the LSTM, k networks in the bank, n leading axes that hold layers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.learned.moments import Moments
from distrain_jax.learned.theta import Theta

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
RANKS = 5


def progress(count: jax.Array, num_steps: jax.Array) -> jax.Array:
  """How much of the training is over, (9,): tanh(10 (count / num_steps - x))."""
  done = count.astype(jnp.float32) / num_steps.astype(jnp.float32)
  return jnp.tanh(10 * (done - np.float32(FRACTIONS)))


def tensor_inputs(
  param: jax.Array, moments: Moments, stacked: int
) -> jax.Array:
  """What one parameter's tensors look like, (t, 12), float32.

  The size of the second moment, how many axes are longer than 1, and how the
  momenta and the second moment spread: on a log scale, in units of the root
  mean square of the tensor's parameters. As in the authors' code, the second
  moment's spread is about the mean of the momenta.

  Args:
    param: (*n, *s), of one element or more.
    moments: before this step's gradient.
    stacked: how many axes n has.
  """
  tensors = math.prod(param.shape[:stacked])
  axes = tuple(range(1 + stacked, 1 + param.ndim))

  def mean(x):  # (·, *n, *s): to (·, *n, 1, ...)
    return jnp.mean(x, axes, keepdims=True)

  def log_size(x):  # (·, *n, 1, ...): to (t, ·)
    x = x.reshape(-1, tensors).T
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * x)), -5.0, 5.0)

  as_one = lambda x: x.astype(jnp.float32)[None]
  unit = jax.lax.rsqrt(jnp.maximum(1e-9, mean(as_one(param) ** 2)))
  m, v = moments.m.astype(jnp.float32) * unit, as_one(moments.v) * unit
  mean_m = mean(m)
  rank = sum(length > 1 for length in param.shape[stacked:])
  one_hot = np.arange(RANKS) == rank
  return jnp.concatenate(
    [
      log_size(mean(v)),
      jnp.tile(one_hot.astype(np.float32), (tensors, 1)),
      log_size(mean((m - mean_m) ** 2)),
      log_size(mean((v - mean_m) ** 2)),
    ],
    1,
  )


class Heard(NamedTuple):
  """What the network says of every tensor, and keeps."""

  controls: jax.Array  # (t, k), the weights of the bank
  rate: jax.Array  # (t,), of the step
  hidden: jax.Array  # (t, h)
  cell: jax.Array  # (t, h)


def listen(
  theta: Theta,
  x: jax.Array,
  hidden: jax.Array,
  cell: jax.Array,
  precision: str,
) -> Heard:
  """One step of the LSTM for all tensors.

  Its form is Haiku's: one kernel for input and state, gates in the order input,
  candidate, forget, output, 1 added to the forget gate.

  Args:
    theta: the learned numbers.
    x: (t, 30), t of 1 or more.
    hidden: (t, h), of the step before.
    cell: (t, h), likewise.
    precision: of the matrix products.
  """

  def layer(name, x):
    y = jnp.matmul(x, theta[f"{name}_w"], precision=precision)
    return y + theta[f"{name}_b"][None]

  pooled = jnp.max(jax.nn.relu(layer("pool", x)), 0, keepdims=True)
  z = layer("own", x) + pooled
  gates = layer("lstm", jnp.concatenate([z, hidden], 1))
  i, g, f, o = jnp.split(gates, 4, 1)
  cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
  rate = layer("rate", hidden)[:, 0]
  return Heard(layer("controls", hidden), rate, hidden, cell)


def mixtures(
  theta: Theta, controls: jax.Array, scale: float, precision: str
) -> dict[str, jax.Array]:
  """Each tensor's network: scale times the mean of control * bank.

  Returns:
    w0 (t, 30, 4), b0 (t, 4), w1, b1, w2 and b2.
  """
  mixed = {}
  for name in ("w0", "b0", "w1", "b1", "w2", "b2"):
    bank = theta[f"bank_{name}"]
    sums = jnp.tensordot(controls, bank, 1, precision=precision)
    mixed[name] = scale / bank.shape[0] * sums
  return mixed
