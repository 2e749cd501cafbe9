"""`compile`: a step, for hardware that need not be there, to its report."""

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import compile_options, runners, shardings, spmd
from distrain_jax.inspect import (
  buffers,
  hlo,
  links,
  memory,
  schedule,
  topologies,
)
from distrain_jax.inspect.hardware import Chip, of_device
from distrain_jax.inspect.report import Report

# Stands for hardware without published peaks: everything takes no time.
_NOWHERE = Chip(
  "unknown",
  {"bf16": float("inf"), "f32": float("inf"), "s8": float("inf")},
  float("inf"),
  0,
  float("inf"),
  float("inf"),
  {},
)


def compile(
  run: Any,
  *abstract_args: Any,
  topology: str | None = None,
  compiler_options: Mapping[str, Any] | None = None,
  with_buffers: bool = False,
) -> Report:
  """Compiles a step ahead of time and reports what it costs on each device.

  No array is made: arguments may be ShapeDtypeStructs, as `run.abstract` gives
  them, and the devices of a topology need not exist.

    run = dj.distribute(method, dj.inspect.mesh("v5e:2x4", {"data": -1}))
    state = run.abstract(key, params)
    print(dj.inspect.compile(run, state, batch, key))

  Args:
    run: a `Run`, or a function that `jax.jit` returned.
    *abstract_args: of `run.step` (state, batch, key), or of the function; as
      arrays or ShapeDtypeStructs. What has a NamedSharding keeps its
      PartitionSpec on the topology.
    topology: e.g. "v5e:2x4" or "h100:8"; see `topologies.topology`. None: the
      devices of the run's mesh or of the arguments' shardings.
    compiler_options: XLA's, over the run's own, over those of
      `compile_options` for the hardware.
    with_buffers: also read where XLA has laid temporaries, and when they live:
      `report.buffers`. XLA writes it into a folder that is removed again.

  Raises:
    ValueError: if the topology has another number of devices than the run's
      mesh or the arguments' shardings; for unknown names; if buffers are
      wanted of a program that JAX's compilation cache has.
    ImportError: if the topology's compiler is not installed.
  """
  if isinstance(run, runners.Run):
    lowered, arguments, mesh = _lower_run(
      run, abstract_args, topology, compiler_options
    )
    name, state = run.method.name, arguments[0]
    options = None  # they are the step's: see runners
  else:
    lowered, arguments, mesh = _lower_function(run, abstract_args, topology)
    name, state = getattr(run, "__name__", "function"), None
    options = compile_options.for_mesh(mesh) | dict(compiler_options or {})
  compiled, seconds, found = _compiled(lowered, options, with_buffers)
  report = read(
    compiled,
    arguments,
    list(mesh.devices.flat),
    name=name,
    hardware=topology or _hardware(mesh),
    state=state,
    compile_seconds=seconds,
  )
  return report._replace(buffers=found)


def _compiled(lowered, options, with_buffers):
  """The program, how long it took, and its buffers or None."""
  if not with_buffers:
    return *_timed(lowered, options), None
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    found = _timed(lowered, (options or {}) | buffers.dumping(folder))
    return *found, buffers.read(folder)


def _timed(lowered, options):
  started = time.perf_counter()
  compiled = lowered.compile(options or None)
  return compiled, time.perf_counter() - started


def read(
  compiled: Any,
  arguments: Any,
  devices: list[Any],
  *,
  name: str = "program",
  hardware: str = "",
  state: Any = None,
  compile_seconds: float = 0.0,
) -> Report:
  """The report of a program that has been compiled already.

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` returned.
    arguments: its arguments, as arrays or shapes with shardings.
    devices: in the order of the program's mesh.
    name, hardware, compile_seconds: for the report's title.
    state: which of the arguments is a method's state; None: none.
  """
  module = hlo.parse(compiled.as_text())
  chip = of_device(devices[0])
  model = chip or _NOWHERE
  bandwidth = links.bandwidth(model, links.domains(devices))
  return Report(
    name=name,
    hardware=hardware or devices[0].device_kind,
    devices=len(devices),
    chip=chip,
    memory=memory.measure(compiled, module, state, arguments),
    step=schedule.walk(module, model, bandwidth),
    compile_seconds=compile_seconds,
  )


