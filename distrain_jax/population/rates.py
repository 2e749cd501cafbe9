"""How much of each layer an exchange moves: rates by depth.

Letters in shapes: a leaf of `layers` stacked layers has them on its first axis.
"""

import difflib
import fnmatch
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import jax
import numpy as np

SCHEDULES = {
  "decreasing": lambda x: 1 - x,
  "constant": lambda x: np.ones_like(x),
  "increasing": lambda x: x,
}


def check_rate(name: str, rate: float) -> None:
  if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate <= 1:
    raise ValueError(
      f"{name}: `rate` is the fraction of a layer's coordinates that an "
      f"exchange moves, in [0, 1]; got {rate!r}."
      + (
        f" For {rate} per cent pass {rate / 100}." if _is_per_cent(rate) else ""
      )
    )


def check_schedule(name: str, layer_schedule: str) -> None:
  if layer_schedule not in SCHEDULES:
    raise ValueError(
      f"{name}: `layer_schedule` is one of {', '.join(SCHEDULES)}; got "
      f"{layer_schedule!r}."
    )


def check_exclude(name: str, exclude: Sequence[str]) -> None:
  listed = isinstance(exclude, Sequence) and not isinstance(exclude, str)
  if not listed or not all(isinstance(x, str) for x in exclude):
    raise ValueError(
      f"{name}: `exclude` is a tuple of patterns of parameters' paths, such as "
      f"('*/scale', '*/bias'); got {exclude!r}."
    )


def excluded(name: str, params: Any, exclude: Sequence[str]) -> list[bool]:
  """Of each leaf, whether a pattern fits its path, "block_0/conv_0/kernel".

  Patterns are the shell's, of `fnmatch`; their * may span several parts.

  Raises:
    ValueError: for a pattern that fits none.
  """
  fits = fnmatch.fnmatchcase
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  for pattern in exclude:
    if not any(fits(path, pattern) for path in paths):
      some = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
      near = difflib.get_close_matches(pattern, paths, n=1)
      raise ValueError(
        f"{name}: exclude={tuple(exclude)!r}: {pattern!r} is the path of no "
        f"parameter. Paths are {some}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
      )
  return [any(fits(path, x) for x in exclude) for path in paths]


def leaf_depths(params: Any) -> Any:
  """Every leaf a layer of its own, in the tree's order."""
  leaves, treedef = jax.tree.flatten(params)
  return treedef.unflatten([np.asarray(i) for i in range(len(leaves))])


def layer_rates(
  name: str,
  params: Any,
  depths: Any,
  *,
  rate: float,
  layer_schedule: str,
  equal_volume: bool,
  exclude: Sequence[str] = (),
) -> list[np.ndarray]:
  """The rate of each leaf, or of each of its stacked layers.

  WASH (https://arxiv.org/abs/2405.17517) moves most in the first layers: with
  layers l = 0, ..., L - 1, p_l = p (1 - l / (L - 1)).

  Args:
    name: of the factory, for errors.
    params: a tree of arrays or shapes, one member's.
    depths: the same tree of whole numbers: the layer of a leaf, or (layers,)
      those of the layers that are stacked on its first axis.
    rate: p.
    layer_schedule: decreasing, constant or increasing in depth, linearly from
      p to 0, or from 0 to p.
    equal_volume: scaled so that as many coordinates move as with a constant
      rate p.
    exclude: see `excluded`; the rate of these is 0, and they count as layers
      but not in the volume.

  Returns:
    float64 () or (layers,) for each leaf, in order.

  Raises:
    ValueError: if depths are not such a tree, a scaled rate is above 1, or a
      pattern fits no leaf.
  """
  leaves = _paired(name, params, depths)
  depths = [depth for _, _, depth in leaves]
  last = max((int(depth.max()) for depth in depths), default=0)
  where = [depth / last if last else np.zeros_like(depth) for depth in depths]
  shares = [np.asarray(SCHEDULES[layer_schedule](x), float) for x in where]
  if not last:  # one layer is both the first and the last
    shares = [np.ones_like(share) for share in shares]
  out = excluded(name, params, exclude)
  shares = [0 * share if gone else share for share, gone in zip(shares, out)]
  if equal_volume:
    sizes = [x.size / max(depth.size, 1) for _, x, depth in leaves]
    volume = sum((share * n).sum() for share, n in zip(shares, sizes))
    whole = sum(x.size for (_, x, _), gone in zip(leaves, out) if not gone)
    scale = whole / volume if volume else 0.0
    shares = [scale * share for share in shares]
  most = max((share.max() for share in shares), default=0.0)
  if rate * most > 1:
    raise ValueError(
      f"{name}: rate={rate} with layer_schedule={layer_schedule!r} and "
      f"equal_volume=True asks for {rate * most:.3g} of some layer. Lower the "
      f"rate to {math.floor(1000 / most) / 1000:g} or less."
    )
  return [rate * share for share in shares]


def _paired(name, params, depths):
  """[(path, leaf, depth)], checked."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
  if jax.tree.structure(depths) != treedef:
    raise ValueError(
      f"{name}: `depths` is a tree of whole numbers like the parameters, "
      f"{treedef}; got {jax.tree.structure(depths)}."
    )
  out = []
  for (path, x), depth in zip(leaves, jax.tree.leaves(depths)):
    depth = np.asarray(depth)
    whole = np.issubdtype(depth.dtype, np.integer) and (depth >= 0).all()
    if (
      not whole or depth.ndim > 1 or (depth.ndim and depth.shape != x.shape[:1])
    ):
      raise ValueError(
        f"{name}: the depth of params{jax.tree_util.keystr(path)}, of shape "
        f"{x.shape}, is a whole number from 0, or one for each index of its "
        f"first axis; got {depth!r}."
      )
    out.append((path, x, depth))
  return out


def _is_per_cent(rate) -> bool:
  return isinstance(rate, Real) and 1 < rate <= 100
