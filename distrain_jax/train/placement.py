"""Where things lie on a mesh: parameters by their names, rows by process."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax.method import Method
from distrain_jax.models.names import kind
from distrain_jax.train.config import suggest


def shardings(
  rules: Mapping[str, str], names: Any, shapes: Any, mesh: Mesh
) -> Any:
  """A sharding of each parameter, by the logical names of its axes.

  Args:
    rules: logical axis name -> mesh axis; what is not named is replicated.
      A rule for a kind (`mlp`) is one for all its names (`mlp_0`, `mlp_1`)
      that have none of their own.
    names: a tree with a tuple of logical axis names per parameter.
    shapes: the same tree of arrays or ShapeDtypeStructs.
    mesh: has the axes that the rules name.

  Raises:
    ValueError: for a rule that no parameter can follow.
  """
  is_names = lambda x: isinstance(x, tuple)
  known = {a for axes in jax.tree.leaves(names, is_leaf=is_names) for a in axes}
  known |= set(map(kind, known))
  for name in rules:
    if name not in known:
      raise ValueError(
        f"config.sharding.{name}: no parameter has an axis of that name. "
        + suggest(name, known)
      )

  def one(path, axes, shape):
    spec = tuple(rules.get(axis, rules.get(kind(axis))) for axis in axes)
    where = f"params{jax.tree_util.keystr(path)}, {shape.shape} of {axes}"
    used = [target for target in spec if target]
    if len(used) > len(set(used)):
      raise ValueError(
        f"config.sharding={dict(rules)} puts two axes of {where}, on one axis "
        "of the mesh. Leave one of the two out."
      )
    for axis, target, size in zip(axes, spec, shape.shape):
      if target and size % mesh.shape[target]:
        raise ValueError(
          f"config.sharding.{axis}={target!r} cuts {where}, into "
          f"{mesh.shape[target]} unequal parts. Leave the rule out, or change "
          "the model's size or config.mesh."
        )
    return NamedSharding(mesh, P(*spec))

  return jax.tree_util.tree_map_with_path(one, names, shapes, is_leaf=is_names)


def step_rows(method: Method, mesh: Mesh) -> dict[str, int]:
  """As `process_rows`, for the batches of a method's step."""
  if method.rows is None:
    return process_rows(mesh, method.axis)
  if not method.rows:  # all rows on all workers
    return {"process_index": 0, "process_count": 1}
  return process_rows(mesh, method.rows[0])


def process_rows(mesh: Mesh, axis: str) -> dict[str, int]:
  """Which share of a batch's rows this process makes, for `data`'s iterators.

  Processes that hold the same workers, because another axis of the mesh runs
  through them, make the same rows.

  Args:
    mesh: of all processes.
    axis: of the workers, among whom rows are divided.

  Returns:
    {"process_index", "process_count"} among processes with different rows.

  Raises:
    ValueError: if processes share some of their workers but not all.
  """
  along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
  workers: dict[int, set[int]] = {}  # process -> positions along the axis
  for position, devices in enumerate(along):
    for device in np.ravel(devices):
      workers.setdefault(device.process_index, set()).add(position)
  shares = sorted({tuple(sorted(positions)) for positions in workers.values()})
  if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(
    along
  ):
    raise ValueError(
      f"config.mesh={dict(mesh.shape)}: some processes share a part of their "
      f"workers on {axis!r}. Order or size the axes so that each process's "
      f"{jax.local_device_count()} devices hold whole workers, or equal ones."
    )
  mine = tuple(sorted(workers.get(jax.process_index(), ())))
  return {
    "process_index": shares.index(mine) if mine in shares else 0,
    "process_count": len(shares),
  }
