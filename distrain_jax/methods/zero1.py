"""ZeRO-1: the optimizer's state is sharded over the data-parallel workers.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2019, https://arxiv.org/abs/1910.02054.

Reduce-scatter the gradients, update one's own shard, all-gather the
parameters: the bytes of DDP's all-reduce, and 1/N of the optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import gradients, layout, sharded_update, spmd, variables
from distrain_jax.method import LossFn, Method, Params, StatefulLoss
from distrain_jax.sharded_update import Shard


class Zero1State(NamedTuple):
  """Bytes a parameter: 4 + 4 + 8/N in float32 with Adam, gradient included;
  2 + 2 + 12/N with param_dtype=bfloat16.
  """

  step: jax.Array  # (), int32
  params: Params  # the whole model, equal on all workers
  model_state: Any  # () for a loss without it
  masters: Params | None  # this worker's float32 pieces, with param_dtype
  opt_state: optax.OptState  # of this worker's pieces


def zero1(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = None,
  param_dtype: DTypeLike | None = None,
) -> Method:
  """Data parallelism with 1/N of the optimizer's state on each worker.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: an elementwise optimizer. It sees trees of the parameters' structure
      whose leaves are this worker's pieces, so masks and labels by path or
      ndim work; one that needs norms or whole matrices is refused.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of the averaged gradient; None: no clipping.
    wire_dtype: dtype in which gradients travel and are summed; None: their
      own. The update is in float32 either way.
    param_dtype: dtype of the parameters that the loss sees and that are
      gathered, e.g. "bfloat16"; float32 masters are then sharded with the
      optimizer. None: the parameters' own dtype and no masters.

  Returns:
    A `Method`. Metrics: loss, grad_norm (before clipping) and loss_fn's aux.

  Raises:
    ValueError: if accumulate, clip_norm or a dtype are out of range; from
      `init`, if tx is not elementwise.
  """
  gradients.check_accumulate("zero1", accumulate)
  gradients.check_clip_norm("zero1", clip_norm)
  gradients.check_dtype("zero1", "wire_dtype", wire_dtype)
  gradients.check_dtype("zero1", "param_dtype", param_dtype)
  gradient = gradients.gradient_fn(loss_fn, accumulate)

  def init(key, model):
    del key  # nothing random here
    whole, model_state = variables.split(loss_fn, model)
    low = param_dtype is not None
    shard = sharded_update.start("zero1", tx, whole, axis, masters=low)
    if low:
      whole = gradients.cast(whole, param_dtype)
    return Zero1State(jnp.zeros((), jnp.int32), whole, model_state, *shard)

  def step(state: Zero1State, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    g = gradient(state.params, state.model_state, batch, key)
    flat = layout.make_layout(state.params, jax.lax.axis_size(axis))
    grads = flat.reduce_scatter(g.grads, axis, wire_dtype)
    square = gradients.squared_norm(grads)  # padding is zero: adds nothing
    loss, aux = jax.lax.pmean((g.loss, g.aux), axis)
    norm = jnp.sqrt(jax.lax.psum(square, axis))
    if clip_norm is not None:
      scale = gradients.clip_scale(norm, clip_norm)
      grads = gradients.scale_tree(grads, scale)
    pieces = state.masters
    if pieces is None:
      pieces = flat.pieces(state.params, jax.lax.axis_index(axis))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, pieces)
    updates, opt_state = tx.update(grads, state.opt_state, pieces)
    pieces = optax.apply_updates(pieces, updates)
    model_state = variables.after_step(loss_fn, g.model_state, axis)
    new = Zero1State(
      step=state.step + 1,
      params=flat.all_gather(pieces, axis),
      model_state=model_state,
      masters=None if state.masters is None else pieces,
      opt_state=opt_state,
    )
    return new, {**aux, "loss": loss, "grad_norm": norm}

  def params(state: Zero1State):
    return variables.join(loss_fn, state.params, state.model_state, axis)

  def reshard(state: Zero1State, workers: int) -> Zero1State:
    shard = Shard(state.masters, state.opt_state)
    shard = sharded_update.restack(shard, tx, state.params, workers)
    stats = variables.reshard(loss_fn, state.model_state, workers)
    return Zero1State(state.step, state.params, stats, *shard)

  specs = Zero1State(
    step=P(),
    params=P(),
    model_state=variables.spec(loss_fn, axis),
    masters=P(axis),
    opt_state=P(axis),
  )
  return Method("zero1", axis, init, step, params, specs, reshard)
