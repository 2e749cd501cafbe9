"""`simulate` and `distribute`: the same method on one device or on a mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import programs, shardings, spmd
from distrain_jax.method import Method
from distrain_jax.whole import is_whole


class Run(NamedTuple):
  """A method with its workers; what `simulate` and `distribute` return.

  States are global: what differs by worker has a leading worker axis. `step`
  donates the state that it is given, and has `lower(state, batch, key)`.
  """

  method: Method
  workers: int
  mesh: Mesh | None  # None: simulated, on the first device
  # (key, params, per_worker=False) -> state. per_worker: params have a leading
  # worker axis, for workers that start from different models.
  init: Callable[..., Any]
  # (state, batch, key) -> (state, metrics). Batch leaves: (global_batch, ...).
  step: Callable[..., Any]
  # (state) -> params, one copy, equal on all workers; sharded over the other
  # axes of a mesh as those that init was given.
  params: Callable[[Any], Any]
  # As init: the state's ShapeDtypeStructs with shardings; nothing is computed.
  abstract: Callable[..., Any]
  # This process's rows of a batch -> global arrays, ready for step.
  put: Callable[[Any], Any]
  # As put, for what needs no method: this process's rows among the workers ->
  # global arrays, divided among all workers whatever the method asks for.
  spread: Callable[[Any], Any]
  # (state of another number of workers, workers=None) -> this run's state. With
  # workers, so many, it lies on this run's mesh already, and leading worker
  # axes may be longer, so as to be divided evenly; what is beyond is ignored.
  adopt: Callable[..., Any]
  # (state, key) -> state: finishes what is in flight. None: nothing ever is.
  drain: Callable[..., Any] | None = None
  # What makes a per-worker function one of global arrays; see `spmd.Runner`.
  runner: spmd.Runner | None = None
  # Whether `init` and `abstract` take models with a leading worker axis.
  apart: bool = False
  simulated: bool = False  # all workers are on one device, with a mesh or not
  # (mesh, compiler_options) -> the same run there; a simulated one stays so on
  # a mesh of one device, else has a device for each worker.
  elsewhere: Callable[[Mesh, Mapping[str, Any]], "Run"] | None = None


def simulate(
  method: Method,
  *,
  workers: int,
  replicas: int = 1,
  donate: bool = True,
  mesh: Mesh | None = None,
) -> Run:
  """All workers of a method on one device, by vmap over its axis.

  Args:
    method: what a factory such as `ddp` returned.
    workers: how many.
    replicas: of each worker, for a method that has an axis of them.
    donate: whether `step` may reuse the memory of the state it is given.
    mesh: of one device, with the method's axes, on which arrays lie as those of
      `distribute` do, for who treats both alike; None: the first device.

  Raises:
    ValueError: if workers or replicas are not at least 1, the method has no
      replicas, or the mesh has several devices or lacks the method's axes.
  """
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
  axes, sizes = _axes(method), (workers, replicas)[: len(_axes(method))]
  if method.inner is not None:
    axes, sizes = (*axes, method.inner), (*sizes, 1)
  if mesh is not None:
    _check_axes(method, mesh)
    if mesh.size > 1:
      raise ValueError(
        f"simulate: all workers are on one device, but `mesh` has {mesh.size}. "
        "Pass a mesh of one, or use distribute."
      )
    mesh = spmd.auto_mesh(mesh)
  runner = spmd.vmap_runner(axes, sizes)

  def on(mesh, options=None):
    if mesh is not None and mesh.size > 1:
      return distribute(method, mesh, donate=donate, compiler_options=options)
    more = {"replicas": replicas, "per_device": workers}
    run = _run(method, workers, mesh, runner, donate, options, **more)
    return run._replace(simulated=True, elsewhere=on)

  return on(mesh)


def distribute(
  method: Method,
  mesh: Mesh,
  *,
  donate: bool = True,
  compiler_options: Mapping[str, Any] | None = None,
  per_device: int = 1,
  rows_over: Sequence[str] = (),
) -> Run:
  """A method on a mesh: one worker per position along the method's axis.

  Other axes of the mesh stay automatic: shard params over them before `init`,
  and XLA partitions each worker's computation. In several processes every
  process calls everything with equal arguments; `put` makes global batches
  from each process's rows.

  Args:
    method: what a factory such as `ddp` returned.
    mesh: has the method's axis; Explicit axes are used as Auto ones.
    donate: whether `step` may reuse the memory of the state it is given.
    compiler_options: XLA's options for `step`, over those that the table of
      `compile_options` has for the mesh's chip.
    per_device: workers at each position along the axis, which run by `vmap`;
      more than 1 for a method that was made with `inner`.
    rows_over: automatic axes of the mesh that divide each worker's rows, such
      as `fsdp` where params are sharded over it; without, XLA takes all of a
      worker's rows to all of its devices.

  Raises:
    ValueError: if the mesh lacks the axis or one of `rows_over`, or the method
      cannot have several workers on a device.
  """
  _check_axes(method, mesh)
  _check_per_device(method, per_device)
  _check_rows_over(method, mesh, rows_over)
  mesh = spmd.auto_mesh(mesh)
  inner = None if method.inner is None else (method.inner, per_device)
  runner = spmd.mesh_runner(mesh, _axes(method), inner)

  def elsewhere(mesh, options):
    more = {"per_device": per_device, "rows_over": rows_over}
    return distribute(
      method, mesh, donate=donate, compiler_options=options, **more
    )

  run = _run(
    method,
    mesh.shape[method.axis] * per_device,
    mesh,
    runner,
    donate,
    compiler_options,
    replicas=mesh.shape[method.replicas] if method.replicas else 1,
    per_device=per_device,
    rows_over=tuple(rows_over),
  )
  return run._replace(elsewhere=elsewhere)


def starting_apart(run: Run) -> Run:
  """The run with `per_worker=True` in all that takes it."""
  return run._replace(
    init=functools.partial(run.init, per_worker=True),
    abstract=functools.partial(run.abstract, per_worker=True),
    apart=True,
  )


def simulated(run: Run, params: Any, workers: int) -> tuple[Run, Any]:
  """A run's method with so many workers on one device, and its `params` there.

  Args:
    run: of any number of workers.
    params: shapes, as `run.init` takes them.
    workers: how many.
  """
  here = simulate(run.method, workers=workers)
  if not run.apart:
    return here, params
  of = lambda x: jax.ShapeDtypeStruct((workers, *x.shape[1:]), x.dtype)
  return starting_apart(here), jax.tree.map(of, params)


def _axes(method) -> tuple[str, ...]:
  """Those of a mesh that a method's functions are manual over."""
  return tuple(a for a in (method.axis, method.replicas) if a is not None)


