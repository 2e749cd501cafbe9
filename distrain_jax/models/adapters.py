"""Models of other libraries, as the params and loss_fn that methods take.

Both adapters take a `loss(model, batch, key) -> (loss, aux)` that calls the
model as its library would: a scalar, and a dict of scalars, both means over the
batch's rows. Haiku and Linen models need no adapter: their parameters are plain
pytrees already.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

from distrain_jax.method import (
  Batch,
  LossFn,
  Metrics,
  Params,
  StatefulLoss,
  Variables,
  stateful,
)

ModelLoss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]


class Adapted(NamedTuple):
  """A model in two halves: what is trained, and how it is used."""

  params: Params | Variables  # for run.init(key, params)
  loss_fn: LossFn | StatefulLoss  # for dj.ddp(loss_fn, tx)
  merge: Callable[[Params | Variables], Any]  # run.params(state) -> the model


def nnx(
  model: flax_nnx.Module, loss: ModelLoss, *, stats: str = "averaged"
) -> Adapted:
  """A Flax NNX model for any method. The given model is not changed.

  Trained are its `nnx.Param`s of a floating dtype, as a nested dict of arrays.
  Other variables (`nnx.BatchStat`, counters, whole numbers) are non-trained
  state, where there are any; what `loss` does to them is kept. Random streams
  (`nnx.Rngs`) start anew at every step from the key that `loss` is given, so
  that dropout differs by step and worker, and nothing of it is state.
  `nnx.Intermediate`s are dropped.

  Args:
    model: in the mode that it is trained in (`model.train()`).
    loss: see the module.
    stats: for models with non-trained state, as for `method.stateful`.

  Returns:
    `(params, loss_fn, merge)`; params are `Variables` where there is state.
    `merge(...)` is in the given model's mode: call `.eval()` to evaluate.
  """

  def trained(path, variable):
    del path
    is_param = isinstance(variable, flax_nnx.Param)
    return is_param and jnp.issubdtype(variable.dtype, jnp.inexact)

  kinds = (trained, flax_nnx.RngState, flax_nnx.Intermediate, ...)

  def split(model):
    graph, *states = flax_nnx.split(model, *kinds)
    return graph, *map(flax_nnx.to_pure_dict, states)

  graph, params, streams, seen, state = split(model)

  def merge(variables):
    if not isinstance(variables, Variables):
      variables = Variables(variables, state)
    return flax_nnx.merge(graph, *variables, streams, seen)

  def with_state(params, model_state, batch, key):
    reseeded = _reseed(streams, key)
    model = flax_nnx.merge(graph, params, model_state, reseeded, seen)
    value, aux = loss(model, batch, key)
    *_, model_state = split(model)
    return value, (aux, model_state)

  def without_state(params, batch, key):
    value, (aux, _) = with_state(params, state, batch, key)
    return value, aux

  if not jax.tree.leaves(state):
    return Adapted(params, without_state, merge)
  loss_fn = stateful(with_state, stats=stats)
  return Adapted(Variables(params, state), loss_fn, merge)


def _reseed(streams: Any, key: jax.Array) -> Any:
  """The streams' keys replaced by `key` folded with each one's position."""
  leaves, treedef = jax.tree.flatten(streams)
  for k, leaf in enumerate(leaves):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaves[k] = jax.random.split(jax.random.fold_in(key, k), leaf.shape)
  return jax.tree.unflatten(treedef, leaves)


def equinox(model: Any, loss: ModelLoss) -> Adapted:
  """An Equinox model for any method.

  Trained are its arrays of a floating dtype; everything else (activations,
  whole numbers, keys) stays as it is. Models with an `equinox.nn.State` pass a
  loss of their own to `method.stateful`, and the state as model_state.

  Args:
    model: any `equinox.Module`.
    loss: see the module. The key is for the model's dropout.

  Returns:
    `(params, loss_fn, merge)`; params have the model's structure, with None in
    place of what is not trained.

  Raises:
    ImportError: if Equinox is not installed.
  """
  try:
    import equinox as eqx  # optional: only this function needs it
  except ImportError as error:
    raise ImportError(
      "models.adapters.equinox needs Equinox: pip install equinox"
    ) from error
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def merge(params):
    return eqx.combine(params, static)

  def loss_fn(params, batch, key):
    return loss(merge(params), batch, key)

  return Adapted(params, loss_fn, merge)
