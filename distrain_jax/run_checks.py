"""What a method cannot run on: refused before anything compiles; see `runners`."""

import jax
import jax.numpy as jnp

from distrain_jax.whole import is_whole


def axes_of(method) -> tuple[str, ...]:
  """Those of a mesh that a method's functions are manual over."""
  return tuple(a for a in (method.axis, method.replicas) if a is not None)


def check_axes(method, mesh) -> None:
  for option, axis in zip(("axis", "replicas"), axes_of(method)):
    if axis not in mesh.axis_names:
      raise ValueError(
        f"{method.name} works on the axis {axis!r}, but the mesh has "
        f"{dict(mesh.shape)}. Name the mesh's axis so, or pass "
        f"{option}={mesh.axis_names[0]!r} to {method.name}."
      )


def check_simulated(method, workers, replicas, mesh) -> None:
  for name, value in (("workers", workers), ("replicas", replicas)):
    if not is_whole(value, 1):
      raise ValueError(
        f"simulate: `{name}` is a whole number from 1; got {value!r}."
      )
  if replicas > 1 and method.replicas is None:
    raise ValueError(
      f"simulate: replicas={replicas}, but {method.name} was made without an "
      "axis of replicas."
    )
  if mesh is None:
    return
  check_axes(method, mesh)
  if mesh.size > 1:
    raise ValueError(
      f"simulate: all workers are on one device, but `mesh` has {mesh.size}. "
      "Pass a mesh of one, or use distribute."
    )


def check_per_device(method, per_device) -> None:
  if not is_whole(per_device, 1):
    raise ValueError(
      "distribute: `per_device` is how many workers share a device, a whole "
      f"number from 1; got {per_device!r}."
    )
  if per_device > 1 and method.inner is None:
    raise ValueError(
      f"distribute: per_device={per_device}, but {method.name} was made without "
      "a name for workers that share a device. Pass inner='member' to it, if it "
      "takes that; methods that train one model have one worker a device."
    )


def check_rows_over(method, mesh, rows_over) -> None:
  others = [a for a in mesh.axis_names if a not in axes_of(method)]
  if isinstance(rows_over, str) or len(set(rows_over)) < len(rows_over):
    raise ValueError(
      f"distribute: `rows_over` is a tuple of axes, each once, of {others}; got "
      f"{rows_over!r}."
    )
  for name in rows_over:
    if name not in others:
      raise ValueError(
        f"distribute: rows_over={tuple(rows_over)!r} names axes of the mesh "
        f"beside the method's; {name!r} is none of {others}."
      )


def check_start(method, workers, params, per_worker):
  if not per_worker:
    return
  if not method.population:
    raise ValueError(
      f"{method.name}: all workers start from one model, so per_worker=True "
      "has no meaning here. Pass one model's params."
    )
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if jnp.shape(x)[:1] != (workers,):
      raise ValueError(
        f"per_worker=True: params{jax.tree_util.keystr(path)} has shape "
        f"{jnp.shape(x)}; its first axis must be the {workers} workers."
      )