def _hardware(mesh: Mesh) -> str:
  found = topologies.of(mesh)
  return found.name if found else mesh.devices.flat[0].device_kind


def _lower_run(run, arguments, topology, compiler_options):
  if len(arguments) != 3:
    raise ValueError(
      "inspect.compile: a run is compiled for the arguments of run.step, "
      f"(state, batch, key); got {len(arguments)} of them. "
      "run.abstract(key, params) makes the state."
    )
  mesh = _mesh(run, topology)
  here = run
  if mesh is not run.mesh or compiler_options:
    options = run.step.compiler_options | dict(compiler_options or {})
    here = run.elsewhere(mesh, options)
  axis = run.method.axis
  state, batch, key = jax.tree.map(_shape, arguments)
  one = shardings.without_worker_axes(arguments[0], run.method.specs)
  one = jax.tree.map(lambda x: _moved(x, mesh), one)
  places = shardings.like_params(state, run.method.specs, one, mesh, axis)
  state = jax.tree.map(_placed, state, places)
  spec = P(axis) if run.method.rows is None else run.method.rows
  rows = NamedSharding(mesh, spec)
  batch = jax.tree.map(lambda x: _placed(x, rows), batch)
  key = jax.tree.map(lambda x: _placed(x, NamedSharding(mesh, P())), key)
  arguments = (state, batch, key)
  return here.step.lower(*arguments), arguments, mesh


def _mesh(run, topology) -> Mesh:
  if topology is None and run.mesh is not None:
    return run.mesh
  if topology is None:
    raise ValueError(
      "inspect.compile: this run is simulated on one device. Pass topology=, "
      "e.g. 'v5e:2x4', or a run from dj.distribute."
    )
  axes = {run.method.axis: run.workers}
  if not run.simulated:
    axes = dict(run.mesh.shape)
  elif len(topologies.topology(topology).devices) == 1:
    axes = dict.fromkeys(axes if run.mesh is None else run.mesh.shape, 1)
  return _fitting(topology, axes, f"this run's {axes}")


def _fitting(topology: str, axes: Mapping[str, int], what: str) -> Mesh:
  found = topologies.topology(topology)
  needed = math.prod(axes.values())
  if needed != len(found.devices):
    raise ValueError(
      f"inspect.compile: {topology} has {len(found.devices)} devices, {what} "
      f"needs {needed}. Choose another topology, or make the mesh there: "
      f"dj.inspect.mesh({topology!r}, {{{next(iter(axes))!r}: -1}})."
    )
  return spmd.make_mesh(dict(axes), found.devices)


def _lower_function(function, arguments, topology):
  if not hasattr(function, "lower"):
    raise TypeError(
      "inspect.compile takes a Run or a function that jax.jit returned; got "
      f"{type(function).__name__}. Wrap it: jax.jit(f)."
    )
  meshes = [
    x.sharding.mesh
    for x in jax.tree.leaves(arguments)
    if isinstance(getattr(x, "sharding", None), NamedSharding)
  ]
  if not meshes:
    raise ValueError(
      "inspect.compile: no argument says on which devices it lies. Give the "
      "ShapeDtypeStructs a sharding, NamedSharding(mesh, PartitionSpec(...)), "
      "with dj.inspect.mesh(topology, axes) or any mesh of its axes."
    )
  mesh = meshes[0]
  if topology is not None:
    axes = dict(mesh.shape)
    mesh = _fitting(topology, axes, f"the arguments' mesh {axes}")
  arguments = jax.tree.map(lambda x: _moved(_shape(x), mesh), arguments)
  with spmd.no_current_mesh():
    return function.lower(*arguments), arguments, mesh


def _shape(x) -> jax.ShapeDtypeStruct:
  sharding = getattr(x, "sharding", None)
  named = sharding if isinstance(sharding, NamedSharding) else None
  x = jax.eval_shape(lambda: x) if not hasattr(x, "dtype") else x
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named)


def _placed(x, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _moved(x, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """On another mesh with axes of the same names; replicated if nowhere."""
  spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else P()
  return _placed(x, NamedSharding(mesh, spec))
