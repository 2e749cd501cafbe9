"""From a config to everything that a run needs, all of it checked."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from distrain_jax import data, methods, models, runners, spmd
from distrain_jax.method import Method, Variables, stateful
from distrain_jax.train import config as configs
from distrain_jax.train import (
  initial,
  mup,
  optimizers,
  pipelined,
  placement,
  populations,
  scores,
  validate,
)


class Experiment(NamedTuple):
  """What `train` trains; `build` makes it from a config, or make your own."""

  config: ConfigDict  # as `default_config`: steps, evaluation, checkpoint, ...
  run: runners.Run
  key: jax.Array  # the run's key: the same at every step
  params: Callable[[], Any]  # () -> new params, or Variables, on run.mesh
  # () -> this process's batches: an endless iterator with get_state and
  # set_state (of JSON values), or one that Orbax can save, as Grain's.
  batches: Callable[[], Iterator[Any]]
  # (params, split) -> {"loss": ..., ...}, averaged over the split.
  evaluate: Callable[[Any, str], Mapping[str, float]]
  # (state, split) -> {"members_loss": ...}; None: workers' models are alike.
  evaluate_members: Callable[[Any, str], Mapping[str, float]] | None = None


def build(c: ConfigDict, devices: Sequence[Any] | None = None) -> Experiment:
  """Checks a config and builds its experiment; compiles nothing.

  Args:
    c: `default_config()` with data, model and whatever else is changed.
    devices: of the mesh; None: all there are.

  Raises:
    ValueError: for a field that cannot work, by name.
    FileNotFoundError: if data or config.initial_params is missing, with the
      command that gets it.
  """
  _checked_mesh(c, devices)  # before any data is read
  dataset = data.load(c.data)
  _, run, params, *_ = built = program(c, dataset.info, devices)
  if c.initial_params:
    params = _given(c, built)

  def batches():
    return data.train_iterator(
      dataset.train,
      batch_size=c.batch_size,
      seed=c.seed,
      augment=dataset.augment,
      members=_orders(c, run),
      **placement.step_rows(run.method, run.mesh),
    )

  rows = placement.process_rows(run.mesh, run.method.axis)
  scored = built.run, built.task, built.model, dataset, rows
  evaluate = scores.of_model(c, *scored, batches)
  return Experiment(
    config=c,
    run=run,
    key=jax.random.fold_in(jax.random.key(c.seed), 1),
    params=params,
    batches=batches,
    evaluate=evaluate,
    evaluate_members=scores.of_members(c, *scored, evaluate),
  )


class Program(NamedTuple):
  """What a config computes, whatever the data's values."""

  task: models.Task
  run: runners.Run
  # As Experiment.params, but random whatever config.initial_params says.
  params: Callable[[], Any]
  # (state, batch, key) of run.step as ShapeDtypeStructs, the state's with
  # shardings: what `inspect.compile` takes. Makes no array.
  abstract: Callable[[], tuple[Any, Any, Any]]
  model: nn.Module
  shardings: Any  # of params()


def program(
  c: ConfigDict, info: data.Info, devices: Sequence[Any] | None = None
) -> Program:
  """A config's model and method for data like `info`; reads none.

  `jax.eval_shape(program(c, info).params)` has the shapes of the model.

  Args:
    c: the config.
    info: of the training data, as `data.load` or `data.describe` tells it.
    devices: of the mesh, attached or of a topology; None: all attached ones.

  Raises:
    ValueError: as `build`.
  """
  mesh, shape = _checked_mesh(c, devices)
  axis = axis_of(c)
  model, task = _model_and_task(c, info, axis)
  method = _method(c, model, task, info, shape)
  shardings = _shardings(c, model, task, info, mesh)
  run = _run(c, method, mesh, shape)
  start = _init_fn(task)
  if populations.start_apart(c):
    start = populations.init(start, populations.numbers(c, run.workers))
    shardings = populations.stacked(shardings, mesh, axis)
    run = runners.starting_apart(run)

  def params():
    key = jax.random.fold_in(jax.random.key(c.seed), 0)
    return _initial(start, key, mesh, shardings)

  abstract = lambda: _abstract(c, info, start, run, shardings)
  return Program(task, run, params, abstract, model, shardings)


def _run(
  c: ConfigDict, method: Method, mesh: Mesh, shape: Mapping[str, int]
) -> runners.Run:
  if c.simulate:
    replicas = 1 if method.replicas is None else shape[method.replicas]
    workers = shape[method.axis]
    return runners.simulate(
      method, workers=workers, replicas=replicas, mesh=mesh
    )
  return runners.distribute(
    method,
    mesh,
    per_device=c.population.per_device,
    rows_over=c.population.rows_over,
  )


def _orders(c: ConfigDict, run: runners.Run) -> int | list[int]:
  """Whose orders of the data there are: each member's own, or one."""
  own = populations.is_population(c) and not c.population.same_order
  return populations.numbers(c, run.workers) if own else 1


def _given(c: ConfigDict, built: Program) -> Callable[[], Any]:
  """As Experiment.params, from config.initial_params."""
  shapes, shardings = jax.eval_shape(built.params), built.shardings
  stateful = isinstance(shapes, Variables)
  if stateful:
    shapes, shardings = shapes.params, shardings.params
  read = initial.from_file(
    c.initial_params, c.model.name, built.model, shapes, shardings
  )
  if not stateful:
    return read
  # The file has what is trained; statistics start as they always do.
  return lambda: built.params()._replace(params=read())


