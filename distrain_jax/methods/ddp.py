"""DDP: every worker holds the whole model; gradients are averaged each step.

Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training", 2020, https://arxiv.org/abs/2006.15704.

The honest baseline: micro-batches accumulate locally and the workers speak
once a step, in one all-reduce that carries gradients, loss and statistics.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from distrain_jax import gradients, spmd, variables
from distrain_jax.method import LossFn, Method, Params, StatefulLoss


class DDPState(NamedTuple):
  """Equal on all workers, except model_state when its stats are local."""

  step: jax.Array  # (), int32
  params: Params
  model_state: Any  # () for a loss without it
  opt_state: optax.OptState


def ddp(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
) -> Method:
  """Plain data parallelism around any loss, optimizer and pytree.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: the optimizer; it sees the averaged gradient.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of the averaged gradient; None: no clipping.

  Returns:
    A `Method`. Metrics: loss, grad_norm (before clipping) and loss_fn's aux.

  Raises:
    ValueError: if accumulate or clip_norm are out of range.
  """
  gradients.check_accumulate("ddp", accumulate)
  gradients.check_clip_norm("ddp", clip_norm)
  gradient = gradients.gradient_fn(loss_fn, accumulate)

  def init(key, model):
    del key  # nothing random here
    params, model_state = variables.split(loss_fn, model)
    step = jnp.zeros((), jnp.int32)
    return DDPState(step, params, model_state, tx.init(params))

  def step(state: DDPState, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    g = gradient(state.params, state.model_state, batch, key)
    loss, aux, grads = jax.lax.pmean(g[:3], axis)
    model_state = variables.after_step(loss_fn, g.model_state, axis)
    norm = jnp.sqrt(gradients.squared_norm(grads))
    scale = gradients.clip_scale(norm, clip_norm)
    if clip_norm is not None:
      grads = gradients.scale_tree(grads, scale)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {**aux, "loss": loss, "grad_norm": norm}
    return DDPState(state.step + 1, params, model_state, opt_state), metrics

  def params(state: DDPState):
    return variables.join(loss_fn, state.params, state.model_state, axis)

  def reshard(state: DDPState, workers: int) -> DDPState:
    stats = variables.reshard(loss_fn, state.model_state, workers)
    return state._replace(model_state=stats)

  stats = variables.spec(loss_fn, axis)
  specs = DDPState(step=P(), params=P(), model_state=stats, opt_state=P())
  return Method("ddp", axis, init, step, params, specs, reshard)
