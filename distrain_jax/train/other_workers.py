"""A saved state on other workers: whose it was, and where it lies while read."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.runners import Run, simulated


def of_other_workers(run: Run, workers: int, key, params, mine) -> Any:
  """Shapes of the state that `workers` workers had, on this run's mesh."""
  if run.method.population:  # members of any number are alike, and lie alike
    return _leading(run, mine, lambda n: workers)
  of_others, params = simulated(run, params, workers)
  shapes = of_others.abstract(key, params)
  if run.mesh is None:
    return shapes
  axis = run.method.axis

  def one(x):
    divides = x.shape[:1] == (workers,) and workers % run.workers == 0
    sharding = NamedSharding(run.mesh, P(axis) if divides else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, shapes)


def divided(run: Run, like: Any) -> Any:
  """`like` of other members, each device with about as many as it will have.

  Its members' axis is padded to what the mesh divides evenly.
  """
  parts = run.mesh.shape[run.method.axis]
  return _leading(run, like, lambda n: -(-n // parts) * parts)


def _leading(run: Run, shapes: Any, length: Callable[[int], int]) -> Any:
  """The shapes with worker axes of another length, places as they are."""

  def one(spec, x):
    shape = (length(x.shape[0]), *x.shape[1:]) if len(spec) else x.shape
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

  of = lambda spec, part: jax.tree.map(lambda x: one(spec, x), part)
  return spmd.map_specs(of, run.method.specs, shapes)


def numbers(run: Run) -> list[int] | None:
  numbers = run.method.numbers
  return None if numbers is None else list(numbers(run.workers))


def same_workers(run: Run, saved: Any) -> bool:
  """Whether the state is of this run's workers, each in its place."""
  mine = numbers(run)
  if mine is None:
    return saved["workers"] == run.workers
  before = saved.get("numbers")
  if before is None:  # an older one: only its state says whose it is
    return saved["workers"] == run.workers and mine == [*range(run.workers)]
  return list(run.method.numbers(run.workers, before)) == before


def lay(state: Any, like: Any) -> Any:
  """`adopt` knows the workers' axis only; params may lie on others as well."""
  where = jax.tree.map(lambda x: x.sharding, like)
  if jax.tree.map(lambda x: x.sharding, state) == where:
    return state  # a second copy would double what a device holds
  with spmd.no_current_mesh():
    return jax.jit(lambda state: state, out_shardings=where)(state)
