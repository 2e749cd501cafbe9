"""Persistent evolution strategies: meta-gradients of long trajectories in parts.

Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled
Computation Graphs with Persistent Evolution Strategies", 2021,
https://arxiv.org/abs/2112.13835. Noise reuse: Li et al., 2023,
https://arxiv.org/abs/2304.12180.

A pair of trajectories runs with theta + noise and theta - noise, on the same
batches, a truncation of k steps at a time. A loss in this truncation owes to
the noise of all truncations of its trajectory so far, hence an accumulator.

Where we leave the authors' code: there, the last loss of a trajectory is
attributed to the noise of the truncation alone, and a trajectory that starts
with a truncation inherits the noise of the one before. That biases short
trajectories' gradients by some percent; attribution="ancestor" does it again.

Letters in shapes: p pairs, k steps of a truncation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.learned.meta.inner import Problem

ESTIMATORS = ("pes", "ancestor", "truncated", "noise_reuse")


class Settings(NamedTuple):
  """How the meta-gradient is estimated; the paper's values."""

  pairs: int = 8  # of each task
  truncation: int = 50  # k
  sigma: float = 0.01  # deviation of the noise on every number of theta
  min_length: int = 100  # of a trajectory, log-uniform
  max_length: int = 1000
  # pes; ancestor: see above; truncated: every truncation by itself, biased;
  # noise_reuse: one noise for a whole trajectory.
  estimator: str = "pes"


class Pair(NamedTuple):
  """Two trajectories, + and -, of one noise."""

  index: jax.Array  # (), int32, which of all pairs this is
  states: Any  # the problem's, with a leading axis of 2
  summed: Any  # like theta: noise of this trajectory so far
  noise: Any  # like theta: of the latest truncation
  age: jax.Array  # (), int32, steps of this trajectory
  length: jax.Array  # (), int32, steps it will have


def check_settings(settings: Settings) -> None:
  """Refuses settings out of range.

  Raises:
    ValueError: naming the field.
  """
  s = settings
  for field in ("pairs", "truncation", "min_length"):
    if getattr(s, field) < 1:
      raise ValueError(
        f"meta: `{field}` is 1 or more; got {getattr(s, field)!r}."
      )
  if s.max_length < s.min_length:
    raise ValueError(
      f"meta: `max_length`={s.max_length} is below min_length={s.min_length}."
    )
  if not s.sigma > 0:
    raise ValueError(f"meta: `sigma` is above 0; got {s.sigma!r}.")
  if s.estimator not in ESTIMATORS:
    raise ValueError(
      f"meta: `estimator` is one of {', '.join(ESTIMATORS)}; got "
      f"{s.estimator!r}."
    )


def draw_length(key: jax.Array, settings: Settings) -> jax.Array:
  """A log-uniform integer between min_length and max_length."""
  low, high = math.log(settings.min_length), math.log(settings.max_length + 1)
  drawn = jnp.exp(jax.random.uniform(key, (), minval=low, maxval=high))
  bounds = (settings.min_length, settings.max_length)
  return jnp.clip(drawn.astype(jnp.int32), *bounds)


def draw_noise(key: jax.Array, theta: Any, sigma: float) -> Any:
  """Normal noise like theta."""
  leaves, treedef = jax.tree.flatten(theta)
  keys = jax.random.split(key, len(leaves))
  draw = lambda x, k: sigma * jax.random.normal(k, x.shape, jnp.float32)
  return treedef.unflatten([draw(x, k) for x, k in zip(leaves, keys)])


def started(problem: Problem, key: jax.Array, length: jax.Array) -> Any:
  """The state at the start of a trajectory of `length` steps."""
  state = problem.reset(key)
  return state if problem.told is None else problem.told(state, length)


def start_pair(
  problem: Problem,
  theta: Any,
  settings: Settings,
  index: jax.Array,
  key: jax.Array,
) -> Pair:
  """A pair at the start of a trajectory, as if some steps old.

  The first trajectories are cut short by up to k steps, so that pairs do not
  end theirs at the same time.
  """
  for_state, for_length, for_age, for_noise = jax.random.split(key, 4)
  length = draw_length(for_length, settings)
  state = started(problem, for_state, length)
  twice = lambda x: jnp.stack([x, x])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), theta)
  oldest = jnp.minimum(settings.truncation, length)
  age = jax.random.randint(for_age, (), 0, oldest)
  noise = draw_noise(for_noise, theta, settings.sigma)
  return Pair(index, jax.tree.map(twice, state), zeros, noise, age, length)


