"""Where a state lies on the axes of a mesh that a method leaves automatic."""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.method import Variables


def like_params(
  shapes: Any, specs: Any, params: Any, mesh: Mesh, axis: str
) -> Any:
  """Shardings of a state over all axes of a mesh.

  A leaf is sharded over the automatic axes as the parameter is whose path its
  own path ends in, if their shapes agree: moments lie where parameters do. So
  do pieces that are cut along one of the parameter's own dimensions, but for
  an axis that does not divide what is left of it.

  Args:
    shapes: the state, as arrays or ShapeDtypeStructs, worker axes included.
    specs: `Method.specs`.
    params: the parameters (arrays, or shapes with shardings).
    mesh: the mesh.
    axis: that of the workers; parameters sharded over it are gathered.

  Returns:
    A `NamedSharding` per leaf.
  """
  known = {path: rest for path, *rest in _known(params, mesh, axis)}
  full = spmd.map_specs(
    lambda s, x: jax.tree.map(lambda _: s, x), specs, shapes
  )

  workers = mesh.shape[axis]

  def one(path, spec, x):
    lead = tuple(spec)
    shape = x.shape[len(lead) :]
    for end in _ends(path):
      whole, rest = known.get(end, (None, ()))
      if whole == shape:
        return NamedSharding(mesh, P(*lead, *rest))
      if lead and whole is not None and _is_piece(shape, whole, workers):
        return NamedSharding(mesh, P(*lead, *_dividing(rest, shape, mesh)))
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
    one, full, shapes, is_leaf=spmd.is_spec
  )


def of_model(shapes: Any, state: Any, specs: Any, mesh: Mesh, axis: str) -> Any:
  """Shardings of the model that is read from a state: `like_params` undone.

  A leaf lies as the first leaf of the state whose path ends in its own and
  whose shape it has, else as its pieces do: an axis that did not divide them
  is lost. It is replicated where the state's places are not known.

  Args:
    shapes: the model.
    state: arrays, or shapes with shardings.
    specs: `Method.specs`.
    mesh: the mesh.
    axis: that of the workers.

  Returns:
    A `NamedSharding` per leaf.
  """
  held = collections.defaultdict(list)
  one_worker = without_worker_axes(state, specs)
  for path, shape, spec in _known(one_worker, mesh, axis):
    for end in _ends(path):
      held[end].append((shape, spec))
  workers = mesh.shape[axis]

  def one(path, x):
    found = held[path]
    same = [spec for shape, spec in found if shape == x.shape]
    cut = [spec for shape, spec in found if _is_piece(shape, x.shape, workers)]
    return NamedSharding(mesh, P(*next(iter(same + cut), ())))

  leaves, treedef = jax.tree.flatten(shapes)
  return treedef.unflatten(map(one, _paths(shapes), leaves))


def _known(tree: Any, mesh: Mesh, axis: str) -> list[tuple]:
  """(path, shape, spec over automatic axes) of leaves that lie on a mesh."""
  return [
    (path, jnp.shape(x), _automatic(x.sharding.spec, mesh, axis))
    for path, x in zip(_paths(tree), jax.tree.leaves(tree))
    if isinstance(getattr(x, "sharding", None), NamedSharding)
  ]


def _paths(tree: Any) -> list[tuple]:
  """The leaves' paths, those of `Variables.params` from the parameters on."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  if isinstance(tree, Variables):
    trained = len(jax.tree.leaves(tree.params))
    return [path[1:] for path in paths[:trained]] + paths[trained:]
  return paths


def _ends(path: tuple) -> list[tuple]:
  """What a path may end in, the longest first."""
  return [path[start:] for start in range(len(path) + 1)]


def _is_piece(shape, whole, workers: int) -> bool:
  """Whether it is a worker's piece, cut along one of the dimensions."""
  if len(shape) != len(whole):
    return False
  differ = [(a, b) for a, b in zip(shape, whole) if a != b]
  return len(differ) == 1 and differ[0][0] * workers == differ[0][1]


def _dividing(spec: tuple, shape, mesh: Mesh) -> tuple:
  """The spec without the axes that do not divide their dimension."""

  def one(entry, size):
    names = entry if isinstance(entry, tuple) else (entry,)
    parts = math.prod(mesh.shape[name] for name in names if name)
    return entry if size % parts == 0 else None

  kept = [one(entry, size) for entry, size in zip(spec, shape)]
  while kept and kept[-1] is None:
    kept.pop()
  return tuple(kept)


def _automatic(spec: P, mesh: Mesh, axis: str) -> tuple:
  """What a spec says about the axes of `mesh` other than the workers'."""

  def one(entry):
    names = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(x for x in names if x in mesh.axis_names and x != axis)
    return kept[0] if len(kept) == 1 else kept or None

  parts = list(map(one, spec))
  while parts and parts[-1] is None:  # P() and P(None) would compile twice
    parts.pop()
  return tuple(parts)


def without_worker_axes(state: Any, specs: Any) -> Any:
  """One worker's view of a global state, as shapes with shardings."""

  def one(spec, x):
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
      rest = P(*sharding.spec[len(spec) :])
      sharding = NamedSharding(sharding.mesh, rest)
    shape = x.shape[len(spec) :]
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

  return spmd.map_specs(
    lambda s, x: jax.tree.map(lambda x: one(s, x), x), specs, state
  )
