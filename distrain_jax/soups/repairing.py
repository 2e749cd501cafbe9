"""REPAIR: an averaged network whose units vary as much as the members' do.

Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation
Repair", 2022, https://arxiv.org/abs/2211.08403.

Averaged weights give pre-activations of too little variance, more so with every
layer. Here each channel of the average is rescaled and shifted so that its mean
and standard deviation are the weighted means of the members'. As in the paper,
the outputs of the network itself are left alone; unlike there, statistics are
those of all batches together, and the corrected network has them exactly.

Letters in shapes: c channels out of a layer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.method import Variables
from distrain_jax.models import layers as ours
from distrain_jax.soups import averages, trees

KINDS = (nn.Dense, nn.Conv, ours.Dense, ours.Conv)
STATISTICS, SEEN = "batch_stats", "repair"  # collections
EXACT = 1e-4  # how near a statistic has to come, of mean and deviation
CONSTANT = 1e-6  # a channel's deviation, of its target's: nothing to rescale


class Repaired(NamedTuple):
  """What `repair` returns."""

  model: Any
  layers: tuple[str, ...]  # which were corrected, in the order of the calls
  left: dict[str, str]  # the other Dense and Conv layers -> why not


def repair(
  module: nn.Module,
  models: Sequence[Any],
  batches: Iterable[Any],
  *,
  weights: Sequence[float] | None = None,
  inputs: str = "image",
  layers: Callable[[str], bool] | None = None,
) -> Repaired:
  """The weighted average of models, its Dense and Conv layers corrected.

  With (m, s) mean and deviation of a channel's pre-activation y over all rows
  (and places of a convolution), for the average, and (M, S) the weighted means
  of the members': y becomes (y - m) S / s + M, by new kernels and biases. At
  first all layers at once, in one pass over the batches: what is before a layer
  is corrected batch by batch when its y is measured. Of several batches that is
  a good guess; further passes, at most one a layer, make it exact on them.

  A layer without a bias has no place for the shift and is left as it is. In our
  models a BatchNorm or GroupNorm follows it. Where BatchNorm follows a layer,
  with a bias or not, its own statistics undo any rescaling and shift: nothing
  has to be done there but to estimate them anew for the average, which the
  caller does in any network with BatchNorm, after this (`train.recalibrator`,
  or `config.evaluation.recalibrate`). Such networks are run in training mode
  here, by the statistics of the batches. A layer with a bias before any other
  norm is corrected as all others.

  Args:
    module: a Linen module, `apply(variables, x, train=...)`, which calls each
      of its `nn.Dense`, `nn.Conv` or our layers of these names at most once.
    models: its members: params, or `Variables`, as for `uniform`.
    batches: of training data; rows count alike.
    weights: of the members; None: equal.
    inputs: key of the module's input in a batch.
    layers: (path, as "stage_0_block_0/conv_0") -> whether to correct it; None:
      all but the layer that is called last, whose outputs are the network's.

  Raises:
    ValueError: as `weighted`; for no batches; if there is nothing to correct;
      for a layer that is called twice or stacked by `nn.scan`: its channels
      have several statistics but one place in the parameters (or none).
  """
  if weights is None:
    merged = averages.uniform(models)
    weights = [1 / len(models)] * len(models)
  else:
    merged = averages.weighted(models, weights)
    weights = averages.check_weights("repair", weights, len(models))
  batches = [batch[inputs] for batch in batches]
  if not batches:
    raise ValueError(
      "repair: `batches` is empty, but the layers' statistics are to be those "
      "of some batches. Pass at least one."
    )
  chosen, left = repairable(module, models[0], batches[0], layers)
  if not chosen:
    raise ValueError(
      f"repair: no layer can be corrected: {reasons(left)}. A network with "
      "BatchNorm only needs its statistics estimated anew "
      "(train.recalibrator)."
    )
  forward = jax.jit(lambda *args: _forward(module, chosen, *args))
  rows = [len(x) for x in batches]
  first, seen = [], [[] for _ in models]
  for x in batches:
    each = [forward(model, x, None) for model in models]
    first.append(forward(merged, x, _weighted(weights, each)))
    for of_model, statistics in zip(seen, each):
      of_model.append(statistics)
  target = _weighted(weights, [_pool(x, rows) for x in seen])
  model = _corrected(merged, _pool(first, rows), target)
  for _ in chosen:
    own = _pool([forward(model, x, None) for x in batches], rows)
    if all(_near(own[name], target[name]) for name in chosen):
      break
    model = _corrected(model, own, target)
  return Repaired(model, chosen, left)


def repairable(
  module: nn.Module,
  model: Any,
  x: Any,
  layers: Callable[[str], bool] | None = None,
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


def _forward(module, layers, model, x, targets):
  """Layer -> its (mean, deviation), (2, c) float32; corrected to targets."""

  def look(layer, y):
    name = "/".join(layer.path)
    if name not in layers:
      return y
    channels = y.astype(jnp.float32).reshape(-1, y.shape[-1])
    mean = channels.mean(0, keepdims=True)  # (1, c)
    centred = channels - mean
    deviation = jnp.sqrt(jnp.square(centred).mean(0, keepdims=True))
    found = jnp.concatenate([mean, deviation])
    # Not a closure's: under nn.remat a value must not leave by the side.
    layer.sow(SEEN, "found", found)
    if targets is None:
      return y
    target = targets[name]
    new = centred * _scale(deviation, target[1:]) + target[:1]
    return new.reshape(y.shape).astype(y.dtype)

  seen = _apply(module, model, x, look)
  return {name: _at(seen, name.split("/"))["found"][0] for name in layers}


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


def _pool(batches, rows) -> dict[str, np.ndarray]:
  """Statistics of all rows, in float64, from those of each batch."""

  def one(*found):
    mean, deviation = np.moveaxis(np.array(found, np.float64), 1, 0)  # (k, c)
    whole = np.average(mean, 0, rows)
    apart = np.square(mean - whole[None])
    variance = np.average(np.square(deviation) + apart, 0, rows)
    return np.stack([whole, np.sqrt(variance)])

  return jax.tree.map(one, *batches)


def _scale(deviation, target):
  """target / deviation; 1 for a channel that does not vary."""
  xp = np if isinstance(deviation, np.ndarray) else jnp
  varies = deviation > CONSTANT * target
  return xp.where(varies, target / xp.where(varies, deviation, 1), 1)


def _weighted(weights, each):
  """The weighted mean of the members' statistics."""
  mean = lambda *xs: sum(w * x for w, x in zip(weights, xs))
  return jax.tree.map(mean, *each)


