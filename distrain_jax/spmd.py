"""Running per-worker functions: on a mesh, or all workers on one device.

Everything that is delicate about it is in this file and nowhere else:

- `shard_map` with its replication checker sums the gradient of a replicated
  parameter over the axis, `vmap` does not. The checker is off, so that the
  gradient of a local loss is local in both.
- Meshes are made with Auto axes, and a caller's Explicit mesh is used as its
  Auto twin: shard_map would refuse unsharded inputs on Explicit axes, and any
  mesh that is not the current one while one is set.
- An array that a jitted function returns untouched is its input: donating the
  state would then delete the caller's params. `init` copies.
- An axis of one worker beside automatic ones is lost in a partly manual
  program, and XLA then refuses its collectives: it is run by `vmap`.
- XLA chooses the sharding of outputs over the axes that a method leaves
  automatic. They are pinned (`shardings`) to that of what comes in, else the
  optimizer's zeros would be replicated and the second step compile again.
- Simulated CPU devices share a few cores: a collective whose partners come
  late aborts the process. Its timeouts are raised and one step is in flight.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# (fn, in_specs, out_specs) -> the function on global arrays. Specs are pytree
# prefixes: P() for equal on all workers, P(axis) for a leading worker axis,
# which `fn` does not see; of several axes, those that a spec has lead in order.
Runner = Callable[[Callable, Any, Any], Callable]

CPU_FLAGS = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
  "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
  "--xla_cpu_collective_timeout_seconds=1200",
)


def use_cpu_devices(count: int) -> None:
  """Makes JAX simulate `count` devices on the CPU; call before JAX starts.

  Raises:
    RuntimeError: if a backend is already running with other devices.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  names = {flag.split("=")[0] for flag in flags}
  flags += [flag for flag in CPU_FLAGS if flag.split("=")[0] not in names]
  os.environ["XLA_FLAGS"] = " ".join(flags)
  try:
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_platforms", "cpu")
    return
  except RuntimeError:
    pass  # a backend runs already: with these devices, or with others
  if jax.local_device_count() != count or jax.default_backend() != "cpu":
    raise RuntimeError(
      f"JAX already runs on {jax.local_device_count()} "
      f"{jax.default_backend()} device(s), so it cannot simulate {count} CPU "
      "devices any more. Call use_cpu_devices before anything that uses JAX."
    )


def join_processes(auto: bool = False) -> None:
  """Makes this process one of several; call before JAX starts.

  Reads what `launch/local.py` sets: JAX_COORDINATOR_ADDRESS (host:port),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without them nothing happens.

  Args:
    auto: ask the cluster (SLURM, a TPU pod, Kubernetes) instead.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if not auto and address is None:
    return
  # XLA for CPU has no collectives between processes of its own.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # JAX's own handler would swallow a SIGTERM that comes before the trainer's.
  jax.config.update("jax_enable_preemption_service", False)
  if auto:
    jax.distributed.initialize()
  else:
    jax.distributed.initialize(
      address,
      int(os.environ["JAX_NUM_PROCESSES"]),
      int(os.environ["JAX_PROCESS_ID"]),
    )


def make_mesh(axes: Mapping[str, int], devices=None) -> Mesh:
  """A mesh of named axes, in order, with Auto axis types.

  Args:
    axes: name -> size; one size may be -1: all devices that are left.
    devices: those to use; None: all of `jax.devices()`.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  kind = devices[0].platform if devices else "none given"
  sizes = mesh_sizes(
    axes,
    len(devices),
    kind,
    "Change the mesh, pass fewer devices, or simulate more: on a CPU "
    "(--devices=N, or use_cpu_devices(N) before JAX starts), or on one device "
    "of any kind (dj.simulate, or config.simulate=N).",
  )
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )


def mesh_sizes(
  axes: Mapping[str, int], count: int, kind: str, advice: str
) -> dict[str, int]:
  """The sizes of a mesh's axes, as `make_mesh` takes them.

  Args:
    axes: name -> size; one size may be -1.
    count: of the devices.
    kind: of devices, and
    advice: on a way out, for the message.

  Raises:
    ValueError: if the sizes do not multiply to `count`.
  """
  sizes = dict(axes)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) == 1 and fixed > 0 and count % fixed == 0:
    sizes[free[0]] = count // fixed
  fits = math.prod(sizes.values()) == count
  if not fits or min(sizes.values(), default=0) < 1:
    raise ValueError(
      f"a mesh of {dict(axes)} needs {fixed} devices"
      f"{' or a multiple' if free else ''}, but there are {count} ({kind}). "
      f"{advice}"
    )
  return sizes


def worker_key(key: jax.Array, step: jax.Array, axis: str) -> jax.Array:
  """This worker's own key for this step, the same on any number of hosts."""
  return jax.random.fold_in(shared_key(key, step), jax.lax.axis_index(axis))


def shared_key(key: jax.Array, step: jax.Array) -> jax.Array:
  """The key of this step that all workers share."""
  return jax.random.fold_in(key, step)


