"""A meta-training state in one file, to go on from to the bit."""

import os
import pathlib
from typing import Any

import jax
import numpy as np


def save(path: str | os.PathLike, state: Any) -> None:
  """Writes a pytree's arrays, .npz; the file appears when it is whole."""
  path = pathlib.Path(path)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  arrays = {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}
  partial = path.with_name(path.name + ".partial")
  with partial.open("wb") as file:
    np.savez(file, **arrays)
  partial.replace(path)


def restore(path: str | os.PathLike, like: Any) -> Any:
  """The arrays of `save`, in a structure and placed as its leaves are.

  Args:
    path: of the file.
    like: a state of the same run, whose values do not matter.

  Raises:
    ValueError: a state of another run: other tasks, pairs or theta.
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(like)
  found = []
  with np.load(path, allow_pickle=False) as file:
    for key, x in flat:
      name = jax.tree_util.keystr(key)
      got = file.get(name)
      if got is None or got.shape != x.shape or got.dtype != x.dtype:
        what = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
        raise ValueError(
          f"{path} is the state of another run: {name} is {what}, wanted "
          f"{x.dtype}{list(x.shape)}. Use another workdir, or the config that "
          "it was started with."
        )
      where = getattr(x, "sharding", None)
      found.append(jax.device_put(got, where))
  return treedef.unflatten(found)
