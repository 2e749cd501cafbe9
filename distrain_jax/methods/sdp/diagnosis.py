"""Why a loss does not run on a subnetwork, found by abstract evaluation.

Nothing is computed: once a loss has failed on the small shapes, it is traced on
the whole ones, then with one kind of units at a time left out.
"""

from collections.abc import Callable
from typing import Any

import jax

from distrain_jax.methods.sdp.cutting import Cut
from distrain_jax.methods.sdp.sampled import Sampled

NAMED = 3  # arrays that a message lists
# Of an array, the (layers, groups) that it is tried with.
Size = Callable[[Sampled], tuple[int, int]]


def checked(gradient: Callable[..., Any], params: Cut, stats: Cut):
  """`gradient` with its failures on small shapes explained.

  Args:
    gradient: `(params, model_state, batch, key) -> anything`, under a trace.
    params: the parameters' cut.
    stats: model_state's.

  Returns:
    The same function. Where the loss runs on the whole model and not on a
    subnetwork, it raises a ValueError that says which units it could not do
    without, and their arrays; else what the loss raised.
  """

  def run(tree, model_state, batch, key):
    try:
      return gradient(tree, model_state, batch, key)
    except Exception as error:
      caught = error

    def fails(size: Size, blocks: bool = True) -> bool:
      shapes = (
        _shapes(params, tree, size, blocks),
        _shapes(stats, model_state, size, blocks),
      )
      try:
        jax.eval_shape(gradient, *shapes, batch, key)
      except Exception:
        return True
      return False

    if fails(_whole):
      raise caught  # it is not the subnetwork's
    raise ValueError(_why(params, tree, fails, caught)) from caught

  return run


def _whole(s: Sampled) -> tuple[int, int]:
  return s.holding.size


def _shapes(cut: Cut, tree: Any, size: Size, blocks: bool) -> Any:
  """Of a tree with arrays of that size, and with all blocks or its own."""
  rest, held = cut.split(tree)
  if blocks:
    held = {
      name: kept.treedef.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept.leaves
      )
      for name, kept in cut.blocks.layouts.items()
    }

  def one(s: Sampled | None, x):
    shape = x.shape if s is None else s.shape(size(s))
    return jax.ShapeDtypeStruct(shape, x.dtype)

  leaves = cut.nets.treedef.flatten_up_to(rest)
  rest = cut.nets.treedef.unflatten(map(one, cut.nets.leaves, leaves))
  return cut.merge(rest, held)


def _why(cut: Cut, tree: Any, fails, error: Exception) -> str:
  if fails(_whole, blocks=False):
    absent = set(cut.blocks.layouts) - set(cut.split(tree)[1])
    return _message("blocks", f"without {', '.join(sorted(absent))}", error)
  sampled = [s for s in cut.nets.leaves if s is not None]
  fewer_layers = lambda s: (s.small[0], s.holding.size[1])
  if fails(fewer_layers):
    return _message("layers", _changes(cut, tree, fewer_layers), error)
  for family in dict.fromkeys(s.leaf.family for s in sampled):

    def fewer_units(s, family=family):
      layers, groups = s.holding.size
      return layers, s.small[1] if s.leaf.family == family else groups

    if fails(fewer_units):
      return _message(family, _changes(cut, tree, fewer_units), error)
  everything = _changes(cut, tree, lambda s: s.small)
  return _message(sampled[0].leaf.family, everything, error)


def _changes(cut: Cut, tree: Any, size: Size) -> str:
  rest, _ = cut.split(tree)
  paths = jax.tree_util.tree_leaves_with_path(rest)
  changed = [
    f"params{jax.tree_util.keystr(path)} of shape {s.shape(size(s))} in place "
    f"of {s.leaf.shape}"
    for (path, _), s in zip(paths, cut.nets.leaves)
    if s is not None and s.shape(size(s)) != s.leaf.shape
  ]
  more = len(changed) - NAMED
  rest = f" and {more} more" if more > 0 else ""
  return "with " + ", ".join(changed[:NAMED]) + rest


def _message(family: str, change: str, error: Exception) -> str:
  says = str(error).strip().partition("\n")[0]
  way_out = f"share them by shared=({family!r},)"
  if family == "blocks":
    way_out = "leave them out of `blocks`"
  return (
    "sdp: loss_fn runs on the whole model, but not on a subnetwork with fewer "
    f"{family!r}: {change}, it raised {type(error).__name__}: {says} With "
    "masking='forward' a loss takes its sizes from the parameters that it is "
    f"given, never from a config. Change that, or {way_out}, or pass "
    "masking='backward'."
  )