def _abstract(c, info, start, run, shardings):
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(start, key)

  def placed(sharding, part):  # a leaf, or all of a model's statistics
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part
    )

  params = jax.tree.map(placed, shardings, shapes)
  batch = {
    name: jax.ShapeDtypeStruct((c.batch_size, *x.shape[1:]), x.dtype)
    for name, x in example(info).items()
  }
  return run.abstract(key, params), batch, key


def _checked_mesh(c, devices=None) -> tuple[Mesh, dict[str, int]]:
  """The mesh, and the sizes of its axes: of config.simulate those simulated."""
  validate.chosen_method_options(c)
  axes = c.mesh.to_dict()
  if (c.simulate or 0) > 0:
    advice = "Change config.simulate, or config.mesh (-1: those that are left)."
    shape = spmd.mesh_sizes(axes, c.simulate, "simulated on one", advice)
    devices = jax.devices() if devices is None else devices
    mesh = spmd.make_mesh(dict.fromkeys(axes, 1), devices[:1])
  else:
    mesh = spmd.make_mesh(axes, devices)
    shape = dict(mesh.shape)
  validate.validate(c, shape, axis_of(c))
  return mesh, shape


def example(info: data.Info) -> dict[str, jax.ShapeDtypeStruct]:
  """One row of a data set's batches, as shapes."""
  if info.kind == "image":
    return {
      "image": jax.ShapeDtypeStruct((1, *info.shape), jnp.float32),
      "label": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
  tokens = jax.ShapeDtypeStruct((1, info.length), jnp.int32)
  return {"tokens": tokens, "targets": tokens}


def axis_of(c: ConfigDict) -> str:
  """The mesh axis that config.method works on."""
  return configs.default_of(methods.FACTORIES[c.method.name], "axis")


def _model_and_task(c, info: data.Info, axis: str):
  options = dict(c.model)
  if not options.get("name"):
    raise ValueError(
      "config.model.name is not set. " + configs.suggest("", models.zoo.MODELS)
    )
  valid = models.valid_options(options["name"])
  # The data decides the size of the output, unless the config does.
  for option, size in (
    ("classes", info.num_classes),
    ("vocab", info.vocab_size),
  ):
    if option in valid and size and options.get(option) is None:
      options[option] = size
  if c.stats == "synchronised" and "axis_name" in valid:
    options["axis_name"] = axis
  options = {k: v for k, v in options.items() if v is not None}
  model = models.create(**options)
  loss = dict(c.loss)
  if info.kind == "text":
    kind, loss["bytes_per_token"] = "language_model", info.bytes_per_token
  else:
    kind = "classification"
  validate.check_loss_options(c.loss, kind, models.tasks.KINDS[kind][2])
  return model, models.task(model, kind, example(info), **loss)


def _method(c, model, task, info: data.Info, shape) -> Method:
  factory, inputs = methods.FACTORIES[c.method.name], _inputs(info)
  if c.method.name in methods.PIPELINED:
    cut, chosen = pipelined.partition(c, model, task, example(info), shape)
    trained, tx = cut.stages, pipelined.transforms(c, model, inputs, cut)
  else:
    trained, chosen = task.loss_fn, {}
    if task.stateful:
      trained = stateful(trained, stats=c.stats)
    if populations.is_population(c):
      axis = axis_of(c)
      who = populations.numbers(c, populations.size(c, shape, axis))
      trained = populations.loss(c, trained, info.num_classes, axis, who)
      of_members = c, factory, model, example(info), info, axis, who
      chosen.update(populations.options(*of_members))
    for option, of_model in STRUCTURE.items():
      if configs.takes(factory, option):
        chosen[option] = of_model(model, inputs)
    if c.method.shard == "leaves" and configs.takes(factory, "stacked"):
      chosen["stacked"] = mup.layers(model, inputs)
    tx = optimizers.build(
      c.optimizer,
      c.steps,
      models.logical_names(model, inputs),
      mup.info(c, model, inputs),
    )
  method = factory(trained, tx, **chosen, **validate.chosen_method_options(c))
  # Guarded always: a run that a bad step stopped can then go on from its last
  # checkpoint with another action, because the state has the same structure.
  action = "skip" if c.bad_step.action == "skip" else "count"
  return methods.guard(method, action=action, spike=c.bad_step.spike)


def _names(model, inputs):
  """Logical names of the parameters and of what is not trained."""
  variables = models.zoo.abstract(model, inputs)
  names = lambda kind: models.logical_names(model, inputs, collection=kind)
  state = {kind: names(kind) for kind in variables.model_state}
  return Variables(names("params"), state)


# Options by which a method is told the model's structure.
STRUCTURE = {
  "names": _names,
  "depths": models.depths,
  "shapes": models.zoo.abstract,
  "writers": models.branch_writers,
  "blocks": models.blocks,
}


def _inputs(info: data.Info) -> jax.ShapeDtypeStruct:
  return next(iter(example(info).values()))


def _shardings(c, model, task, info, mesh: Mesh):
  """Shardings of the initial params (or Variables) over the mesh."""
  inputs = _inputs(info)
  params = placement.shardings(
    c.sharding.to_dict(),
    models.logical_names(model, inputs),
    models.zoo.abstract(model, inputs).params,
    mesh,
  )
  if not task.stateful:
    return params
  return Variables(params, NamedSharding(mesh, P()))


def _initial(start, key, mesh, shardings):
  """New parameters, made where they will lie."""
  if spmd.spans_processes(mesh):
    key = spmd.to_global(key, mesh, P())
  with spmd.no_current_mesh():
    return jax.jit(start, out_shardings=shardings)(key)


def _init_fn(task):
  def init(key):
    variables = task.init(key)
    return variables if task.stateful else variables.params

  return init
