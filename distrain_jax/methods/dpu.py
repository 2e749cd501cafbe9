"""Delayed parameter updates (DPU), plain or with weight prediction (WP).

Ren et al., "ZeRO-Offload: Democratizing Billion-Scale Model Training", 2021,
https://arxiv.org/abs/2101.06840, delay an optimizer that runs on the host;
Nabli et al., 2024, https://arxiv.org/abs/2406.02613, hide a sharded update's
communication so, beside micro-batches, and judge ACCO against both. Predicted
weights are those of Chen et al., "Efficient and Robust Parallel DNN Training
through Model Parallelism on Multi-GPU Platform", 2018,
https://arxiv.org/abs/1809.02839, who pipeline layers.

With g_t the workers' mean gradient, on its way while the next one is taken:

  DPU: theta_{t+1} = Opt(theta_t, g_t); meanwhile g_{t+1} is taken at theta_t,
    one update late.
  WP: theta_{t+1} = Opt(theta_t, g_t), and again with the same gradient
    theta~_{t+2} = Opt(theta_{t+1}, g_t), of which only the parameters are kept;
    meanwhile g_{t+1} is taken at theta~_{t+1}.

Every gradient is applied once. The loop that the ACCO paper released clears its
sums only in every other round, and communicates after it has computed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import (
  gradients,
  rounds,
  sharded_update,
  spmd,
  variables,
  wires,
)
from distrain_jax.method import LossFn, Method, Params, StatefulLoss
from distrain_jax.sharded_update import Shard, Sums


class DPUState(NamedTuple):
  """Bytes a parameter with Adam, param_dtype and wire_dtype bfloat16: 4 + 12/N,
  and 2 more within a step, where the next gradient is being summed.
  """

  step: jax.Array  # (), int32
  point: Params  # theta, or its prediction; whole, equal on all workers
  model_state: Any  # () for a loss without it
  shard: Shard  # of theta and the optimizer; this worker's pieces
  grads: Params  # this worker's sum of g_t, on its way
  count: jax.Array  # (), float32: micro-batches of all workers in `grads`


def dpu(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = "bfloat16",
  param_dtype: DTypeLike | None = None,
  warmup: int = 0,
  slices: int | None = None,
  reduction: str | None = None,
) -> Method:
  """Data parallelism that hides its communication and updates a step late.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: an elementwise optimizer, as for `zero1`.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of an update's mean gradient; None: none.
    wire_dtype: dtype in which gradients travel, and wait to; None: their own.
    param_dtype: dtype of the parameters that the loss sees and that are
      gathered; None: their own. The masters are float32.
    warmup: synchronous steps at the start, which equal DDP's.
    slices: into how many parts each collective is cut, to run beside as many
      micro-batches: at most accumulate // 2, the default.
    reduction: `overlap.REDUCTIONS`; None: reduce_scatter, or all_to_all on
      chips that cannot run that beside compute.

  Returns:
    A `Method`; its `params` commits what is pending. Metrics: loss (where the
    gradient was taken), grad_norm (of what the step committed, before clipping)
    and loss_fn's aux. A batch may be a `Counted`.

  Raises:
    ValueError: for an option out of range; from `init`, if tx is not
      elementwise.
  """
  plan = rounds.make_plan(
    "dpu",
    halves=1,
    axis=axis,
    accumulate=accumulate,
    clip_norm=clip_norm,
    wire_dtype=wire_dtype,
    param_dtype=param_dtype,
    slices=slices,
    reduction=reduction,
  )
  return _delayed(plan, loss_fn, tx, warmup, predict=False)


def weight_prediction(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = "bfloat16",
  param_dtype: DTypeLike | None = None,
  warmup: int = 0,
  slices: int | None = None,
  reduction: str | None = None,
) -> Method:
  """`dpu` whose gradients are taken where the late update is expected to lead.

  That is one more step along the latest gradient that has come in. tx's state,
  a schedule's step count included, keeps one of a step's two calls.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`.
    tx: an elementwise optimizer, as for `zero1`.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of an update's mean gradient; None: none.
    wire_dtype: dtype in which gradients travel, and wait to; None: their own.
    param_dtype: dtype of the predicted parameters, which are gathered.
    warmup: synchronous steps at the start, which equal DDP's.
    slices: into how many parts each collective is cut; see `dpu`.
    reduction: how gradients are added up; see `dpu`.

  Returns:
    A `Method`, as from `dpu`: `params` is theta and not a prediction.

  Raises:
    ValueError: as `dpu`.
  """
  plan = rounds.make_plan(
    "weight_prediction",
    halves=1,
    axis=axis,
    accumulate=accumulate,
    clip_norm=clip_norm,
    wire_dtype=wire_dtype,
    param_dtype=param_dtype,
    slices=slices,
    reduction=reduction,
  )
  return _delayed(plan, loss_fn, tx, warmup, predict=True)


def _delayed(
  plan: rounds.Plan, loss_fn, tx, warmup: int, *, predict: bool
) -> Method:
  """Both methods; `predict`: whether the next gradient is taken ahead."""
  rounds.check_warmup(plan.name, warmup)
  axis = plan.axis
  one = gradients.microbatch_fn(loss_fn)

  def advance(shard: Shard, sums: Sums):
    return sharded_update.advance(tx, shard, sums, axis, plan.clip_norm)

  def init(key, model):
    del key  # nothing random here
    whole, model_state = variables.split(loss_fn, model)
    shard = sharded_update.start(plan.name, tx, whole, axis)
    if plan.param_dtype is not None:
      whole = gradients.cast(whole, plan.param_dtype)
    return DPUState(
      step=jnp.zeros((), jnp.int32),
      point=whole,
      model_state=model_state,
      shard=shard,
      grads=rounds.waiting(plan, jax.tree.map(jnp.zeros_like, whole)),
      count=jnp.zeros((), jnp.float32),
    )

  def step(state: DPUState, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    todo = rounds.share(plan, loss_fn, batch)

    def turn(sums):
      given = Sums(sums, state.count)
      new, norm = advance(state.shard, given)
      ahead = advance(new, given)[0] if predict else new
      return ahead.masters, (new, norm)

    sums, point, (shard, norm) = rounds.half(
      plan,
      one,
      todo,
      key,
      0,
      state.point,
      state.model_state,
      state.grads,
      turn,
      wires.Plain(),
    )
    new = DPUState(
      step=state.step + 1,
      point=point,
      model_state=sums.model_state,
      shard=shard,
      grads=rounds.waiting(plan, sums.grads),
      count=todo.totals[0],
    )
    return rounds.conclude(plan, loss_fn, new, norm, sums, todo, warmup, commit)

  def commit(state: DPUState) -> tuple[DPUState, jax.Array]:
    """The pending update with nothing beside it, and its gradient's norm."""
    pending = Sums(state.grads, state.count)
    theta, shard, norm = rounds.commit_now(
      plan, advance, state.shard, state.point, pending
    )
    new = state._replace(
      point=theta,
      shard=shard,
      grads=jax.tree.map(jnp.zeros_like, state.grads),
      count=jnp.zeros_like(state.count),
    )
    return new, norm

  def params(state: DPUState):
    theta = commit(state)[0].point
    return variables.join(loss_fn, theta, state.model_state, axis)

  def reshard(state: DPUState, workers: int) -> DPUState:
    return state._replace(
      model_state=variables.reshard(loss_fn, state.model_state, workers),
      shard=sharded_update.restack(state.shard, tx, state.point, workers),
      grads=sharded_update.merge(state.grads, workers),
    )

  specs = DPUState(
    step=P(),
    point=P(),
    model_state=variables.spec(loss_fn, axis),
    shard=P(axis),
    grads=P(axis),
    count=P(),
  )
  return Method(plan.name, axis, init, step, params, specs, reshard)