def in_own_place(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
  """(N,): a worker's scalar in its place, 0 in others'; their sum is all's.

  A value that is not finite stays in its place, also in that sum.
  """
  place = jnp.arange(jax.lax.axis_size(axes))
  return jnp.where(place == jax.lax.axis_index(axes), x, 0)


def vmap_runner(
  axis: str | Sequence[str], workers: int | Sequence[int]
) -> Runner:
  """All workers on one device, by `vmap(axis_name=axis)`, nested for several."""
  sizes = dict(zip(_names(axis), np.atleast_1d(workers).tolist()))

  def runner(fn, in_specs, out_specs):
    mapped = fn
    for name in reversed(sizes):  # the first is the outermost
      in_axes = map_specs(lambda s, a=name: 0 if a in s else None, in_specs)
      mapped = jax.vmap(
        mapped, in_axes=in_axes, axis_name=name, axis_size=sizes[name]
      )

    def call(*args):
      # Everything comes back with all worker axes: under vmap, a value that is
      # equal on all workers need not be known to be so.
      def one(spec, x):
        index = tuple(slice(None) if a in spec else 0 for a in sizes)
        return jax.tree.map(lambda x: x[index], x)

      return map_specs(one, out_specs, mapped(*args))

    return call

  return runner


def mesh_runner(
  mesh: Mesh, axis: str | Sequence[str], inner: tuple[str, int] | None = None
) -> Runner:
  """One worker per position along `axis`; other axes stay automatic.

  Args:
    mesh: has the axis, or axes.
    axis: of the workers.
    inner: `(name, size)` of a second axis, of so many workers that share each
      position: they run by `vmap`. The leading worker axis of global arrays
      then has `axis` times `size` workers, in order.
  """
  mesh, axes = auto_mesh(mesh), _names(axis)
  if inner is not None:
    (axis,) = axes  # replicas have no workers that share a device
    return _sharing_runner(mesh, axis, *inner)
  workers = math.prod(mesh.shape[a] for a in axes)
  if workers == 1 and mesh.size > 1:
    return vmap_runner(axes, [1] * len(axes))

  def runner(fn, in_specs, out_specs):
    def local(*args):
      args = map_specs(lambda s, x: _first(x, len(s)), in_specs, args)
      out = fn(*args)
      return map_specs(lambda s, x: _stack(x, len(s)), out_specs, out)

    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=set(axes),
      check_vma=False,
    )

  return runner


def _sharing_runner(mesh: Mesh, axis: str, name: str, size: int) -> Runner:
  """Several workers on each position along `axis`."""
  alone = mesh.shape[axis] == 1 and mesh.size > 1

  def runner(fn, in_specs, out_specs):
    in_axes = map_specs(lambda s: 0 if axis in s else None, in_specs)

    def local(*args):  # (size, ...) of what differs by worker
      mapped = jax.vmap(fn, in_axes=in_axes, axis_name=name, axis_size=size)
      one = lambda s, x: x if axis in s else jax.tree.map(lambda x: x[0], x)
      return map_specs(one, out_specs, mapped(*args))

    if alone:
      everywhere = jax.vmap(local, in_axes=None, axis_name=axis, axis_size=1)
      return lambda *args: jax.tree.map(lambda x: x[0], everywhere(*args))
    return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names={axis},
      check_vma=False,
    )

  return runner


def _names(axis: str | Sequence[str]) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else tuple(axis)


def auto_mesh(mesh: Mesh) -> Mesh:
  """The same devices and names with Auto axis types."""
  types = (AxisType.Auto,) * len(mesh.axis_names)
  return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def split_rows(batch: Any, workers: int) -> Any:
  """(rows, ...) -> (workers, rows/workers, ...) on every leaf.

  Raises:
    ValueError: as `check_rows`.
  """
  check_rows(batch, workers)
  rows = lambda x: (workers, x.shape[0] // workers, *x.shape[1:])
  split = lambda x: jnp.reshape(x, rows(x))
  return jax.tree.map(split, batch)


def check_rows(batch: Any, workers: int) -> None:
  """Refuses a batch that the workers cannot share evenly; traces nothing.

  Raises:
    ValueError: if some leaf's rows are not a multiple of the workers.
  """
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    shape = np.shape(x)
    if not shape or not shape[0] or shape[0] % workers:
      raise ValueError(
        f"batch{jax.tree_util.keystr(path)} has shape {shape}: its first "
        f"axis is the global batch, which must be a multiple of the {workers} "
        "workers."
      )


def to_global(tree: Any, mesh: Mesh, spec: P) -> Any:
  """Values that every process holds whole, as global arrays on the mesh."""

  def one(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x
    sharding = NamedSharding(mesh, spec)
    if isinstance(x, jax.Array) and jnp.issubdtype(
      x.dtype, jax.dtypes.prng_key
    ):
      data = one(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(one, tree)


def spans_processes(mesh: Mesh) -> bool:
  mine = jax.process_index()
  return any(d.process_index != mine for d in mesh.devices.flat)


def local_workers(mesh: Mesh, axis: str) -> int:
  """How many positions along the axis this process has devices of."""
  mine = np.vectorize(lambda d: d.process_index)(mesh.devices)
  mine = np.moveaxis(mine, mesh.axis_names.index(axis), 0)
  rows = mine.reshape(mesh.shape[axis], -1) == jax.process_index()
  return int(rows.any(1).sum())


def no_current_mesh():
  """Leaves the mesh that a caller has set; ours comes with the function."""
  if jax.sharding.get_abstract_mesh().empty:
    return contextlib.nullcontext()
  return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


def is_spec(x) -> bool:
  return isinstance(x, P)


def map_specs(fn, specs, *trees):
  return jax.tree.map(fn, specs, *trees, is_leaf=is_spec)


def _first(tree, axes):
  """Of each of the leading axes."""
  return jax.tree.map(lambda x: x[(0,) * axes], tree)


def _stack(tree, axes):
  return jax.tree.map(lambda x: x[(None,) * axes], tree)
