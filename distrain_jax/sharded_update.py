"""One worker's share of an update: its masters and the optimizer's state.

Gradients come as sums over micro-batches, with their number beside them, so
that workers may contribute different numbers: what divides is the total.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from distrain_jax import gradients, layout
from distrain_jax.elementwise import check_elementwise
from distrain_jax.method import Params


class Shard(NamedTuple):
  """Of one worker: pieces (see `layout`) of the masters, and tx's state."""

  # float32; None: what tx updates are pieces of the whole parameters.
  masters: Params | None
  opt_state: optax.OptState


class Sums(NamedTuple):
  """Gradient sums, of all workers or of one, and over how many micro-batches."""

  grads: Params
  count: jax.Array  # (), float32, of all workers


def start(
  name: str, tx, whole: Params, axis: str, masters: bool = True
) -> Shard:
  """This worker's shard of a whole model, with masters or without.

  Raises:
    ValueError: if tx is not elementwise, on behalf of the method `name`.
  """
  check_elementwise(name, tx, whole)
  me, n = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  return _shard(tx, whole, n, me, masters)


def _shard(tx, whole, workers: int, worker, masters: bool) -> Shard:
  pieces = layout.make_layout(whole, workers).pieces(whole, worker)
  if not masters:
    return Shard(None, tx.init(pieces))
  pieces = gradients.cast(pieces, jnp.float32)
  return Shard(pieces, tx.init(pieces))


def advance(
  tx, shard: Shard, sums: Sums, axis: str, clip_norm: float | None
) -> tuple[Shard, jax.Array]:
  """One update from the pieces of the workers' sums and their total count.

  Returns:
    `(shard, the mean gradient's norm before clipping)`; without a single
    micro-batch the shard as it was, and 0.
  """
  some = sums.count > 0
  weight = 1 / jnp.maximum(sums.count, 1)
  square = jax.lax.psum(gradients.squared_norm(sums.grads), axis)
  norm = jnp.sqrt(square) * weight
  scale = weight * gradients.clip_scale(norm, clip_norm)
  grads = gradients.scale_tree(sums.grads, scale)
  updates, opt_state = tx.update(grads, shard.opt_state, shard.masters)
  new = Shard(optax.apply_updates(shard.masters, updates), opt_state)
  keep = lambda new, old: jnp.where(some, new, old)
  return jax.tree.map(keep, new, shard), jnp.where(some, norm, 0.0)


def restack(stacked: Shard, tx, whole: Params, workers: int) -> Shard:
  """All workers' shards, for another number of workers."""
  masters = stacked.masters is not None
  one_worker = lambda x: _shard(tx, x, workers, 0, masters)
  target = jax.eval_shape(one_worker, whole)
  return layout.restack(stacked, target, workers)


def merge(stacked: Params, workers: int) -> Params:
  """All workers' sums, for another number of workers: the first has them all.

  Args:
    stacked: leaves with a leading axis of workers.
    workers: how many there will be.
  """

  def one(x: jax.Array) -> jax.Array:
    total = x.astype(jnp.float32).sum(0).astype(x.dtype)
    others = jnp.zeros((workers - 1, *total.shape), x.dtype)
    return jnp.concatenate([total[None], others])

  return jax.tree.map(one, stacked)
