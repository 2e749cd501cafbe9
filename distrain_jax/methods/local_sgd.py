"""Local SGD: every worker trains alone; now and then models are averaged.

Stich, "Local SGD Converges Fast and Communicates Little", 2018,
https://arxiv.org/abs/1805.09767.

Any optimizer takes the place of the paper's SGD.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from distrain_jax import gradients, local_steps, variables
from distrain_jax.method import LossFn, Method, Params, StatefulLoss

OPT_STATE = ("local", "averaged")


class LocalSGDState(NamedTuple):
  """One worker's; `Method.specs` says which fields differ by worker."""

  step: jax.Array  # (), int32
  params: Params  # this worker's; equal on all after an exchange
  model_state: Any  # () for a loss without it
  opt_state: optax.OptState  # this worker's


def local_sgd(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  sync_every: int = 8,
  accumulate: int = 1,
  clip_norm: float | None = None,
  opt_state: str = "local",
) -> Method:
  """Local steps, and the mean of the workers' parameters every so many.

  In the other steps only the metrics travel, and non-trained state unless it
  is `stateful(..., stats="local")`.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: each worker's own optimizer; it sees that worker's gradient.
    axis: the mesh (or vmap) axis of the workers.
    sync_every: steps from one averaging to the next. 1 with plain SGD is
      `ddp` to rounding.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of a worker's own gradient; None: no
      clipping.
    opt_state: "local": each worker keeps its optimizer's state; "averaged":
      its floating leaves are averaged with the parameters.

  Returns:
    A `Method`; its `params` is the mean of the workers. Metrics: loss,
    grad_norm (mean of the workers', before clipping) and loss_fn's aux.

  Raises:
    ValueError: if sync_every, accumulate, clip_norm or opt_state are out of
      range.
  """
  local_steps.check_sync_every("local_sgd", sync_every)
  gradients.check_accumulate("local_sgd", accumulate)
  gradients.check_clip_norm("local_sgd", clip_norm)
  if opt_state not in OPT_STATE:
    raise ValueError(
      f"local_sgd: `opt_state` is one of {', '.join(OPT_STATE)}; got "
      f"{opt_state!r}."
    )
  one_step = local_steps.step_fn(
    loss_fn, tx, axis=axis, accumulate=accumulate, clip_norm=clip_norm
  )

  def init(key, model):
    del key  # nothing random here
    local, model_state = local_steps.start(loss_fn, tx, model)
    step = jnp.zeros((), jnp.int32)
    return LocalSGDState(step, local.params, model_state, local.opt_state)

  def exchange(local, own):
    if opt_state == "averaged":
      local = local_steps.mean(local, axis)
    else:
      local = local._replace(params=local_steps.mean(local.params, axis))
    return local, local_steps.tell(loss_fn, own, axis)

  def keep(local, own):
    return local, local_steps.tell(loss_fn, own, axis)

  def step(state: LocalSGDState, batch, key):
    local = local_steps.Local(state.params, state.opt_state)
    local, own = one_step(local, state.model_state, state.step, batch, key)
    done = state.step + 1
    local, (metrics, stats) = jax.lax.cond(
      done % sync_every == 0, exchange, keep, local, own
    )
    new = LocalSGDState(done, local.params, stats, local.opt_state)
    return new, metrics

  def params(state: LocalSGDState):
    whole = local_steps.mean(state.params, axis)
    return variables.join(loss_fn, whole, state.model_state, axis)

  def reshard(state: LocalSGDState, workers: int) -> LocalSGDState:
    return LocalSGDState(
      step=state.step,
      params=local_steps.restack(state.params, workers),
      model_state=variables.reshard(loss_fn, state.model_state, workers),
      opt_state=local_steps.restack(state.opt_state, workers),
    )

  stats = variables.spec(loss_fn, axis)
  specs = LocalSGDState(P(), P(axis), stats, P(axis))
  member = lambda fn, state: fn(
    variables.own(loss_fn, state.params, state.model_state)
  )
  return Method(
    "local_sgd", axis, init, step, params, specs, reshard, member=member
  )
