"""A task under a learned rule, as the problem whose meta-gradient is sought."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.learned.meta.tasks import Task
from distrain_jax.learned.step import DEFAULT, Rule, mulo_init, mulo_step
from distrain_jax.learned.velo import VeloRule, velo_init, velo_step

State = Any


class Problem(NamedTuple):
  """Trajectories that theta steers: any, not only those of an optimizer."""

  reset: Callable  # (key) -> state
  # (theta, state, data, key) -> (state, loss before the step)
  step: Callable
  # (state, length) -> state: told, after a reset, how many steps will follow.
  # None: what is learned need not know.
  told: Callable | None = None


class Training(NamedTuple):
  """A network in training."""

  params: Any
  opt_state: Any
  scales: Any  # of augmentation: what each of params is multiplied by; or ()


def training(
  task: Task, rule: Rule | VeloRule = DEFAULT, *, augment: float = 1.0
) -> Problem:
  """Training the task's network by the learned rule.

  Args:
    task: whose normalised training loss is measured, before each step and on
      the batch of that step.
    rule: the constants of the learned rule, and with them its architecture:
      muLO's `Rule`, or `VeloRule`, whose num_steps is that of the trajectory
      whatever it says.
    augment: where above 1, each parameter is trained as itself over a factor
      between 1 / augment and augment, drawn anew for each trajectory: the
      optimizer meets parameters and gradients of other sizes. Metz et al.,
      2022, https://arxiv.org/abs/2211.09760. Not in the muLO paper.

  Raises:
    ValueError: augment below 1.
  """
  if augment < 1:
    raise ValueError(
      "training: `augment` is the largest factor that parameters are rescaled "
      f"by, 1 for none; got {augment!r}."
    )

  is_velo = isinstance(rule, VeloRule)
  start = velo_init if is_velo else mulo_init
  advance = velo_step if is_velo else mulo_step

  def reset(key):
    own, draw = jax.random.split(key)
    params = task.init(own)
    if augment == 1:
      return Training(params, start(params, rule), ())
    leaves, treedef = jax.tree.flatten(params)
    logs = jax.random.uniform(draw, (len(leaves),), minval=-1.0, maxval=1.0)
    scales = treedef.unflatten(list(jnp.exp(math.log(augment) * logs)))
    params = jax.tree.map(jnp.divide, params, scales)
    return Training(params, start(params, rule), scales)

  def step(theta, state, data, key):
    for_batch, for_loss = jax.random.split(key)
    batch = task.batch(data, for_batch)

    def loss_fn(params):
      if augment != 1:
        params = jax.tree.map(jnp.multiply, params, state.scales)
      return task.loss(params, batch, for_loss)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    more = {"value": loss} if is_velo else {}
    steps, opt_state = advance(
      theta,
      grads,
      state.opt_state,
      state.params,
      multipliers=task.mup,
      rule=rule,
      **more,
    )
    params = jax.tree.map(jnp.subtract, state.params, steps)
    new = Training(params, opt_state, state.scales)
    return new, task.normalise(loss)

  def told(state, length):
    opt_state = state.opt_state._replace(num_steps=length)
    return state._replace(opt_state=opt_state)

  return Problem(reset, step, told if is_velo else None)
