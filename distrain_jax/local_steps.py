"""Workers that train alone between exchanges: what their methods share.

Every worker has parameters and an optimizer of its own; a step is its own
gradient's step, and only what it says of itself travels.

That, and an exchange, must go from one branch of one conditional: XLA for CPU
keeps no order between collectives in a conditional and beside it, so that one
worker's message could meet another one of the others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distrain_jax import gradients, spmd, variables
from distrain_jax.gradients import at_least_float32
from distrain_jax.method import LossFn, Metrics, Params, StatefulLoss
from distrain_jax.whole import is_whole


class Own(NamedTuple):
  """What a worker says of its step."""

  loss: jax.Array  # ()
  aux: Metrics
  norm: jax.Array  # (), float32: of its gradient, before clipping
  model_state: Any


class Local(NamedTuple):
  """One worker's training state."""

  params: Params
  opt_state: optax.OptState


def check_sync_every(name: str, sync_every: int) -> None:
  if not is_whole(sync_every, 1):
    raise ValueError(
      f"{name}: `sync_every` is the number of steps that the workers take "
      f"alone between exchanges, at least 1; got {sync_every!r}."
    )


def start(loss_fn, tx, model) -> tuple[Local, Any]:
  """Every worker's beginning: the same model, a fresh optimizer; its stats."""
  params, model_state = variables.split(loss_fn, model)
  return Local(params, tx.init(params)), model_state


def step_fn(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str,
  accumulate: int,
  clip_norm: float | None,
) -> Callable[..., tuple[Local, Own]]:
  """`(local, model_state, step, batch, key) -> (local, own)`: nothing travels.

  The gradient is clipped by this worker's own norm.
  """
  gradient = gradients.gradient_fn(loss_fn, accumulate)

  def step(local: Local, model_state, step, batch, key):
    key = spmd.worker_key(key, step, axis)
    g = gradient(local.params, model_state, batch, key)
    grads, norm = g.grads, jnp.sqrt(gradients.squared_norm(g.grads))
    if clip_norm is not None:
      grads = gradients.scale_tree(grads, gradients.clip_scale(norm, clip_norm))
    updates, opt_state = tx.update(grads, local.opt_state, local.params)
    params = optax.apply_updates(local.params, updates)
    return Local(params, opt_state), Own(g.loss, g.aux, norm, g.model_state)

  return step


def tell(loss_fn, own: Own, axis: str) -> tuple[Metrics, Any]:
  """What travels in every step: `(metrics, model_state)`.

  The metric grad_norm is the mean of the workers' norms.
  """
  loss, aux, norm = jax.lax.pmean(own[:3], axis)
  model_state = variables.after_step(loss_fn, own.model_state, axis)
  return {**aux, "loss": loss, "grad_norm": norm}, model_state


def mean(tree: Any, axis: str) -> Any:
  """The workers' mean of floating leaves, summed in float32 or wider.

  Other leaves, such as an optimizer's count, are this worker's own.
  """
  floating = [x for x in jax.tree.leaves(tree) if _is_floating(x)]
  means = iter(jax.lax.pmean([at_least_float32(x) for x in floating], axis))
  one = lambda x: next(means).astype(x.dtype) if _is_floating(x) else x
  return jax.tree.map(one, tree)


def restack(stacked: Any, workers: int) -> Any:
  """For another number of workers: all of them start from the mean.

  Args:
    stacked: leaves with a leading axis of workers.
  """

  def one(x):
    first = x[0]
    if _is_floating(x):
      first = at_least_float32(x).mean(0).astype(x.dtype)
    return jnp.broadcast_to(first, (workers, *first.shape))

  return jax.tree.map(one, stacked)


def _is_floating(x) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)
