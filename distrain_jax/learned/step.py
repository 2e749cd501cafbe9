"""muLO's step as a pure function of theta, gradients, state and parameters.

Where we leave the paper: a gradient that is not finite counts as 0 (theirs
becomes 3e38, whose square is infinite in the averages for ever).

Letters in shapes: n leading axes that hold layers, s the rest of a parameter.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distrain_jax.learned import matching, tiles
from distrain_jax.learned import rule as textbook
from distrain_jax.learned.moments import Moments, init_moments, next_moments
from distrain_jax.learned.theta import Theta, decay_rates

STEP_MULT = 0.01  # the paper's under muP; 0.001 in standard parametrisation


class MuloState(NamedTuple):
  """State of `scale_by_mulo`; 16 bytes an element of two axes or more."""

  count: jax.Array  # (), int32, updates made
  moments: Any  # the parameters' structure with a `Moments` in each place


class Rule(NamedTuple):
  """What stays the same from step to step, apart from theta."""

  step_mult: float = STEP_MULT
  exp_mult: float = 0.001
  feature_eps: float = 1e-5
  nan_to_num: bool = True
  accumulator_dtype: Any = None
  implementation: str = "tiled"
  precision: str = "highest"
  tile: int | None = None  # see `tiles.sized`
  update_norm: str | None = None
  eps_scaling: str | None = None  # or fan_in: see `seen`


DEFAULT = Rule()


def mulo_init(params: Any, rule: Rule = DEFAULT, stacked: Any = 0) -> MuloState:
  """Zeros for every parameter.

  Args:
    params: arrays, or anything with shapes.
    rule: of which the accumulators' dtype matters here.
    stacked: leading axes of each parameter that hold layers: one number, or a
      tree of numbers like params.
  """
  dtype = rule.accumulator_dtype or jnp.float32
  one = lambda x, n: init_moments(x, n, dtype)
  stacked = matching.match("mulo_init: stacked", stacked, params)
  moments = jax.tree.map(one, params, stacked)
  return MuloState(jnp.zeros((), jnp.int32), moments)


def seen(
  grad: jax.Array, param: jax.Array, multiplier: Any, scaling: str | None
) -> tuple[jax.Array, jax.Array]:
  """The gradient and the parameter as the rule sees them, float32.

  Under muP the gradient of a hidden matrix with n inputs is of size 1 / n and
  its elements of size 1 / sqrt(n), so that on wide networks the constants
  beside squares outweigh what they only were to protect: features fade to 0
  or freeze at 1 (Thérien et al., 2024, section 4, mention that epsilons may
  have to follow the fan in). With scaling "fan_in" the rule sees n grad and
  sqrt(n) param, where 1 / n is the multiplier. That is the rule with
  epsilon / n^2 beside squares of gradients, and under the root of the
  normaliser epsilon / n for parameters, / n^2 for gradients and momenta, / n^4
  for their squares, times n^2 for inverse roots of squares: features have the
  same size at every width.

  Args:
    grad: of any shape.
    param: of the same shape.
    multiplier: muP's, above 0: 1 / n of hidden matrices, 1 of what is not one.
    scaling: None: the two as they are; "fan_in".
  """
  grad, param = grad.astype(jnp.float32), param.astype(jnp.float32)
  if scaling is None:
    return grad, param
  multiplier = jnp.asarray(multiplier, jnp.float32)
  return grad / multiplier, param * jax.lax.rsqrt(multiplier)


def mulo_step(
  theta: Theta,
  grads: Any,
  state: MuloState,
  params: Any,
  *,
  multipliers: Any = 1.0,
  rule: Rule = DEFAULT,
  stacked: Any = 0,
) -> tuple[Any, MuloState]:
  """One step of the learned rule: a pure function, of theta too.

  Args:
    theta: the learned numbers, see `theta.shapes`.
    grads: like params.
    state: of `mulo_init`.
    params: floating arrays; computed on in float32.
    multipliers: muP's, of each parameter's step: a number, or a tree.
    rule: the constants.
    stacked: as for `mulo_init`.

  Returns:
    What to subtract from params, in their dtypes, and the next state.
  """
  multipliers = matching.match("mulo_step: multipliers", multipliers, params)
  stacked = matching.match("mulo_step: stacked", stacked, params)
  theta = jax.tree.map(jnp.asarray, dict(theta))  # those of a file are NumPy's
  rates = decay_rates(theta)

  def one(p, g, old, multiplier, stacked):
    g, x = seen(g, p, multiplier, rule.eps_scaling)
    if rule.nan_to_num:
      g = jnp.where(jnp.isfinite(g), g, 0)
    new = next_moments(rates, old, g, stacked)
    d = _layers(theta, g, x, new, state.count, rule, stacked)
    step = (multiplier * rule.step_mult * d).astype(p.dtype)
    kept = jax.tree.map(lambda o, n: n.astype(o.dtype), old, new)
    return step, kept

  leaves, treedef = jax.tree.flatten(params)
  flat = [
    treedef.flatten_up_to(x)
    for x in (grads, state.moments, multipliers, stacked)
  ]
  done = [one(p, *rest) for p, *rest in zip(leaves, *flat)]
  steps = treedef.unflatten([step for step, _ in done])
  moments = treedef.unflatten([new for _, new in done])
  return steps, MuloState(optax.safe_increment(state.count), moments)


def _layers(theta, grad, param, moments, count, rule, stacked):
  """The rule on each of a parameter's stacked layers by itself."""

  def layer(grad, param, moments):
    if not grad.size:
      return grad
    shape = grad.shape or (1,)  # a scalar counts as a vector of one
    see = lambda x, *lead: x.reshape(*lead, *shape) if not grad.shape else x
    m, v, factors = moments
    factors = tuple(see(f, 3) for f in factors)
    moments = Moments(see(m, 3), see(v), factors)
    d = _direction(theta, see(grad), see(param), moments, count, rule)
    if rule.update_norm == "rms":
      d = d * jax.lax.rsqrt(1e-12 + jnp.mean(d * d))
    return d.reshape(grad.shape)

  if not stacked:
    return layer(grad, param, moments)
  # One after another: side by side, all layers' hidden units would be alive.
  layers = math.prod(grad.shape[:stacked])
  flat = lambda x: x.reshape(layers, *x.shape[stacked:])
  inner = lambda x: x.reshape(3, layers, *x.shape[1 + stacked :])
  grads, params = flat(grad), flat(param)
  m, factors = inner(moments.m), tuple(inner(f) for f in moments.factors)
  v = flat(moments.v)

  def at(i):
    of = lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
    own = Moments(of(m), v[i], tuple(of(f) for f in factors))
    return layer(grads[i], params[i], own)

  return jax.lax.map(at, jnp.arange(layers)).reshape(grad.shape)


def _direction(theta, grad, param, moments, count, rule):
  options = {
    "exp_mult": rule.exp_mult,
    "feature_eps": rule.feature_eps,
    "precision": rule.precision,
  }
  args = (theta, grad, param, moments, count)
  if rule.implementation == "reference":
    return textbook.direction(*args, **options)
  if rule.implementation == "pallas":
    from distrain_jax.learned import kernel  # Pallas is slow to import

    return kernel.direction(*args, tile=rule.tile, **options)
  return tiles.direction(*args, tile=rule.tile, **options)
