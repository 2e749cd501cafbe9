"""FSDP: parameters, gradients and optimizer are sharded over the workers.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2019, https://arxiv.org/abs/1910.02054 (its third stage);
Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data
Parallel", 2023, https://arxiv.org/abs/2304.11277.

Each leaf is cut along one of its dimensions. A parameter is gathered where
the loss uses it, and again in the backward pass; its gradient is
reduce-scattered at once. So half as many bytes again as DDP, for each
micro-batch, and nothing whole but what is in use. `init` is the exception: it
cuts a model that every worker has been given whole.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from distrain_jax import gradients, pieces, spmd, variables
from distrain_jax.elementwise import check_elementwise
from distrain_jax.gathering import gathered_by_use
from distrain_jax.method import LossFn, Method, StatefulLoss


class FSDPState(NamedTuple):
  """Bytes a parameter: 16/N in float32 with Adam, gradient included."""

  step: jax.Array  # (), int32
  params: pieces.Cut  # this worker's pieces; no dimension fits: whole leaves
  model_state: Any  # () for a loss without it
  opt_state: optax.OptState  # of the pieces and the whole leaves, as one tree


def fsdp(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
) -> Method:
  """Data parallelism with 1/N of the whole training state on each worker.

  Parameters are gathered one use at a time: of a model that scans over stacked
  layers as they come, one layer is whole. What a loop's iterations share, what
  enters a branch, and a stack that is changed before the scan is gathered once
  for all of it (see `gathering`). What is cast to a narrower dtype before its
  use travels in that dtype.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`; it sees
      whole parameters. Its key is this worker's own for this step.
    tx: an elementwise optimizer. It sees trees of the parameters' structure
      whose leaves are this worker's pieces, so masks and labels by path or
      ndim work; one that needs norms or whole matrices is refused.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches that each worker's share is cut into; each one
      gathers and scatters.
    clip_norm: largest global norm of the averaged gradient; None: no clipping.

  Returns:
    A `Method`. Metrics: loss, grad_norm (before clipping) and loss_fn's aux.

  Raises:
    ValueError: if accumulate or clip_norm are out of range; from `init`, if tx
      is not elementwise.
  """
  gradients.check_accumulate("fsdp", accumulate)
  gradients.check_clip_norm("fsdp", clip_norm)
  gradient = gradients.gradient_fn(_on_pieces(loss_fn, axis), accumulate)

  def init(key, model):
    del key  # nothing random here
    whole, model_state = variables.split(loss_fn, model)
    check_elementwise("fsdp", tx, whole)
    me, n = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    mine = pieces.cut(whole, n, me)
    opt_state = tx.init(pieces.joined(mine))
    return FSDPState(jnp.zeros((), jnp.int32), mine, model_state, opt_state)

  def step(state: FSDPState, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    g = gradient(state.params, state.model_state, batch, key)
    loss, aux, grads, norm = _averaged(g, axis)
    if clip_norm is not None:
      scale = gradients.clip_scale(norm, clip_norm)
      grads = gradients.scale_tree(grads, scale)
    mine = pieces.joined(state.params)
    updates, opt_state = tx.update(pieces.joined(grads), state.opt_state, mine)
    mine = optax.apply_updates(mine, updates)
    new = FSDPState(
      step=state.step + 1,
      params=pieces.sorted_like(mine, state.params),
      model_state=variables.after_step(loss_fn, g.model_state, axis),
      opt_state=opt_state,
    )
    return new, {**aux, "loss": loss, "grad_norm": norm}

  def params(state: FSDPState):
    whole = gathered_by_use(lambda tree: tree)(
      pieces.shards(state.params, axis)
    )
    return variables.join(loss_fn, whole, state.model_state, axis)

  def reshard(state: FSDPState, workers: int) -> FSDPState:
    whole = pieces.unstack(state.params)
    new = pieces.stack(whole, workers)
    first = new._replace(pieces=jax.tree.map(lambda x: x[0], new.pieces))
    alone = jax.eval_shape(tx.init, whole)
    target = jax.eval_shape(tx.init, pieces.joined(first))
    return state._replace(
      params=new,
      opt_state=pieces.restack(state.opt_state, alone, target, workers),
      model_state=variables.reshard(loss_fn, state.model_state, workers),
    )

  specs = FSDPState(
    step=P(),
    params=pieces.Cut(pieces=P(axis), whole=P()),
    model_state=variables.spec(loss_fn, axis),
    opt_state=P(axis),
  )
  return Method("fsdp", axis, init, step, params, specs, reshard)


def _on_pieces(loss_fn, axis: str):
  """The same loss for a `Cut` in the place of the parameters."""
  stateful = isinstance(loss_fn, StatefulLoss)
  by_use = gathered_by_use(loss_fn.fn if stateful else loss_fn)
  fn = lambda mine, *rest: by_use(pieces.shards(mine, axis), *rest)
  return loss_fn._replace(fn=fn) if stateful else fn


def _averaged(g: gradients.Gradient, axis: str):
  """Loss, aux and gradients over the workers, and the gradient's norm.

  Those of the pieces are summed already; the rest travels in one all-reduce.
  """
  n = jax.lax.axis_size(axis)
  mine = jax.tree.map(lambda x: x / n, g.grads.pieces)
  square = gradients.squared_norm(mine)
  rest = (g.loss, g.aux, g.grads.whole)
  rest, square = jax.lax.psum((rest, square), axis)
  loss, aux, whole = jax.tree.map(lambda x: x / n, rest)
  norm = jnp.sqrt(square + gradients.squared_norm(whole))
  return loss, aux, pieces.Cut(mine, whole), norm
