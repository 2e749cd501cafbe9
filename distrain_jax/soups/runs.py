"""The models of a run's folder, one or a whole population, on one device."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from distrain_jax import data, methods, runners
from distrain_jax.models import Task, weights
from distrain_jax.soups import trees
from distrain_jax.train import experiment, export, populations
from distrain_jax.train.checkpoint import Checkpoints, saved_workers
from distrain_jax.train.initial import description, from_file


class Read(NamedTuple):
  """What `read` returns."""

  models: list[Any]  # params, or Variables
  step: int  # of the checkpoint
  config: ConfigDict  # the run's, as its folder has it


def members_of(folder: str | Path, step: int | None = None) -> list[Any]:
  """The models that a run has trained, from its checkpoint.

  Those of all workers where each trains a whole model of its own (the method
  has `Method.member`), in the workers' order, each with the statistics that it
  would be evaluated with; otherwise the run's one model.

  Args:
    folder: the run's, which may go on meanwhile.
    step: of the checkpoint; None: the latest.

  Raises:
    FileNotFoundError: if the folder holds no run, or no such checkpoint.
    ValueError: if the checkpoint is not of the run's config; if the run's
      network is divided into stages.
  """
  return read(folder, step).models


def read(folder: str | Path, step: int | None = None) -> Read:
  """As `members_of`, with the checkpoint's step and the run's config.

  No data is needed. The state of all workers lies on the first device.
  """
  c = export.run_config(folder)
  step, workers = saved_workers(Path(folder) / "checkpoints", step)
  if c.method.name in methods.PIPELINED:
    raise ValueError(
      f"{folder} is a run of {c.method.name}, whose network is divided into "
      f"stages. Put it together: python launch/export.py {folder} FILE, and "
      "use that file."
    )
  built = program(c)
  method, replicas = built.run.method, 1
  if method.replicas is not None:
    replicas = max(c.mesh.get(method.replicas, 1), 1)
  run = runners.simulate(method, workers=workers, replicas=replicas)
  start = _one_model(built.task)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with Checkpoints(Path(folder) / "checkpoints", reading=True) as checkpoints:
    state = checkpoints.restore(step, run, key, start)
  if method.member is not None:
    own = lambda state: method.member(lambda model: model, state)
    own = run.runner(own, (method.specs,), P(method.axis))
    if _are_whole(own, state, start):
      return Read(trees.unstack(jax.jit(own)(state)), step, c)
  return Read([run.params(state)], step, c)


def _one_model(task: Task) -> Any:
  """The shapes of a model of a task, in the form that its loss asks for."""
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
  return shapes if task.stateful else shapes.params


def _are_whole(own, state, like) -> bool:
  """Whether workers train whole models, not parts as SDP's do."""
  try:
    found = jax.eval_shape(own, state)
  except TypeError:  # parts that are unlike each other
    return False
  same = lambda x, y: x.shape[1:] == y.shape
  alike = jax.tree.structure(found) == jax.tree.structure(like)
  return alike and all(jax.tree.leaves(jax.tree.map(same, found, like)))


def program(c: ConfigDict) -> experiment.Program:
  """What a config computes, on one device.

  Args:
    c: as `export.run_config` returns it; it stays as it is.

  Raises:
    ValueError: as `train.build`.
  """
  c = populations.for_reading(c)
  with c.unlocked():
    for axis in c.mesh:
      c.mesh[axis] = 1
  told = data.describe(
    c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
  )
  return experiment.program(c, told.info, jax.local_devices()[:1])


def from_weights(file: str | Path, c: ConfigDict) -> Any:
  """A model from a file that `models.weights.save` wrote.

  The file has what is trained. Statistics such as BatchNorm's start as they do
  in training: estimate them anew (`train.recalibrator`).

  Args:
    file: *.safetensors.
    c: the config of the model that the file is of.

  Raises:
    FileNotFoundError: no such file.
    ValueError: if it is of another model.
  """
  built = program(c)
  shapes = _one_model(built.task)
  if built.task.stateful:
    shapes = shapes.params
  here = SingleDeviceSharding(jax.local_devices()[0])
  places = jax.tree.map(lambda _: here, shapes)
  params = from_file(str(file), c.model.name, built.model, shapes, places)()
  if not built.task.stateful:
    return params
  return built.task.init(jax.random.key(c.seed))._replace(params=params)


def save(file: str | Path, model: Any, c: ConfigDict) -> None:
  """Writes a soup as `launch/export.py` writes a run's model.

  Args:
    file: *.safetensors; its folder is made if it is not there.
    model: params or `Variables`, of which the params are written.
    c: the config of a member.
  """
  told = description(c.model.name, program(c).model)
  Path(file).parent.mkdir(parents=True, exist_ok=True)
  weights.save(file, trees.trained(model), told)
