"""How deep each parameter lies: the number of its layer, by order of use."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.models import zoo

STACKED = "layers"  # the logical axis along which blocks are stacked
_NO_MATRIX = {STACKED, "head_dim"}  # as in the optimizers' decay mask


def depths(model: nn.Module, example: Any) -> Any:
  """The layer of every parameter, from 0; nothing is computed.

  A layer is a module with a matrix or a kernel, in the order in which the
  model makes them; a norm counts to the layer before it. Blocks that are
  stacked are a layer each, with all that is in them.

  Args:
    model: a module whose parameters carry logical axis names, stacked ones
      with `layers` on their first axis.
    example: an input, as for `models.init`.

  Returns:
    A pytree of the parameters' structure: int arrays, () or (layers,).

  Raises:
    ValueError: if `layers` is another axis than the first.

  >>> depths(zoo.create("mlp"), jnp.zeros((1, 64)))["dense_1"]["bias"].item()
  1
  """
  found, layer = {}, -1
  stacks: dict[str, np.ndarray] = {}
  last = None  # the module whose layer it is
  for path, names, shape in _in_order(model, example):
    if STACKED in names:
      if names[0] != STACKED:
        raise ValueError(
          f"{type(model).__name__}: {'/'.join(path)} has the axes {names}; "
          f"{STACKED!r} is to be the first."
        )
      if path[0] not in stacks:
        stacks[path[0]] = layer + 1 + np.arange(shape[0])
        layer += shape[0]
      found[path], last = stacks[path[0]], None
      continue
    module = path[:-1] or (path[0].removesuffix("_bias"),)
    matrix = len(set(names) - _NO_MATRIX) > 1
    if layer < 0 or (matrix and module != last):
      layer, last = layer + 1, module
    found[path] = np.asarray(layer)
  names = zoo.logical_names(model, example)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: found[tuple(entry.key for entry in path)],
    names,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def _in_order(model: nn.Module, example: Any) -> list[tuple]:
  """[(path, axis names, shape)] as the model makes them, which is as it runs."""
  found = []

  def walk(tree, path=()):
    for key, value in tree.items():
      if isinstance(value, dict):
        walk(value, (*path, key))
      else:
        x = nn.meta.unbox(value)
        found.append(((*path, key), tuple(value.names), x.shape))

  def trace():
    # Inside, dicts still have the order in which they were filled; what leaves
    # a transformation has its keys sorted.
    zeros = jnp.zeros(
      example.shape, jax.dtypes.canonicalize_dtype(example.dtype)
    )
    walk(model.init(jax.random.key(0), zeros)["params"])
    return ()

  jax.eval_shape(trace)
  return found