def _near(own, target) -> bool:
  """Whether means and deviations are what they should be."""
  return bool(np.all(np.abs(own - target) <= EXACT * np.abs(target).sum(0)))


def _corrected(model, own, target):
  """The model with its layers' kernels and biases rescaled and shifted."""
  params = trees.trained(model)
  for name, statistics in own.items():
    params = _set(params, name.split("/"), statistics, target[name])
  if isinstance(model, Variables):
    return model._replace(params=params)
  return params


def _set(params, keys, own, target):
  """As `_corrected`, of one layer."""
  if keys:
    key, *rest = keys
    return {**params, key: _set(params[key], rest, own, target)}
  scale = _scale(own[1], target[1])  # (c,)
  kernel, bias = params["kernel"], params["bias"]
  wide = lambda x: np.asarray(x).astype(np.float64)
  rescaled = wide(kernel) * scale.reshape((1,) * (kernel.ndim - 1) + (-1,))
  shifted = (wide(bias) - own[0]) * scale + target[0]
  new = {
    "kernel": jnp.asarray(rescaled, kernel.dtype),
    "bias": jnp.asarray(shifted, bias.dtype),
  }
  return {**params, **new}


def _at(tree, path):
  """What a tree of dicts has at a path; None if nothing."""
  for key in path:
    if key not in tree:
      return None
    tree = tree[key]
  return tree
