"""Trees of settings beside the parameters: multipliers, stacked axes.

A setting is one number for all parameters or a tree with one for each. The
parameters may be a part of the whole model (`optax.masked` and
`optax.multi_transform` put a `MaskedNode` where others were); the settings of
those others are passed over.
"""

from typing import Any

import jax
import numpy as np
import optax

from distrain_jax.learned.kinds import MuInfo

_PATH = jax.tree_util.keystr


def is_hole(x: Any) -> bool:
  """Whether a place in a tree is that of a parameter held elsewhere."""
  return x is None or isinstance(x, optax.MaskedNode)


def _is_number(x: Any) -> bool:
  return isinstance(x, (int, float, np.number, np.ndarray, jax.Array))


def match(name: str, tree: Any, params: Any) -> Any:
  """A setting of each parameter, in the structure of params.

  Args:
    name: of the caller and the setting, for the message.
    tree: one number (or scalar array), or a tree of them.
    params: what it is for.

  Raises:
    ValueError: a parameter that the tree has no number for, or the reverse.
  """
  if _is_number(tree):
    return jax.tree.map(lambda _: tree, params)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  given = {_PATH(path): leaf for path, leaf in leaves}
  flat, treedef = jax.tree_util.tree_flatten_with_path(params)
  wanted = [_PATH(path) for path, _ in flat]
  missing = [path for path in wanted if path not in given]
  known = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hole)
  holes = [_PATH(path) for path, leaf in known if is_hole(leaf)]
  unknown = [
    path
    for path in given.keys() - set(wanted)
    if not any(path.startswith(hole) for hole in holes)
  ]
  if missing or unknown:
    raise ValueError(
      f"{name}: the tree does not match the parameters: it has nothing for "
      f"{_few(missing)}, and the parameters have no {_few(unknown)}. Make it "
      "from the parameters that the optimizer is given, e.g. "
      "mup_multipliers(params, names=...), or pass one number for all. "
      "Pipelines show an optimizer one block at a time: give them a mapping, "
      "{block: mulo(mup=mup[block]) for block in mup}."
    )
  return treedef.unflatten([given[path] for path in wanted])


def _few(paths) -> str:
  paths = sorted(paths)
  more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
  return (", ".join(p or "(the root)" for p in paths[:4]) or "nothing") + more


def read_mup(mup: Any, stacked: Any) -> tuple[Any, Any]:
  """Multipliers and stacked axes from what `mulo` was given.

  Args:
    mup: None, a number, a tree of numbers or of `MuInfo`.
    stacked: None: what `mup` says, else 0; a number, a tree of numbers.
  """
  is_info = lambda x: isinstance(x, MuInfo)
  if mup is None:
    return 1.0, 0 if stacked is None else stacked
  multiplier = lambda x: x.multiplier if is_info(x) else x
  layers = lambda x: x.stacked if is_info(x) else 0
  if stacked is None:
    is_tree = any(map(is_info, jax.tree.leaves(mup)))
    stacked = jax.tree.map(layers, mup) if is_tree else 0
  return jax.tree.map(multiplier, mup), stacked


def check_stacked(name: str, stacked: Any, params: Any) -> None:
  """Refuses more layer axes than a parameter has axes.

  Raises:
    ValueError: naming the parameter.
  """

  def check(path, x, n):
    if not 0 <= int(n) <= np.ndim(x):
      raise ValueError(
        f"{name}: `stacked` counts the leading axes of a parameter that hold "
        f"layers; got {n} for params{_PATH(path)} of shape {np.shape(x)}."
      )

  jax.tree_util.tree_map_with_path(check, params, stacked)


def check_positive(name: str, multipliers: Any) -> None:
  """Refuses multipliers that nothing can be divided by.

  Raises:
    ValueError: naming the parameter; traced multipliers pass.
  """
  for path, x in jax.tree_util.tree_leaves_with_path(multipliers):
    if not isinstance(x, jax.core.Tracer) and not x > 0:
      raise ValueError(
        f"{name}: eps_scaling='fan_in' divides by muP's multipliers; that of "
        f"params{_PATH(path)} is {x}. Wanted one above 0: freeze a parameter "
        "with optax.masked instead."
      )


def read_options(name: str, mup: Any, stacked: Any, params: Any) -> dict:
  """A step's options `multipliers` and `stacked`, as trees like the parameters.

  Args:
    name: of the transform, for messages.
    mup: as for `mulo`; may be a function of the parameters.
    stacked: as for `mulo`.
    params: of the transform.

  Raises:
    ValueError: from `match`.
  """
  own = mup(params) if callable(mup) else mup
  multipliers, layers = read_mup(own, stacked)
  return {
    "multipliers": match(f"{name}: mup", multipliers, params),
    "stacked": match(f"{name}: stacked", layers, params),
  }
