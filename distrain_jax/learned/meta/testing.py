"""Meta-testing: how networks train under an optimizer, learned or not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distrain_jax.learned.meta.tasks import Task


def trained(
  task: Task,
  make_tx: Callable[[Any], optax.GradientTransformation],
  steps: int,
) -> Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]:
  """Training from scratch, as one compiled function.

  Args:
    task: whose training loss is measured, before each step and on its batch.
    make_tx: `(setting) -> optimizer`; the setting is traced: theta, or a
      learning rate. Its update is given the loss as `value`, too.
    steps: of the trajectory.

  Returns:
    `(setting, data, key) -> (params, losses (steps,))`, to be mapped over keys
    or settings. Losses are not normalised: a diverged network's is whatever it
    is.
  """

  def run(setting, data, key):
    tx = optax.with_extra_args_support(make_tx(setting))
    for_init, for_steps = jax.random.split(key)
    params = task.init(for_init)

    def one(carry, i):
      params, state = carry
      for_batch, for_loss = jax.random.split(jax.random.fold_in(for_steps, i))
      batch = task.batch(data, for_batch)
      loss, grads = jax.value_and_grad(task.loss)(params, batch, for_loss)
      updates, state = tx.update(grads, state, params, value=loss)
      return (optax.apply_updates(params, updates), state), loss

    start = (params, tx.init(params))
    (params, _), losses = jax.lax.scan(one, start, jnp.arange(steps))
    return params, losses

  return jax.jit(run)
