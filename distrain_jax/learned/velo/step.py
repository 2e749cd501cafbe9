"""VeLO's step as a pure function of theta, gradients, state and parameters.

Metz et al., 2022, https://arxiv.org/abs/2211.09760; under muP, Thérien et al.,
2024, https://arxiv.org/abs/2406.00153.

Where we leave the authors' code: the LSTM's learned start is read from theta at
the first step, so that the state is made without theta; an element of a
gradient that is not a number counts as 0.

Letters in shapes: t tensors, h units of the LSTM, n leading axes that hold
layers, s the rest of a parameter.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distrain_jax.learned import matching
from distrain_jax.learned.moments import Moments, init_moments, next_moments
from distrain_jax.learned.theta import FACTORED, MOMENTUM, SECOND, Theta
from distrain_jax.learned.velo import elements, hyper
from distrain_jax.learned.velo.losses import Losses, init_losses, next_losses
from distrain_jax.learned.velo.theta import LSTM

GRADIENT = 1000.0  # no element of a gradient is larger


class VeloState(NamedTuple):
  """State of `scale_by_velo`; 16 bytes an element, 8 h a tensor."""

  count: jax.Array  # (), int32, updates made
  num_steps: jax.Array  # (), int32, updates of the whole training
  losses: Losses
  hidden: jax.Array  # (t, h), float32
  cell: jax.Array  # (t, h), float32
  moments: Any  # the parameters' structure with a `Moments` in each place


class VeloRule(NamedTuple):
  """What stays the same from step to step, apart from theta.

  The defaults are those of the published VeLO; under muP, no param_scale_mult.
  """

  num_steps: Any = 1000  # of the whole training; `velo_init` alone reads it
  lstm: int = LSTM  # theta's h
  step_mult: float = 0.001
  exp_mult: float = 0.001
  interp_mult: float = 100.0  # of the mixture of the bank's networks
  param_scale_mult: bool = True  # whether steps grow with their tensor
  feature_eps: float = 1e-5
  nan_to_num: bool = True
  accumulator_dtype: Any = None
  precision: str = "highest"
  tile: int | None = None  # see `tiles.sized`


DEFAULT = VeloRule()


def _tensors(param: Any, stacked: int) -> int:
  """How many tensors a parameter is to the LSTM; one without elements: none."""
  layers = math.prod(param.shape[:stacked])
  return layers if math.prod(param.shape) else 0


def velo_init(
  params: Any, rule: VeloRule = DEFAULT, stacked: Any = 0
) -> VeloState:
  """Before the first step.

  Args:
    params: arrays, or anything with shapes.
    rule: of which num_steps, lstm and the accumulators' dtype matter here.
    stacked: leading axes of each parameter that hold layers, each of which is a
      tensor of its own: one number, or a tree of numbers like params.
  """
  stacked = matching.match("velo_init: stacked", stacked, params)
  dtype = rule.accumulator_dtype or jnp.float32
  moments = jax.tree.map(
    lambda x, n: init_moments(x, n, dtype), params, stacked
  )
  tensors = sum(jax.tree.leaves(jax.tree.map(_tensors, params, stacked)))
  return VeloState(
    count=jnp.zeros((), jnp.int32),
    num_steps=jnp.asarray(rule.num_steps, jnp.int32),
    losses=init_losses(),
    hidden=jnp.zeros((tensors, rule.lstm), jnp.float32),
    cell=jnp.zeros((tensors, rule.lstm), jnp.float32),
    moments=moments,
  )


def velo_step(
  theta: Theta,
  grads: Any,
  state: VeloState,
  params: Any,
  *,
  value: jax.Array,
  multipliers: Any = 1.0,
  rule: VeloRule = DEFAULT,
  stacked: Any = 0,
) -> tuple[Any, VeloState]:
  """One step of the learned rule: a pure function, of theta too.

  The step of an element is multiplier * step_mult * rate * d * exp(exp_mult *
  mag), by param_scale_mult times the root mean square of its tensor; the LSTM
  says rate, and the mixture that it makes says d and mag.

  Args:
    theta: the learned numbers, see `theta.velo_shapes`.
    grads: like params.
    state: of `velo_init`.
    params: floating arrays; computed on in float32.
    value: (), the loss that grads belong to.
    multipliers: muP's, of each parameter's step: a number, or a tree.
    rule: the constants.
    stacked: as for `velo_init`.

  Returns:
    What to subtract from params, in their dtypes, and the next state.

  Raises:
    ValueError: a value that is not one number, a state of other parameters or
      of an LSTM of another size.
  """
  multipliers = matching.match("velo_step: multipliers", multipliers, params)
  stacked = matching.match("velo_step: stacked", stacked, params)
  theta = jax.tree.map(jnp.asarray, dict(theta))  # those of a file are NumPy's
  leaves, treedef = jax.tree.flatten(params)
  trees = (grads, state.moments, multipliers, stacked)
  grads, moments, multipliers, stacked = map(treedef.flatten_up_to, trees)
  counts = [_tensors(p, n) for p, n in zip(leaves, stacked)]
  _check(value, state, sum(counts), theta)
  losses, of_loss = next_losses(
    state.losses,
    jnp.asarray(value),
    state.count,
    state.num_steps,
    rule.nan_to_num,
  )
  looks = [
    hyper.tensor_inputs(p, m, n)
    for p, m, n, count in zip(leaves, moments, stacked, counts)
    if count
  ]
  hidden, cell, own = _listen(theta, state, looks, of_loss, rule)
  steps, kept, place = [], [], 0
  all_of = zip(leaves, grads, moments, multipliers, stacked, counts)
  for p, g, old, multiplier, n, count in all_of:
    g = _tame(g, rule)
    new = next_moments(_rates(), old, g, n)
    kept.append(jax.tree.map(lambda o, n: n.astype(o.dtype), old, new))
    if count:
      at = slice(place, place + count)
      its = jax.tree.map(lambda x, at=at: x[at], own)
      g = multiplier * rule.step_mult * _layers(its, g, p, new, rule, n)
      place += count
    steps.append(g.astype(p.dtype))
  moments = treedef.unflatten(kept)
  count = optax.safe_increment(state.count)
  state = VeloState(count, state.num_steps, losses, hidden, cell, moments)
  return treedef.unflatten(steps), state


def _listen(theta, state, looks, of_loss, rule):
  """The LSTM's next state, and each tensor's mixture and rate."""
  if not looks:
    return state.hidden, state.cell, None
  x = jnp.concatenate(looks)  # (t, 12)
  done = hyper.progress(state.count, state.num_steps)
  shared = jnp.tile(jnp.concatenate([done, of_loss]), (len(x), 1))  # (t, 18)
  first = state.count == 0
  hidden, cell = (
    jnp.where(first, theta[f"start_{name}"][None], getattr(state, name))
    for name in ("hidden", "cell")
  )
  x = jnp.concatenate([shared, x], 1)
  heard = hyper.listen(theta, x, hidden, cell, rule.precision)
  scale, precision = rule.interp_mult, rule.precision
  mixed = hyper.mixtures(theta, heard.controls, scale, precision)
  return heard.hidden, heard.cell, (mixed, heard.rate)


def _rates():
  """Of the averages: muLO's before anything is learned; VeLO keeps them."""
  # The bases are exact in 1 - base, and 1 - 0.999 is not in float32.
  rate = lambda base: 1 - jnp.asarray([1 - b for b in base], jnp.float32)
  return rate(MOMENTUM), rate(SECOND), rate(FACTORED)