def _check_axes(method, mesh) -> None:
  for option, axis in zip(("axis", "replicas"), _axes(method)):
    if axis not in mesh.axis_names:
      raise ValueError(
        f"{method.name} works on the axis {axis!r}, but the mesh has "
        f"{dict(mesh.shape)}. Name the mesh's axis so, or pass "
        f"{option}={mesh.axis_names[0]!r} to {method.name}."
      )


def _check_per_device(method, per_device) -> None:
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


def _check_rows_over(method, mesh, rows_over) -> None:
  others = [a for a in mesh.axis_names if a not in _axes(method)]
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


def _run(
  method,
  workers,
  mesh,
  runner,
  donate,
  options=None,
  replicas=1,
  per_device=1,
  rows_over=(),
) -> Run:
  each, same = P(method.axis), P()
  rows = each if method.rows is None else method.rows
  # How many shares a batch's rows are cut into; None: they are not.
  shares = {each: workers, same: None}.get(rows, replicas)

  def init_fn(per_worker):
    start = each if per_worker else same
    return runner(method.init, (same, start), method.specs)

  def places(shapes, params):
    if mesh is None:
      return jax.tree.map(lambda _: programs.here(), shapes)
    return shardings.like_params(
      shapes, method.specs, params, mesh, method.axis
    )

  def abstract(key, params, per_worker=False):
    _check_start(method, workers, params, per_worker)
    with spmd.no_current_mesh():
      shapes = jax.eval_shape(init_fn(per_worker), key, params)
    if per_worker:
      params = shardings.without_worker_axes(params, each)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      places(shapes, params),
    )

  def init(key, params, per_worker=False):
    key, params = programs.brought(mesh, (key, params))
    like = abstract(key, params, per_worker)
    fn = init_fn(per_worker)
    jitted = jax.jit(
      lambda key, params: jax.tree.map(jnp.copy, fn(key, params)),
      out_shardings=jax.tree.map(lambda x: x.sharding, like),
    )
    with spmd.no_current_mesh():
      return jitted(key, params)

  one_step = runner(
    method.step, (method.specs, rows, same), (method.specs, same)
  )

  def step(state, batch, key):
    if shares is not None:
      batch = spmd.split_rows(batch, shares)
    if rows_over:
      divided = NamedSharding(mesh, P(method.axis, rows_over))
      batch = jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, divided), batch
      )
    return one_step(state, batch, key)

  read = runner(method.params, (method.specs,), same)

  def model_places(state):
    model = jax.eval_shape(read, state)
    return shardings.of_model(model, state, method.specs, mesh, method.axis)

  def put(batch, rows=rows):
    if mesh is None:
      return jax.device_put(batch)
    sharding = NamedSharding(mesh, rows)
    if rows != same:
      local = spmd.local_workers(mesh, rows[0])
      spmd.check_rows(batch, local * (per_device if rows == each else 1))
    if not spmd.spans_processes(mesh):  # all leaves at once
      return jax.device_put(batch, sharding)
    place = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: place(sharding, x), batch)

  drain = None
  if method.drain is not None:
    finish = runner(method.drain, (method.specs, same), method.specs)
    kept = lambda state: jax.tree.map(programs.sharding, state)
    program = programs.Program(finish, mesh, method.axis, kept)

    def drain(state, key):
      return program(state, programs.brought(mesh, key))

  return Run(
    method=method,
    workers=workers,
    mesh=mesh,
    init=init,
    step=programs.Step(step, mesh, method.axis, rows, donate, options),
    params=programs.Program(read, mesh, method.axis, model_places),
    abstract=abstract,
    put=put,
    spread=lambda batch: put(batch, each),
    adopt=functools.partial(_adopt, method, workers, mesh),
    drain=drain,
    runner=runner,
  )


def _adopt(method, workers, mesh, state, before=None):
  if method.reshard is None:
    raise ValueError(
      f"{method.name} cannot change its number of workers: a worker's state "
      "means something only among the workers that it was made with. Resume "
      "on the same number, or export run.params(state) and start from it."
    )

  def make(state):
    if before is not None:
      first = lambda spec, x: x[:before] if len(spec) else x
      state = spmd.map_specs(
        lambda s, x: jax.tree.map(lambda x: first(s, x), x), method.specs, state
      )
    return method.reshard(state, workers)

  with spmd.no_current_mesh():
    place = programs.here()
    if mesh is not None:
      new, old = jax.eval_shape(make, state), state
      old = shardings.without_worker_axes(old, method.specs)
      place = shardings.like_params(new, method.specs, old, mesh, method.axis)
    if before is not None and mesh is not None:
      own = lambda state: jax.tree.map(jnp.copy, make(state))
      return jax.jit(own, out_shardings=place)(state)
    # On the devices where it lies; then it moves, and is nobody else's.
    return jax.device_put(jax.jit(make)(state), place, may_alias=False)


def _check_start(method, workers, params, per_worker):
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
