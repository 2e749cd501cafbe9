"""Parameter trees in safetensors files, as config.initial_params reads them.

The names of a tree's leaves are their paths: "blocks/attention/query". The
file's metadata may say what the model is: `models.create`'s name and options.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distrain_jax.models.tensor_files import open_file, write_file

MODEL = "model"  # the metadata's key


def names(tree: Any) -> dict[str, Any]:
  """A tree's leaves by the names that they have in a file.

  >>> names({"blocks": {"out": 1}, "output": 2})
  {'blocks/out': 1, 'output': 2}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  text = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {text(path): leaf for path, leaf in leaves}


def save(
  path: str | os.PathLike,
  params: Any,
  model: Mapping[str, Any] | None = None,
) -> None:
  """Writes a parameter tree for config.initial_params.

  Args:
    path: the file.
    params: a pytree of arrays or Tensors.
    model: `models.create`'s name, and the options that decide what the model
      computes, with plain values and without `preset`: the trainer compares
      each with its own model's.
  """
  metadata = {"format": "distrain_jax"}
  if model is not None:
    metadata[MODEL] = json.dumps(dict(model))
  write_file(path, names(params), metadata)


def load(path: str | os.PathLike, like: Any) -> Any:
  """The tree that `save` wrote, as Tensors; no value is read.

  Args:
    path: the file.
    like: a pytree of what has the shapes that are wanted; dtypes may differ.

  Raises:
    FileNotFoundError: no such file.
    ValueError: where names or shapes differ; the first one is named.
  """
  wanted, found = names(like), open_file(path).tensors
  check_shapes(
    str(path),
    {name: x.shape for name, x in found.items()},
    {name: tuple(x.shape) for name, x in wanted.items()},
  )
  for name in wanted:
    if not jnp.issubdtype(found[name].dtype, jnp.floating):
      raise ValueError(f"{path}: {name!r} is {found[name].dtype}, no float.")
  treedef = jax.tree.structure(like)
  return jax.tree.unflatten(treedef, [found[name] for name in wanted])


def check_shapes(
  where: str,
  found: Mapping[str, tuple[int, ...]],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """A ValueError that names the first difference, if there is one."""
  for name, shape in wanted.items():
    if name not in found:
      others = sorted(found.keys() - wanted.keys())[:3]
      also = f" It has {', '.join(map(repr, others))} instead." * bool(others)
      raise ValueError(
        f"{where}: no {name!r}, which the model has, {shape}.{also}"
      )
    if found[name] != shape:
      raise ValueError(
        f"{where}: {name!r} is {found[name]}, but {shape} in the model."
      )
  for name in found:
    if name not in wanted:
      raise ValueError(
        f"{where}: {name!r}, {found[name]}, is not a parameter of the model."
      )


def model_of(path: str | os.PathLike) -> dict[str, Any] | None:
  """What `save` was told of the model; None if nothing."""
  text = open_file(path).metadata.get(MODEL)
  return None if text is None else json.loads(text)