def _tame(grad, rule):
  grad = grad.astype(jnp.float32)
  if rule.nan_to_num:
    grad = jnp.where(jnp.isnan(grad), 0, grad)
  return jnp.clip(grad, -GRADIENT, GRADIENT)


def _layers(own, grad, param, moments, rule, stacked):
  """rate * d * exp(exp_mult * mag) of each of a parameter's tensors, (*n, *s).

  Args:
    own: mixtures and rates, each with one axis for the layers.
    grad: (*n, *s), float32.
    param: (*n, *s).
    moments: after this gradient, float32.
    rule: the constants.
    stacked: how many axes n has.
  """
  layers = math.prod(grad.shape[:stacked])
  inside = grad.shape[stacked:] or (1,)  # a scalar counts as a vector of one
  one = lambda x: x.reshape(layers, *inside)
  grads, params = one(grad), one(param.astype(jnp.float32))
  # The factors of what has one axis or none are of its shape.
  tail = lambda x: x.shape[1 + stacked :] or (1,)
  three = lambda x: x.reshape(3, layers, *tail(x))
  m, v = three(moments.m), one(moments.v)
  factors = tuple(three(f) for f in moments.factors)

  def at(i):
    of = lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
    here = Moments(of(m), v[i], tuple(of(f) for f in factors))
    mixture, rate = jax.tree.map(lambda x: x[i], own)
    d = rate * elements.direction(
      mixture,
      grads[i],
      params[i],
      here,
      exp_mult=rule.exp_mult,
      feature_eps=rule.feature_eps,
      precision=rule.precision,
      tile=rule.tile,
    )
    if rule.param_scale_mult:
      d = d * jnp.sqrt(1e-9 + jnp.mean(params[i] ** 2))
    return d

  if not stacked:
    return at(0).reshape(grad.shape)
  return jax.lax.map(at, jnp.arange(layers)).reshape(grad.shape)


def _check(value, state, tensors, theta):
  if np.shape(value):
    raise ValueError(
      "velo_step: `value` is the loss, one number; got an array of shape "
      f"{np.shape(value)}. Average it: value=loss.mean()."
    )
  got, lstm = state.hidden.shape, theta["start_hidden"].shape[0]
  if got != (tensors, lstm):
    raise ValueError(
      f"velo_step: the state is of {got[0]} tensors and an LSTM of {got[1]} "
      f"units; the parameters are {tensors} tensors, and theta's LSTM has "
      f"{lstm}. Make the state with tx.init(params), or with "
      f"velo_init(params, VeloRule(num_steps, lstm={lstm}))."
    )
