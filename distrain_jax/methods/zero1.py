"""ZeRO-1: the optimizer's state is sharded over the data-parallel workers.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2019, https://arxiv.org/abs/1910.02054.

Reduce-scatter the gradients, update one's own shard, all-gather the
parameters: the bytes of DDP's all-reduce, and 1/N of the optimizer. A shard is
a piece of every leaf, or some whole leaves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import (
  gradients,
  layout,
  leaf_shards,
  sharded_update,
  spmd,
  variables,
)
from distrain_jax.method import LossFn, Method, Params, StatefulLoss
from distrain_jax.pipelining.packing import Packed
from distrain_jax.sharded_update import Shard

SHARDS = ("elements", "leaves")


class Zero1State(NamedTuple):
  """Bytes a parameter: 4 + 4 + 8/N in float32 with Adam, gradient included;
  2 + 2 + 12/N with param_dtype=bfloat16.

  With shard="leaves" 1/N is instead the largest share of a worker, at least
  that of the largest leaf (or layer of one, with `stacked`); of our 1B Llama
  1.00/N for 8 and for 16 workers, 1.9/N for 32, where an embedding is larger
  than 1/N; without `stacked` 1.9/N for 8. Messages are as much longer, and
  gradients are copied for theirs: 4 bytes more meanwhile. With mulo 16 in the
  place of 8.
  """

  step: jax.Array  # (), int32
  params: Params  # the whole model, equal on all workers
  model_state: Any  # () for a loss without it
  masters: Params | None  # this worker's float32 pieces, with param_dtype
  # Of this worker's pieces; of its leaves, packed as in `pipelining.packing`.
  opt_state: optax.OptState | Packed


def zero1(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = None,
  param_dtype: DTypeLike | None = None,
  shard: str = "elements",
  stacked: Any = 0,
) -> Method:
  """Data parallelism with 1/N of the optimizer's state on each worker.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: the optimizer, elementwise with shard="elements". It sees trees of the
      parameters' structure whose leaves are this worker's pieces, so masks and
      labels by path or ndim work; one that needs norms or whole matrices is
      refused.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of the averaged gradient; None: no clipping.
    wire_dtype: dtype in which gradients travel and are summed; None: their
      own. The update is in float32 either way.
    param_dtype: dtype of the parameters that the loss sees and that are
      gathered, e.g. "bfloat16"; float32 masters are then sharded with the
      optimizer. None: the parameters' own dtype and no masters.
    shard: "elements": each worker has 1/N of every leaf. "leaves": each leaf
      has one worker, which updates it whole: for optimizers that need a whole
      matrix but not the others, such as mulo, Muon or Adafactor. They see the
      tree with `optax.MaskedNode` in the place of others' leaves; one that
      needs all leaves at once is refused.
    stacked: with shard="leaves", how many leading axes of a leaf hold layers,
      which may then be on different workers: a number for all leaves, or a
      tree like the parameters. tx is refused if it mixes layers.

  Returns:
    A `Method`. Metrics: loss, grad_norm (before clipping) and loss_fn's aux.

  Raises:
    ValueError: if accumulate, clip_norm, shard, stacked or a dtype are out of
      range; from `init`, if tx is not elementwise, or not leafwise.
  """
  gradients.check_accumulate("zero1", accumulate)
  gradients.check_clip_norm("zero1", clip_norm)
  gradients.check_dtype("zero1", "wire_dtype", wire_dtype)
  gradients.check_dtype("zero1", "param_dtype", param_dtype)
  _check_shard(shard, stacked)
  gradient = gradients.gradient_fn(loss_fn, accumulate)
  by_leaf = shard == "leaves"
  low = param_dtype is not None

  def leaves(params, workers):
    masters = jnp.float32 if low else None
    return leaf_shards.make_leaf_shards(tx, params, workers, stacked, masters)

  def init(key, model):
    del key  # nothing random here
    whole, model_state = variables.split(loss_fn, model)
    if by_leaf:
      mine = leaf_shards.start("zero1", tx, whole, stacked, axis, param_dtype)
    else:
      mine = sharded_update.start("zero1", tx, whole, axis, masters=low)
    if low:
      whole = gradients.cast(whole, param_dtype)
    return Zero1State(jnp.zeros((), jnp.int32), whole, model_state, *mine)

  def step(state: Zero1State, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    g = gradient(state.params, state.model_state, batch, key)
    me, n = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    shards = leaves(state.params, n) if by_leaf else None
    flat = shards.layout if by_leaf else layout.make_layout(state.params, n)
    grads = flat.reduce_scatter(g.grads, axis, wire_dtype)
    square = gradients.squared_norm(grads)  # padding is zero: adds nothing
    loss, aux = jax.lax.pmean((g.loss, g.aux), axis)
    norm = jnp.sqrt(jax.lax.psum(square, axis))
    if clip_norm is not None:
      scale = gradients.clip_scale(norm, clip_norm)
      grads = gradients.scale_tree(grads, scale)
    pieces = state.masters
    if pieces is None:
      pieces = flat.pieces(state.params, me)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, pieces)
    if by_leaf:
      pieces, opt_state = shards.update(grads, state.opt_state, pieces, me)
    else:
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
    mine = Shard(state.masters, state.opt_state)
    if by_leaf:
      mine = moved(mine, state.params, workers)
    else:
      mine = sharded_update.restack(mine, tx, state.params, workers)
    stats = variables.reshard(loss_fn, state.model_state, workers)
    return Zero1State(state.step, state.params, stats, *mine)

  def moved(mine: Shard, params, workers: int) -> Shard:
    """Whole leaves of all workers, to other workers."""
    kept = jax.tree.leaves(mine)
    old = leaves(params, kept[0].shape[0] if kept else 1)
    new = leaves(params, workers)
    masters = None
    if low:
      whole = old.layout.whole(mine.masters)
      masters = new.layout.all_pieces(whole, jnp.float32)
    return Shard(masters, old.restack(mine.opt_state, new))

  specs = Zero1State(
    step=P(),
    params=P(),
    model_state=variables.spec(loss_fn, axis),
    masters=P(axis),
    opt_state=P(axis),
  )
  layout_name = "whole leaves" if by_leaf else ""
  return Method(
    "zero1", axis, init, step, params, specs, reshard, layout=layout_name
  )


def _check_shard(shard: str, stacked: Any) -> None:
  if shard not in SHARDS:
    raise ValueError(
      f"zero1: `shard` is one of {', '.join(SHARDS)}; got {shard!r}."
    )
  if shard == "elements" and stacked != 0:
    raise ValueError(
      "zero1: `stacked` says which leaves hold layers that can be on different "
      "workers, for shard='leaves'. Leave it out with shard='elements', which "
      "divides every leaf."
    )
