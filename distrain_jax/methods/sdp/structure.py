"""Which parameters can be left out of a subnetwork, read off logical names.

A family is the units that one name runs over: the hidden units of the MLPs
(`mlp`), the heads (`heads`), one residual block's inner channels (`inner_3`),
the stacked layers themselves (`layers`). Leaving a unit out removes its row or
column from every array that has the name, and changes nothing else.

- Neuron level: axes whose kind is in `NEURONS`. Of two such axes on one array
  only one can be sampled, else what lies between the groups of two workers
  would have no holder; it is the one that comes first in the model, and none
  where both are of one name.
- Block level: the axis `layers`, along which whole residual blocks are stacked.
- All other arrays are shared by all workers: embeddings, stem, norms of the
  stream, blocks that are not stacked, head.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax

from distrain_jax.method import Params

NEURONS = frozenset({"heads", "hidden", "inner", "mlp"})
BLOCKS = frozenset({"layers"})
STACKED = frozenset({"layers", "spatial"})  # neither inputs nor outputs
LEVELS = ("neuron", "block", "both")


class Leaf(NamedTuple):
  """How one array is sampled; shared by all where both axes are None."""

  shape: tuple[int, ...]
  dtype: Any
  family: str | None = None  # whose units `axis` runs over
  axis: int | None = None  # neuron level
  lanes: int | None = None  # the axis `layers`; block level, or many lanes
  # Whether the units of `axis` are what the array sums over, so that its
  # product with all of them is the sum of the products with a part of them.
  consumer: bool = False
  writer: bool = False  # whether a stacked block's output is linear in it


class Structure(NamedTuple):
  """Of one model."""

  treedef: Any
  leaves: tuple[Leaf, ...]  # in the order of jax.tree.leaves
  families: dict[str, tuple[int, int]]  # name -> (layers or 1, units or 1)


def kind(name: str) -> str:
  """The name without a number behind its last underscore."""
  stem, _, number = name.rpartition("_")
  return stem if number.isdecimal() else name


def read(
  names: Any,
  shapes: Params,
  level: str,
  shared: Collection[str] = (),
  layered: bool = False,
  writers: Any = None,
  alone: bool = True,
) -> Structure:
  """The structure of a model for subnetworks.

  Args:
    names: one logical name an axis of every parameter, as a tuple of strings
      (None for an axis without) in place of each.
    shapes: the parameters, or their ShapeDtypeStructs.
    level: neuron, block or both.
    shared: names, or kinds of names, that all workers hold.
    layered: whether neurons may be sampled otherwise in every stacked layer.
    writers: True in place of each array of the parameters by which a residual
      block writes to the stream; None: not known.
    alone: whether something must be found.

  Raises:
    ValueError: if names and shapes do not fit, one name has two lengths, or
      nothing is left to be sampled.
  """
  leaves, treedef = jax.tree.flatten(shapes)
  tuples = _flat(names, treedef, "names")
  paths = [_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  for path, x, axes in zip(paths, leaves, tuples):
    _check(path, x, axes)
  wanted = _independent(tuples, set(shared)) if level != "block" else set()
  whole = level != "neuron" and "layers" not in shared
  found = [
    _leaf(x, axes, wanted, whole, layered) for x, axes in zip(leaves, tuples)
  ]
  if writers is not None:
    flags = _flat(writers, treedef, "writers")
    found = [
      leaf._replace(writer=bool(flag)) for leaf, flag in zip(found, flags)
    ]
  families = _families(paths, found)
  if not families and alone:
    known = sorted({name for axes in tuples for name in axes if name})
    kinds = sorted({"neuron": NEURONS, "block": BLOCKS}.get(level, NEURONS))
    raise ValueError(
      f"sdp: no parameter has an axis that level={level!r} samples "
      f"({', '.join(kinds)}); their names are {', '.join(known) or 'none'}. "
      "Choose another level, pass other names, or share fewer."
    )
  return Structure(treedef, tuple(found), families)


def check_shared(shared: Collection[str], names: Any) -> None:
  """Raises ValueError for what is no name, or kind of names, of the model."""
  flat = {name for name in jax.tree.leaves(names) if isinstance(name, str)}
  known = sorted(flat | {kind(name) for name in flat})
  if isinstance(shared, str) or not set(shared) <= set(known):
    raise ValueError(
      "sdp: `shared` is a tuple of logical names, or of kinds of them, that "
      f"are not sampled; got {shared!r}. This model has {', '.join(known)}."
    )


def _flat(tree, treedef, what: str) -> list:
  try:
    return treedef.flatten_up_to(tree)
  except (ValueError, TypeError) as e:
    raise ValueError(
      f"sdp: `{what}` must have the structure of `shapes`, with one entry in "
      f"place of each array: {e}"
    ) from e


def _path(path) -> str:
  """As the user has it: the parameters' own, without `Variables.params`."""
  return jax.tree_util.keystr(path).removeprefix(".params")


def _check(path, x, axes) -> None:
  good = isinstance(axes, tuple) and all(
    a is None or isinstance(a, str) for a in axes
  )
  if not good or len(axes) != len(x.shape):
    raise ValueError(
      f"sdp: names{path} is {axes!r}; the parameter has "
      f"shape {x.shape}, so it is a tuple of {len(x.shape)} strings (or None)."
    )


def _independent(tuples, shared) -> set[str]:
  """Names to be sampled: no two on one array, the first ones first."""
  chosen: set[str] = set()
  for axes in tuples:
    for name in _neurons(axes, shared):
      beside = {a for other in tuples if name in other for a in other}
      twice = any(other.count(name) > 1 for other in tuples)
      if not twice and not (beside - {name}) & chosen:
        chosen.add(name)
  return chosen


def _neurons(axes, shared) -> list[str]:
  named = [a for a in axes if a and kind(a) in NEURONS]
  return [a for a in named if not {a, kind(a)} & shared]


def _leaf(x, axes, wanted, whole: bool, layered: bool) -> Leaf:
  axis = next((i for i, a in enumerate(axes) if a in wanted), None)
  layers = axes.index("layers") if "layers" in axes else None
  if not whole and (axis is None or not layered):
    layers = None
  # Inputs come before outputs; what is stacked is neither.
  order = [i for i, a in enumerate(axes) if not (a and kind(a) in STACKED)]
  consumer = axis is not None and len(order) > 1 and order[0] == axis
  family = axes[axis] if axis is not None else None
  if family is None and layers is not None:
    family = "layers"
  return Leaf(tuple(x.shape), x.dtype, family, axis, layers, consumer)


def _families(paths, leaves) -> dict[str, tuple[int, int]]:
  sizes: dict[str, tuple[int, int]] = {}
  for path, leaf in zip(paths, leaves):
    if leaf.family is None:
      continue
    size = tuple(
      1 if at is None else leaf.shape[at] for at in (leaf.lanes, leaf.axis)
    )
    if sizes.setdefault(leaf.family, size) != size:
      raise ValueError(
        f"sdp: params{path} has (layers, units) {size} of "
        f"{leaf.family!r}, another parameter has {sizes[leaf.family]}: one "
        "name runs over the same units everywhere. Give them names of their "
        f"own, such as {leaf.family}_0 and {leaf.family}_1."
      )
  return sizes