def attribute(
  losses: jax.Array,
  ended: jax.Array,
  summed: Any,
  old: Any,
  new: Any,
  *,
  sigma: float,
  estimator: str = "pes",
) -> tuple[Any, Any]:
  """A truncation's meta-gradient, and the noise that the next one inherits.

  Args:
    losses: (2, k), of + and -.
    ended: (k,), whether the trajectory ended after that step.
    summed: like theta, noise of the trajectory before this truncation.
    old: like theta, the noise up to the first end.
    new: like theta, the noise from there on (the same as old but for
      noise_reuse).
    sigma: the noise's deviation.
    estimator: one of `ESTIMATORS`.

  Returns:
    The gradient of the mean loss, and `summed` for the next truncation.
  """
  before = jnp.cumsum(ended) - ended > 0  # an end before this step
  fresh = before
  if estimator == "ancestor":
    fresh = jnp.cumsum(ended) > 0  # an end before or after it
  gap = losses[0] - losses[1]
  of_old = jnp.mean(jnp.where(fresh, 0.0, gap))
  of_new = jnp.mean(jnp.where(fresh, gap, 0.0))
  any_end, at_end = jnp.any(ended), ended[-1]
  keeps = estimator in ("pes", "ancestor")

  def gradient(a, old, new):
    whole = a + old if keeps else old
    return (of_old * whole + of_new * new) / (2 * sigma**2)

  def inherit(a, old, new):
    if not keeps:
      return a
    kept = jnp.where(any_end, new, a + old)
    return kept if estimator == "ancestor" else jnp.where(at_end, 0.0, kept)

  grad = jax.tree.map(gradient, summed, old, new)
  return grad, jax.tree.map(inherit, summed, old, new)


def truncation(
  problem: Problem, settings: Settings
) -> Callable[..., tuple[Any, Pair, jax.Array]]:
  """One truncation of one pair, as a pure function.

  Args:
    problem: what is unrolled.
    settings: how.

  Returns:
    `(theta, pair, data, key) -> (gradient, pair, mean loss)`. The key is that
    of the meta-step and the task; the pair folds its index into it.
  """
  s = settings

  def run(theta, pair: Pair, data, key):
    key = jax.random.fold_in(key, pair.index)
    for_noise, for_steps = jax.random.split(key)
    new = draw_noise(for_noise, theta, s.sigma)
    reuse = s.estimator == "noise_reuse"
    old = pair.noise if reuse else new
    signs = jnp.array([1.0, -1.0])

    def one(carry, i):
      states, age, length, fresh = carry
      for_step, for_reset, for_length = jax.random.split(
        jax.random.fold_in(for_steps, i), 3
      )
      noise = old
      if reuse:
        noise = jax.tree.map(lambda a, b: jnp.where(fresh, b, a), old, new)

      def of_sign(sign, state):
        moved = jax.tree.map(lambda t, n: t + sign * n, theta, noise)
        return problem.step(moved, state, data, for_step)

      states, losses = jax.vmap(of_sign)(signs, states)
      end = age + 1 >= length
      next_length = draw_length(for_length, s)
      first = started(problem, for_reset, next_length)
      pick = lambda x, y: jnp.where(end, jnp.broadcast_to(y, x.shape), x)
      restart = lambda x, y: pick(x, jnp.expand_dims(y, 0))
      states = jax.tree.map(restart, states, first)
      age = jnp.where(end, 0, age + 1)
      length = jnp.where(end, next_length, length)
      return (states, age, length, fresh | end), (losses, end)

    start = (pair.states, pair.age, pair.length, jnp.asarray(False))
    (states, age, length, any_end), (losses, ended) = jax.lax.scan(
      one, start, jnp.arange(s.truncation)
    )
    grad, summed = attribute(
      losses.T,
      ended,
      pair.summed,
      old,
      new,
      sigma=s.sigma,
      estimator=s.estimator,
    )
    noise = jax.tree.map(lambda a, b: jnp.where(any_end, b, a), old, new)
    pair = Pair(pair.index, states, summed, noise, age, length)
    return grad, pair, jnp.mean(losses)

  return run
