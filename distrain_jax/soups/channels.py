"""Channels of Dense and Conv layers: measured in a forward pass, and corrected.

What REPAIR (`soups.repairing`) needs of a Linen module, whichever models it is
given. Everything but `repairable` and `reasons` may be traced.

Letters in shapes: c channels out of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.gradients import at_least_float32
from distrain_jax.method import Variables
from distrain_jax.models import layers as ours
from distrain_jax.soups import trees

KINDS = (nn.Dense, nn.Conv, ours.Dense, ours.Conv)
STATISTICS, SEEN = "batch_stats", "repair"  # collections
CONSTANT = 1e-6  # a channel's deviation, of its target's: nothing to rescale

Chosen = Callable[[str], bool]
# Layer, as "stage_0_block_0/conv_0" -> means and deviations, (2, c) float32.
Statistics = Mapping[str, jax.Array]


def chosen(
  module: nn.Module, model: Any, x: Any, layers: Chosen | None
) -> tuple[tuple[str, ...], dict[str, str]]:
  """As `repairable`; a ValueError if there is nothing to correct."""
  found, left = repairable(module, model, x, layers)
  if not found:
    raise ValueError(
      f"repair: no layer can be corrected: {reasons(left)}. A network with "
      "BatchNorm only needs its statistics estimated anew "
      "(train.recalibrator)."
    )
  return found, left


def repairable(
  module: nn.Module, model: Any, x: Any, layers: Chosen | None = None
) -> tuple[tuple[str, ...], dict[str, str]]:
  """Which layers `repair` corrects, and of the others why not.

  Args:
    module, layers: as for `repair`.
    model: one of its members, or its shapes.
    x: an input, or its shape; nothing is computed.

  Raises:
    ValueError: as `repair`, for layers that are called twice or stacked.
  """
  calls: dict[str, Any] = {}

  def look(layer, y):
    name = "/".join(layer.path)
    own = layer.variables["params"]
    stored = _at(trees.trained(model), layer.path)
    same = stored is not None and stored["kernel"].shape == own["kernel"].shape
    if name in calls or not same:
      what = "is called twice" if name in calls else "is stacked, as by nn.scan"
      raise ValueError(
        f"repair: {name} {what}, so its channels have several statistics, and "
        "no parameters of their own for each. Average such a model plainly."
      )
    calls[name] = "bias" in own
    return y

  jax.eval_shape(lambda *args: _apply(module, *args, look), model, x)
  last = next(reversed(calls), None)
  wanted = layers or (lambda name: name != last)
  left = {
    name: "has no bias to take the shift" if wanted(name) else "was not chosen"
    for name, has_bias in calls.items()
    if not (has_bias and wanted(name))
  }
  if layers is None and last in left:
    left[last] = "has the network's outputs"
  return tuple(name for name in calls if name not in left), left


def reasons(left: Mapping[str, str]) -> str:
  """Why layers are left alone, in words.

  >>> reasons({"a": "has no bias", "b": "has no bias", "c": "is last"})
  'a has no bias (as 1 more); c is last'
  """
  by_reason: dict[str, list[str]] = {}
  for name, why in left.items():
    by_reason.setdefault(why, []).append(name)
  more = lambda names: f" (as {len(names) - 1} more)" * (len(names) > 1)
  found = [f"{x[0]} {why}{more(x)}" for why, x in by_reason.items()]
  return "; ".join(found) or "none is a Dense or Conv"


def measure(
  module: nn.Module,
  layers: Sequence[str],
  model: Any,
  x: Any,
  targets: Statistics | None = None,
  average: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Statistics:
  """Statistics of the layers' outputs over all rows, and places, of x.

  Args:
    module, layers, model: some of the layers that `repairable` tells of it.
    x: an input.
    targets: with them, what leaves a layer is corrected to them before it goes
      on, so that what is found is of layers whose input is corrected.
    average: of (1, c), over those who have a part of the rows each.
  """

  def look(layer, y):
    name = "/".join(layer.path)
    if name not in layers:
      return y
    channels = y.astype(jnp.float32).reshape(-1, y.shape[-1])
    mean = average(channels.mean(0, keepdims=True))
    centred = channels - mean
    variance = average(jnp.square(centred).mean(0, keepdims=True))
    deviation = jnp.sqrt(variance)
    # Not a closure's: under nn.remat a value must not leave by the side.
    layer.sow(SEEN, "found", jnp.concatenate([mean, deviation]))
    if targets is None:
      return y
    target = targets[name]
    new = centred * _scale(deviation, target[1:]) + target[:1]
    return new.reshape(y.shape).astype(y.dtype)

  seen = _apply(module, model, x, look)
  return {name: _at(seen, name.split("/"))["found"][0] for name in layers}


def corrected(model: Any, own: Statistics, target: Statistics) -> Any:
  """The model with kernels and biases that turn own statistics into target's."""
  params = trees.trained(model)
  for name, statistics in own.items():
    params = _set(params, name.split("/"), statistics, target[name])
  if isinstance(model, Variables):
    return model._replace(params=params)
  return params


def _apply(module, model, x, look):
  """Runs the module with `look(layer, output)` on the layers' way out."""
  params, state = model if isinstance(model, Variables) else (model, {})
  train = bool(state.get(STATISTICS))
  if train:
    # Here, as the trainer is much to load and nothing else here needs it.
    from distrain_jax.train.recalibrate import QUIET

    module = module.clone(
      **{k: v for k, v in QUIET.items() if hasattr(module, k)}
    )

  def intercept(call, args, kwargs, context):
    y = call(*args, **kwargs)
    layer = context.module
    if isinstance(layer, KINDS) and context.method_name == "__call__":
      return look(layer, y)
    return y

  with nn.intercept_methods(intercept):
    _, changed = module.apply(
      {"params": params, **state},
      x,
      train=train,
      mutable=[*state, SEEN] if train else [SEEN],
      rngs={"dropout": jax.random.key(0)},
    )
  return changed.get(SEEN, {})


def _scale(deviation, target):
  """target / deviation; 1 for a channel that does not vary."""
  varies = deviation > CONSTANT * target
  return jnp.where(varies, target / jnp.where(varies, deviation, 1), 1)


def _set(params, keys, own, target):
  """As `corrected`, of one layer."""
  if keys:
    key, *rest = keys
    return {**params, key: _set(params[key], rest, own, target)}
  scale = _scale(own[1], target[1])  # (c,)
  kernel, bias = params["kernel"], params["bias"]
  rescaled = at_least_float32(kernel) * ours.along_channels(scale, kernel)
  shifted = (at_least_float32(bias) - own[0]) * scale + target[0]
  new = {
    "kernel": rescaled.astype(kernel.dtype),
    "bias": shifted.astype(bias.dtype),
  }
  return {**params, **new}


def _at(tree, path):
  """What a tree of dicts has at a path; None if nothing."""
  for key in path:
    if key not in tree:
      return None
    tree = tree[key]
  return tree
