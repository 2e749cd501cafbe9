"""How well the subnetworks' gradients agree with the whole model's.

The authors of SDP explain by it why leaving out blocks beats narrowing them: a
subnetwork that keeps the skip connections keeps the direction of the gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distrain_jax import gradients, spmd, variables
from distrain_jax.method import Batch, LossFn, Params, StatefulLoss, Variables
from distrain_jax.methods.sdp.alone import Alone, alone

TINY = 1e-30  # in place of a norm of 0: two such gradients have cosine 0


def alignment(
  loss_fn: LossFn | StatefulLoss,
  params: Params | Variables,
  batch: Batch,
  key: jax.Array,
  *,
  workers: int,
  names: Any,
  shapes: Any,
  **options: Any,
) -> dict[str, jax.Array]:
  """Compares every worker's gradient with the dense one on the same rows.

  One device does all of it, one worker after the other. It may be jitted:
  everything but params, batch and key is static.

  Args:
    loss_fn: as of `sdp`. Where it draws random numbers, as for dropout, both
      gradients have the same key, but not the same draws.
    params: the whole model's, or its Variables.
    batch: as `run.step` takes it: leaves (rows, ...), which are divided among
      the workers.
    key: of the losses; each worker folds its index into it.
    workers: N.
    names, shapes: as of `sdp`.
    **options: those of `sdp` that decide on a subnetwork: coverage, level,
      blocks, masking, assignment, seed, redraw_every, rescale, writers, shared.

  Returns:
    "cosine": (N,), of a worker's gradient with the dense gradient on its rows,
      both restricted to what it holds; 1 with backward masking.
    "cosine_sampled": (N,), the same without what all workers share, of which
      embeddings and heads may outweigh all the rest.
    "norm_ratio": (N,), the first one's norm over the second one's.
    "cosine_to_mean": (), of the means over the holders, which is what the
      optimizer gets, with the dense gradient on all rows.

  Raises:
    ValueError: as `sdp`; or if the rows cannot be divided.
  """
  each = alone(loss_fn, workers=workers, names=names, shapes=shapes, **options)
  whole = Variables(*variables.split(loss_fn, params))
  each.model.check(whole)
  dense = gradients.gradient_fn(loss_fn)

  def one(sums, mine):
    me, rows = mine
    own_key = jax.random.fold_in(key, me)
    grads, held = _of_worker(each, whole, rows, own_key, me)
    wanted = _wide(dense(*whole, rows, own_key).grads)
    here = jax.tree.map(jnp.multiply, wanted, held)
    found = _compare(grads, here)
    sampled = _compare(_sampled(each, grads), _sampled(each, here))
    sums = jax.tree.map(jnp.add, sums, (grads, held, wanted))
    return sums, (*found, sampled[0])

  zeros = jax.tree.map(jnp.zeros_like, _wide(whole.params))
  rows = spmd.split_rows(batch, workers)
  (grads, held, wanted), (cosine, ratio, sampled) = jax.lax.scan(
    one, (zeros,) * 3, (jnp.arange(workers), rows)
  )
  mean = jax.tree.map(jnp.divide, grads, held)
  # Every worker has equally many rows: the sum points where the mean does.
  together, _ = _compare(mean, wanted)
  return {
    "cosine": cosine,
    "cosine_sampled": sampled,
    "norm_ratio": ratio,
    "cosine_to_mean": together,
  }


def _sampled(each: Alone, tree: Params):
  """What is not shared by all workers, as some tree."""
  rest, blocks = each.params.split(tree)
  return each.params.nets.sort(rest).held, blocks


def _of_worker(each: Alone, whole: Variables, rows, key, me):
  """Its gradient, 0 where it holds nothing; and 1 where it does, else 0."""

  def branch(worker: int):
    grads = each.gradient(whole, rows, key, me, worker).grads
    ones = jax.tree.map(jnp.ones_like, grads)
    return each.spread(grads, me), each.spread(ones, me)

  return each.params.blocks.switch(me, branch)


def _compare(a: Params, b: Params) -> tuple[jax.Array, jax.Array]:
  """(cosine, the first one's norm over the second one's): (), ()."""
  products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
  dot = sum(jax.tree.leaves(products), start=jnp.zeros(()))
  norms = [
    jnp.maximum(jnp.sqrt(gradients.squared_norm(x)), TINY) for x in (a, b)
  ]
  return dot / norms[0] / norms[1], norms[0] / norms[1]


def _wide(tree):
  return jax.tree.map(gradients.at_least_float32, tree)
