"""`simulate` and `distribute`: the same method on one device or on a mesh."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import programs, shardings, spmd
from distrain_jax import run_checks as checks
from distrain_jax.method import Method


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
  checks.check_simulated(method, workers, replicas, mesh)
  mesh = None if mesh is None else spmd.auto_mesh(mesh)
  axes = checks.axes_of(method)
  sizes = (workers, replicas)[: len(axes)]
  if method.inner is not None:
    axes, sizes = (*axes, method.inner), (*sizes, 1)
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
  checks.check_axes(method, mesh)
  checks.check_per_device(method, per_device)
  checks.check_rows_over(method, mesh, rows_over)
  mesh = spmd.auto_mesh(mesh)
  inner = None if method.inner is None else (method.inner, per_device)
  runner = spmd.mesh_runner(mesh, checks.axes_of(method), inner)

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
    checks.check_start(method, workers, params, per_worker)
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
