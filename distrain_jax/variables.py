"""Non-trained state, such as BatchNorm's statistics, across the workers.

`method.stateful` says what its three treatments mean; a method calls these
functions and need not know which one was chosen. A loss without such state
has () in its place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distrain_jax.method import LossFn, Params, StatefulLoss, Variables


def split(loss_fn: LossFn | StatefulLoss, model) -> tuple[Params, Any]:
  """`(params, model_state)` of what the user passed as params.

  Raises:
    TypeError: if the loss is stateful and `variables` are not, or reversed.
  """
  given = isinstance(model, Variables)
  if isinstance(loss_fn, StatefulLoss) == given:
    return model if given else (model, ())
  if given:
    raise TypeError(
      "params are Variables(params, model_state), but loss_fn takes params "
      "only. Wrap it: stateful(loss_fn), with loss_fn(params, model_state, "
      "batch, key) -> (loss, (aux, model_state))."
    )
  raise TypeError(
    "loss_fn is stateful, so params must be Variables(params, model_state); "
    f"got {type(model).__name__}."
  )


def join(loss_fn, params: Params, model_state, axis: str):
  """The model to evaluate: what `split` took, local statistics averaged."""
  if not isinstance(loss_fn, StatefulLoss):
    return params
  if loss_fn.stats == "local":
    model_state = _average(model_state, axis)
  return Variables(params, model_state)


def own(loss_fn, params: Params, model_state):
  """A worker's own model: what `split` took, nothing averaged."""
  if not isinstance(loss_fn, StatefulLoss):
    return params
  return Variables(params, model_state)


def after_step(loss_fn, model_state, axis: str):
  """What the workers do with model_state at the end of a step."""
  if _stats(loss_fn) == "averaged":
    return _average(model_state, axis)
  return model_state


def spec(loss_fn, axis: str) -> P:
  """The PartitionSpec of model_state in a method's `specs`."""
  return P(axis) if _stats(loss_fn) == "local" else P()


def reshard(loss_fn, model_state, workers: int):
  """For another number of workers; local statistics start from their mean."""
  if _stats(loss_fn) != "local":
    return model_state

  def one(x):
    mean = x.mean(0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]
    return jnp.broadcast_to(mean, (workers, *mean.shape))

  return jax.tree.map(one, model_state)


def _stats(loss_fn) -> str | None:
  return loss_fn.stats if isinstance(loss_fn, StatefulLoss) else None


def _average(tree, axis: str):
  """Mean over the workers of floating leaves; others are equal already."""

  def one(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.pmean(x, axis) if floating else x

  return jax.tree.map(one, tree)
