"""Models as lists of pytrees: checked against each other, grouped by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.method import Variables


def check(where: str, models: Sequence[Any]) -> None:
  """Refuses what cannot be averaged; nothing is computed from it before.

  Args:
    where: the caller's name, for the messages.
    models: what should be pytrees of arrays, alike but for their values.

  Raises:
    ValueError: for no models; trees, shapes or dtypes that differ; a NaN or an
      infinity; values other than floats (counters) that differ.
  """
  if isinstance(models, Variables | Mapping) or hasattr(models, "dtype"):
    raise ValueError(
      f"{where}: `models` is a list of models; got one {type(models).__name__}."
      " If its leaves have a leading axis of members, pass unstack(models)."
    )
  if not models:
    raise ValueError(
      f"{where}: `models` is empty; pass a list of at least one pytree."
    )
  first = named(models[0])
  for i, model in enumerate(models):
    other = named(model)
    for path in [*first, *other]:
      there, here = describe(first.get(path)), describe(other.get(path))
      if there != here:
        raise ValueError(
          f"{where}: models[{i}] is unlike models[0]: {path or 'the leaf'} is "
          f"{here} in it, but {there} in models[0]. Only models of one "
          "architecture, with the same options, can be combined."
        )
    if jax.tree.structure(model) != jax.tree.structure(models[0]):
      raise ValueError(
        f"{where}: models[{i}] has other containers than models[0]: "
        f"{jax.tree.structure(model)}, not {jax.tree.structure(models[0])}. "
        "Build them alike, e.g. all as Variables(params, model_state)."
      )
  for i, model in enumerate(models):
    for path, x in named(model).items():
      _check_values(where, i, path, x, first[path])


def _check_values(where, i, path, x, first):
  if is_float(x):
    bad = x.size - int(jnp.isfinite(x).sum())
    if bad:
      raise ValueError(
        f"{where}: models[{i}] has {bad} of {x.size} values that are not "
        f"finite in {path or 'its leaf'}. Leave that model out: the average "
        "with it is not finite either."
      )
  elif not np.array_equal(plain(x), plain(first)):
    raise ValueError(
      f"{where}: {path or 'the leaf'} is {x.dtype}, which has no average, and "
      f"differs between models[{i}] and models[0]. Make it equal in all "
      "models, or take it out of the trees."
    )


def average(models: Sequence[Any], weights: Sequence[float]) -> Any:
  """Their weighted mean, without checks; weights sum to 1.

  Summed in float32, or in the leaf's dtype where that is wider, as the first
  model plus the others' weighted differences from it: so that the mean of
  equal models is that model, to the bit. Leaves that are no floats are the
  first model's.
  """

  def one(x, *others):
    if not is_float(x):
      return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, total = x.astype(wide), x.astype(wide)
    for y, weight in zip(others, weights[1:]):
      total = total + weight * (y.astype(wide) - first)
    return total.astype(x.dtype)

  return jax.tree.map(one, *models)


def unstack(models: Any) -> list[Any]:
  """Members along a leading axis of every leaf -> a list of models.

  Args:
    models: a pytree whose leaves are (N, ...), such as a population's state.

  Raises:
    ValueError: if the leaves are not as said.

  >>> [x["w"].tolist() for x in unstack({"w": np.eye(2)})]
  [[1.0, 0.0], [0.0, 1.0]]
  """
  shapes = {path: tuple(x.shape) for path, x in named(models).items()}
  counts = {shape[:1] for shape in shapes.values()}
  if len(counts) != 1 or counts == {()}:
    raise ValueError(
      "unstack: all leaves need one leading axis of N members; their shapes "
      f"are {shapes}."
    )
  (count,) = counts.pop()
  return [jax.tree.map(lambda x, i=i: x[i], models) for i in range(count)]


def named(model: Any) -> dict[str, Any]:
  """A model's leaves by their paths, "params/dense_0/kernel", as arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(model)
  return {_text(path): as_array(x) for path, x in leaves}


def layers(model: Any, depth: int | None = None) -> dict[str, list[int]]:
  """A model's layers: name -> which of `jax.tree.leaves(model)` are its own.

  A layer is what one module holds: the leaves whose paths differ in the last
  key only. Of `Variables`, what is trained and what is not go together: a
  BatchNorm's scale and its running mean are one layer. Stacked blocks (one
  array for all of them) are one layer each: their parts cannot be told apart
  by path.

  Args:
    model: a pytree.
    depth: layers whose first so many keys agree are one, such as 1 for a
      whole residual block; None: all keys count.

  Raises:
    ValueError: if depth is not at least 1.

  >>> layers({"a": {"x": {"kernel": 0, "bias": 1}, "y": {"kernel": 2}}})
  {'a/x': [0, 1], 'a/y': [2]}
  >>> layers({"a": {"x": {"kernel": 0}, "y": {"kernel": 2}}}, depth=1)
  {'a': [0, 1]}
  """
  if depth is not None and depth < 1:
    raise ValueError(
      f"layers: `depth` counts keys, from 1, or is None; got {depth!r}."
    )
  found: dict[str, list[int]] = {}
  for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(model)):
    found.setdefault(_layer(model, path, depth), []).append(i)
  return found


def _layer(model, path, depth) -> str:
  if isinstance(model, Variables):
    trained = path[0] == jax.tree_util.GetAttrKey("params")
    path = path[1:] if trained else path[2:]  # and the collection's name
  keys = path[:-1][:depth] or path[:1]
  return _text(keys)


def trained(model: Any) -> Any:
  """What a model trains: the params of `Variables`, else all of it."""
  return model.params if isinstance(model, Variables) else model


def replace(model: Any, which: Sequence[int], other: Any) -> Any:
  """`model` with the leaves of these numbers from `other`."""
  leaves, treedef = jax.tree.flatten(model)
  others = jax.tree.leaves(other)
  for i in which:
    leaves[i] = others[i]
  return treedef.unflatten(leaves)


def is_float(x: Any) -> bool:
  """Whether a leaf has an average."""
  return jnp.issubdtype(x.dtype, jnp.inexact)


def as_array(x: Any) -> Any:
  """Arrays as they are, Python's numbers as NumPy's."""
  return x if hasattr(x, "dtype") else np.asarray(x)


def plain(x: Any) -> np.ndarray:
  """A leaf as NumPy has it; keys as their numbers."""
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x)


def describe(x: Any) -> str:
  """A leaf's shape and dtype, for messages and to compare."""
  return "missing" if x is None else f"{tuple(x.shape)} {x.dtype}"


def _text(path) -> str:
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
