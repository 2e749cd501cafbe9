"""The model of a run's checkpoint as a file that any other run can start from.

The workers' state depends on the method, their number and the options; the
model to evaluate does not. So this is how a run goes on with another method,
or SDP's with other subnetworks.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from distrain_jax import data
from distrain_jax.method import Variables
from distrain_jax.models import weights
from distrain_jax.runners import simulated
from distrain_jax.train import experiment, initial, populations
from distrain_jax.train.checkpoint import Checkpoints, saved_workers
from distrain_jax.train.config import default_config

FREE = ("mesh", "sharding", "model", "loss")  # sections whose fields may vary


class Exported(NamedTuple):
  """What `export` wrote."""

  step: int
  params: Any
  model: dict[str, Any]  # its name and options


def run_config(folder: str | Path) -> ConfigDict:
  """The config that a run's folder holds.

  Raises:
    FileNotFoundError: if it holds none.
  """
  file = Path(folder) / "config.json"
  if not file.is_file():
    raise FileNotFoundError(
      f"{file}: no such file. RUN is a folder that launch/train.py made "
      "(--workdir)."
    )
  given = json.loads(file.read_text())
  c = default_config()
  for section in FREE:
    c[section] = ConfigDict(given.pop(section))
  c.update(given)
  return c


def devices(folder: str | Path, step: int | None = None) -> int:
  """How many devices the run's mesh had, without starting JAX.

  Raises:
    FileNotFoundError: if the folder holds no run, or no such checkpoint.
  """
  c = run_config(folder)
  _, workers = saved_workers(Path(folder) / "checkpoints", step)
  return workers * math.prod(_other_axes(c).values())


def export(
  folder: str | Path, out: str | Path, *, step: int | None = None
) -> Exported:
  """Writes the model to evaluate of a run's checkpoint, by `weights.save`.

  Only what is trained: statistics such as BatchNorm's are not in the file, and
  start anew in a run that starts from it. No data is needed, and the run may go
  on meanwhile. Devices hold what the run's held, all workers' together.

  Args:
    folder: the run's.
    out: the file; its folder is made if it is not there.
    step: of the checkpoint; None: the latest.

  Raises:
    FileNotFoundError: if the folder holds no run, or no such checkpoint.
    ValueError: if the checkpoint is not of the run's config, or its method
      cannot change its number of workers to that of the devices that there are.
  """
  c = run_config(folder)
  step, workers = saved_workers(Path(folder) / "checkpoints", step)
  told = data.describe(
    c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
  )
  built = experiment.program(_on_all_devices(c), told.info)
  run, start = built.run, jax.eval_shape(built.params)
  if run.method.population and run.workers != workers:
    # Fewer devices would lose members, more would make some up.
    run, start = simulated(run, start, workers)
  key = jax.eval_shape(lambda: jax.random.key(0))
  with Checkpoints(Path(folder) / "checkpoints", reading=True) as checkpoints:
    try:
      state = checkpoints.restore(step, run, key, start)
    except ValueError as e:
      if not told.assumed:
        raise
      raise ValueError(
        f"{e} Assumed: {'; '.join(told.assumed)}. If that is wrong, set it in "
        f"config.model of {folder}/config.json."
      ) from e
  params = run.params(state)
  if isinstance(params, Variables):
    params = params.params
  model = initial.description(c.model.name, built.model)
  Path(out).parent.mkdir(parents=True, exist_ok=True)
  weights.save(out, params, model)
  return Exported(step, params, model)


def _on_all_devices(c: ConfigDict) -> ConfigDict:
  """With as many workers as devices allow, and batches that they can share."""
  c = populations.for_reading(c)
  c.mesh.update({experiment.axis_of(c): -1, **_other_axes(c)})
  for batches in (c, c.evaluation):
    batches.batch_size *= jax.device_count()
  return c


def _other_axes(c: ConfigDict) -> dict[str, int]:
  """Sizes of the mesh's axes beside the method's; 1 for "what is left"."""
  mine = experiment.axis_of(c)
  return {a: max(n, 1) for a, n in c.mesh.items() if a != mine}
