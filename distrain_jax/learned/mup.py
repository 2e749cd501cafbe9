"""muP: from a model's axes to the multiplier of each parameter's step.

Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466;
Thérien et al., 2024, https://arxiv.org/abs/2406.00153, who divide a learned
step by the fan in itself (absolute), not by its ratio to a base (relative).

The rules hold for a model that is in muP: hidden kernels start at 1 / sqrt(fan
in), the output layer's result is divided by its fan in, and attention logits by
the head's size, not by its root. Our models are so with `mup=True`, for absolute
multipliers; whether another one is, `coord_check` shows.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from distrain_jax.learned import matching
from distrain_jax.learned.kinds import KINDS, MuInfo

# Names of axes that grow with the width, without the number at their end.
WIDTH = frozenset(
  [
    "conv_in",
    "conv_out",
    "embed",
    "head_dim",
    "heads",
    "hidden",
    "inner",
    "kv",
    "mlp",
    "queries",
  ]
)
LAYERS = frozenset({"layers"})
# Neighbouring axes of these names are one: all of them are contracted, or none.
ATTENTION = frozenset({"heads", "queries", "head_dim", "kv"})
MODES = ("absolute", "relative")


def mup_info(
  params: Any,
  *,
  names: Any = None,
  other: Any = None,
  base: Any = None,
  mode: str = "absolute",
  overrides: Mapping[str, str] | None = None,
  stacked: int = 0,
  width: Collection[str] = WIDTH,
) -> Any:
  """What muP knows of each parameter, for `mulo`, `mup_adamw`, `mup_sgd`.

  Args:
    params: arrays, or anything with shapes (`jax.eval_shape`); what is held
      elsewhere (`optax.MaskedNode`, None) is passed over.
    names: a tree like params with a tuple of logical axis names in each place;
      for our models `models.logical_names(model, example)`.
    other: shapes of the same model at another width: axes that differ grow.
      Without names; of a kernel, all axes but the last are contracted.
    base: shapes at the width that multipliers are relative to.
    mode: "absolute": 1 / fan in, as learned optimizers have it; "relative":
      base fan in / fan in, which needs `base`.
    overrides: regular expressions for paths such as "['head']['kernel']" ->
      one of input, hidden, output, fixed, for what names and shapes get wrong.
    stacked: leading axes of every parameter that hold layers, where there are
      no names (with names, axes called `layers` are).
    width: names that grow, without the number at their end.

  Returns:
    A tree like params of `MuInfo`.

  Raises:
    ValueError: an unknown mode or kind, a missing base, an override that fits
      no parameter, names or shapes that do not fit the parameters.

  Warns:
    UserWarning: listing parameters whose kind is a guess from one shape.

  >>> shape = jax.ShapeDtypeStruct((64, 64), "float32")
  >>> mup_info({"w": shape}, names={"w": ("embed", "mlp")})["w"].kind
  'hidden'
  """
  if mode not in MODES:
    raise ValueError(f"mup_info: `mode` is absolute or relative; got {mode!r}.")
  if mode == "relative" and base is None:
    raise ValueError(
      "mup_info: mode='relative' compares with a base width. Pass base=, the "
      "shapes of the same model there, e.g. jax.eval_shape(init, key)."
    )
  flat, treedef = jax.tree_util.tree_flatten_with_path(params)
  paths = [jax.tree_util.keystr(path) for path, _ in flat]
  shapes = [tuple(np.shape(x)) for _, x in flat]
  axes = _leaves("names", names, params, shapes)
  others = _leaves("other", other, params, shapes)
  bases = _leaves("base", base, params, shapes)
  found = []
  for i, shape in enumerate(shapes):
    if axes is not None:
      info = _by_names(shape, axes[i], width)
    elif others is not None:
      info = _by_widths(shape, others[i], stacked)
    else:
      info = _guess(shape, stacked)
    if mode == "relative":
      at_base = _fans(bases[i], _split_of(shape, axes and axes[i], stacked))
      info = dataclasses.replace(
        info, base_fan_in=at_base[0], base_fan_out=at_base[1]
      )
    found.append(info)
  is_part = any(map(matching.is_hole, _places(params)))
  found = _override(found, paths, overrides or {}, is_part)
  guessed = [p for p, info in zip(paths, found) if info.guessed]
  if guessed:
    warnings.warn(
      f"mup_info: guessed from one shape what grows in {len(guessed)} "
      f"parameters: {', '.join(guessed)}. Pass names=, other= or overrides=.",
      stacklevel=2,
    )
  return treedef.unflatten(found)


def mup_multipliers(params: Any, **options: Any) -> Any:
  """`mup_info`'s multipliers of learned (or Adam's) steps, as numbers.

  Args:
    params: as for `mup_info`.
    **options: as for `mup_info`.

  Returns:
    A tree like params of floats.
  """
  info = mup_info(params, **options)
  return jax.tree.map(lambda x: x.multiplier, info)


def _places(params):
  """The leaves and, between them, the holes."""
  return jax.tree.leaves(params, is_leaf=matching.is_hole)


def _leaves(name, tree, params, shapes):
  """A tree's leaves in the parameters' order; tuples and shapes of arrays."""
  if tree is None:
    return None
  treedef = jax.tree.structure(params, is_leaf=matching.is_hole)
  try:
    leaves = treedef.flatten_up_to(tree)
  except (ValueError, TypeError) as e:
    raise ValueError(
      f"mup_info: `{name}` is no tree like the parameters: {e}"
    ) from e
  known = zip(_places(params), leaves)
  leaves = [x for place, x in known if not matching.is_hole(place)]
  is_shape = lambda x: isinstance(x, tuple)
  leaves = [x if is_shape(x) else tuple(np.shape(x)) for x in leaves]
  for leaf, shape in zip(leaves, shapes):
    if len(leaf) != len(shape):
      raise ValueError(
        f"mup_info: `{name}` has {leaf} for a parameter of shape {shape}; "
        "wanted one entry an axis."
      )
  return leaves


def _kind(name: str) -> str:
  stem, _, number = name.rpartition("_")
  return stem if number.isdecimal() else name


def _split_of(shape, axes, stacked) -> tuple[int, int]:
  """Where layers end and where the contracted axes end.

  The last axis is not contracted, nor are those that belong to it; a bias has
  no contracted axes.
  """
  if axes is None:
    return stacked, max(stacked, len(shape) - 1)
  kinds = [_kind(name) for name in axes]
  start = 0
  while start < len(kinds) and kinds[start] in LAYERS:
    start += 1
  # Neighbours within attention are one group, others one each.
  groups = []
  for i in range(start, len(kinds)):
    joined = i > start and {kinds[i - 1], kinds[i]} <= ATTENTION
    if not joined:
      groups.append(i)
  return start, groups[-1] if groups else start


def _fans(shape, split) -> tuple[int, int]:
  start, middle = split
  return math.prod(shape[start:middle]), math.prod(shape[middle:])


def _info(shape, split, grows, guessed=False) -> MuInfo:
  start, middle = split
  kinds = {
    (True, True): "hidden",
    (False, True): "input",
    (True, False): "output",
    (False, False): "fixed",
  }
  kind = kinds[any(grows[start:middle]), any(grows[middle:])]
  fans = _fans(shape, split)
  return MuInfo(kind, *fans, stacked=start, guessed=guessed)


def _by_names(shape, axes, width) -> MuInfo:
  grows = [_kind(name) in width for name in axes]
  return _info(shape, _split_of(shape, axes, 0), grows)


def _by_widths(shape, other, stacked) -> MuInfo:
  split = _split_of(shape, None, stacked)
  grows = [a != b for a, b in zip(shape, other)]
  # (embed, heads, head size) is contracted along embed, (height, width, in,
  # out) along three: only where one contracted axis grows is it clear.
  guessed = sum(grows[split[0] : split[1]]) > 1 or (
    len(shape) - stacked > 2 and not grows[-1] and any(grows)
  )
  return _info(shape, split, grows, guessed)


def _guess(shape, stacked) -> MuInfo:
  return _info(
    shape, _split_of(shape, None, stacked), [True] * len(shape), True
  )


def _override(found, paths, overrides, is_part):
  found = list(found)
  for pattern, kind in overrides.items():
    if kind not in KINDS:
      raise ValueError(
        f"mup_info: overrides[{pattern!r}] is one of {', '.join(KINDS)}; got "
        f"{kind!r}."
      )
    fits = [i for i, path in enumerate(paths) if re.search(pattern, path)]
    if not fits and not is_part:  # else it may be of what is elsewhere
      raise ValueError(
        f"mup_info: no parameter's path has overrides[{pattern!r}] in it; the "
        f"first paths are {', '.join(paths[:4])}."
      )
    for i in fits:
      found[i] = dataclasses.replace(found[i], kind=kind, guessed=False)
  return found
