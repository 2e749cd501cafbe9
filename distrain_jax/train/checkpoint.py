"""Checkpoints of a run: state and data iterator in one, saved while it runs.

A thin layer over Orbax: what to keep, how to resume on another number of
workers, and how a save that was cut short leaves no trace.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from distrain_jax.runners import Run, simulate


class Checkpoints:
  """The checkpoints under one folder; a context manager.

  Leaving it waits for the last save, so that nothing is lost.
  """

  def __init__(self, folder: Path, *, keep: int = 2, keep_best: int = 1):
    """Opens the folder, and clears what an interrupted save left.

    Args:
      folder: where; made if it is not there.
      keep: how many of the latest to keep.
      keep_best: how many more to keep, of those with the lowest loss.
    """
    _quiet()
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # slow on many small leaves
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(keep)]
    if keep_best:
      kept.append(_Best(keep_best))
    self._orbax = ocp.training.Checkpointer(
      Path(folder).resolve(),
      context=context,
      save_decision_policy=_Always(),
      preservation_policy=policies.AnyPreservationPolicy(kept),
      cleanup_tmp_directories=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._orbax.close()

  @property
  def latest(self) -> int | None:
    """The step of the latest complete checkpoint."""
    return self._orbax.latest.step if self._orbax.latest else None

  @property
  def steps(self) -> list[int]:
    return [c.step for c in self._orbax.checkpoints]

  def best(self) -> int | None:
    """The step of the checkpoint with the lowest evaluated loss."""
    known = [c for c in self._orbax.checkpoints if c.metrics]
    best = min(known, key=lambda c: c.metrics["loss"], default=None)
    return best.step if best else None

  def save(
    self, step: int, run: Run, state: Any, batches: Any, loss: float | None
  ) -> None:
    """Copies the state off the devices, then writes it in the background.

    Args:
      step: how many steps the state has taken.
      run: whose state it is.
      state: the whole of it.
      batches: the data iterator after as many batches.
      loss: evaluated at this step, for `keep_best`; None: not evaluated.
    """
    self._orbax.save_checkpointables_async(
      step,
      {"state": state, "data": batches},
      metrics=None if loss is None else {"loss": float(loss)},
      custom_metadata={"workers": run.workers, "method": run.method.name},
      overwrite=True,
    )

  def restore(self, step: int, run: Run, key, params, batches) -> Any:
    """The state saved at `step`, on this run's workers; batches move on too.

    Args:
      step: one of `steps`.
      run: the run to resume, on any number of workers.
      key, params: as for `run.init`; only shapes are used.
      batches: a fresh data iterator, which is set to where it was.

    Raises:
      ValueError: for a checkpoint of another method, or if the method cannot
        change its number of workers.
    """
    saved = self._orbax.checkpointables_metadata(step).custom_metadata
    if saved["method"] != run.method.name:
      raise ValueError(
        f"The checkpoint at step {step} in {self._orbax.directory} is of "
        f"{saved['method']}, not of {run.method.name}. Set "
        f"--config.method.name={saved['method']}, or start in another folder."
      )
    same = saved["workers"] == run.workers
    like = run.abstract(key, params)
    if not same:
      like = _of_other_workers(run, saved["workers"], key, params)
    wanted = {"state": like, "data": batches}
    state = self._orbax.load_checkpointables(step, wanted)["state"]
    return state if same else run.adopt(state)

  def wait(self) -> None:
    """Until what was saved is on disk."""
    self._orbax.wait()


def _of_other_workers(run: Run, workers: int, key, params) -> Any:
  """Shapes of the state that `workers` workers had, on this run's mesh."""
  shapes = simulate(run.method, workers=workers).abstract(key, params)
  if run.mesh is None:
    return shapes
  axis = run.method.axis

  def one(x):
    divides = x.shape[:1] == (workers,) and workers % run.workers == 0
    sharding = NamedSharding(run.mesh, P(axis) if divides else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, shapes)


class _Always:
  """The trainer decides when to save."""

  def should_save(self, *args: Any, **kwargs: Any) -> bool:
    return True


class _Best:
  """Keeps the n evaluated checkpoints with the lowest loss, and no others."""

  def __init__(self, n: int):
    self.n = n

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    known = [c for c in checkpoints if c.metrics]
    best = sorted(known, key=lambda c: c.metrics["loss"])[: self.n]
    return [c in best for c in checkpoints]


class _Uninteresting(logging.Filter):
  """What Orbax warns of although it was asked for."""

  def filter(self, record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(
      part in text
      for part in (
        "Skipping merge of OCDBT",
        "due to incompatible handler",
        "jax.multihost_utils",
      )
    )


def _quiet(known: Callable[[], Any] = absl_logging.get_absl_logger) -> None:
  logger = known()
  if not any(isinstance(f, _Uninteresting) for f in logger.filters):
    logger.addFilter(_Uninteresting())
