"""Checkpoints of a run: state and data iterator in one, saved while it runs.

A thin layer over Orbax: what to keep, how to resume on another number of
workers, and how a save that was cut short leaves no trace.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from distrain_jax.runners import Run
from distrain_jax.train import other_workers
from distrain_jax.train.position import saveable


class Checkpoints:
  """The checkpoints under one folder; a context manager.

  Leaving it waits for the last save, so that nothing is lost.
  """

  def __init__(
    self,
    folder: Path,
    *,
    keep: int = 2,
    keep_best: int = 1,
    reading: bool = False,
  ):
    """Opens the folder, and clears what an interrupted save left.

    Args:
      folder: where; made if it is not there.
      keep: how many of the latest to keep.
      keep_best: how many more to keep, of those with the lowest loss.
      reading: nothing will be saved, and what is not complete stays: it may be
        a save of a run that goes on. Members are those of the checkpoint,
        whoever left since.
    """
    _quiet()
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # slow on many small leaves
    # Axes of members are read longer than they are; other shapes are checked.
    context.array.loading.enable_padding_and_truncation = True
    # A state may have got a field since that is empty here; leaves are checked.
    context.pytree.loading.partial_load = True
    # Replicas share the writing of large leaves only: a file per replica of
    # every small one would be most of the work.
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(keep)]
    if keep_best:
      kept.append(_Best(keep_best))
    self._orbax = ocp.training.Checkpointer(
      Path(folder).resolve(),
      context=context,
      save_decision_policy=_Always(),
      preservation_policy=policies.AnyPreservationPolicy(kept),
      cleanup_tmp_directories=not reading,
    )
    self._reading = reading

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
    best = _lowest(self._orbax.checkpoints, 1)
    return best[0].step if best else None

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
      {"state": state, "data": saveable(batches)},
      metrics=None if loss is None else {"loss": float(loss)},
      custom_metadata={
        "workers": run.workers,
        "method": run.method.name,
        "layout": run.method.layout,
        "numbers": other_workers.numbers(run),
      },
      overwrite=True,
    )

  def restore(self, step: int, run: Run, key, params, batches=None) -> Any:
    """The state saved at `step`, on this run's workers; batches move on too.

    Args:
      step: one of `steps`.
      run: the run to resume, on any number of workers.
      key, params: as for `run.init`; only shapes are used.
      batches: a fresh data iterator, which is set to where it was; None: the
        state alone is wanted.

    Raises:
      ValueError: for a checkpoint of another method, model or optimizer, or of
        other data, or if the method cannot change its number of workers.
    """
    metadata = self._orbax.checkpointables_metadata(step)
    saved = metadata.custom_metadata
    if saved["method"] != run.method.name:
      raise ValueError(
        f"The checkpoint at step {step} in {self._orbax.directory} is of "
        f"{saved['method']}, not of {run.method.name}. Set "
        f"--config.method.name={saved['method']}, or start in another folder."
        + self._way_over(step)
      )
    there, here = saved.get("layout", ""), run.method.layout
    if there != here:
      raise ValueError(
        f"The checkpoint at step {step} in {self._orbax.directory} was made "
        f"with {there or 'nothing of that'}, this run has {here or 'none'}: "
        "other parts lie in the same shapes. Set config.method as it was, or "
        "start in another folder." + self._way_over(step)
      )
    mine = like = run.abstract(key, params)
    try:
      same = saved["workers"] == run.workers
      if not self._reading:
        same = other_workers.same_workers(run, saved)
      if not same:
        if run.method.reshard is None:
          run.adopt(None)  # says why it cannot, before anything is read
        like = other_workers.of_other_workers(
          run, saved["workers"], key, params, mine
        )
    except ValueError as e:
      before = saved["workers"]
      other = "" if before == run.workers else f"not of {run.workers}, "
      raise ValueError(
        f"The checkpoint at step {step} in {self._orbax.directory} is of "
        f"{before} workers, {other}and {e}" + self._way_over(step)
      ) from e
    self._check_fits(step, metadata.metadata["state"], like)
    if batches is not None:
      self._restore_data(step, batches)
    divided = None
    if not same and run.method.population and run.mesh is not None:
      divided, like = saved["workers"], other_workers.divided(run, like)
    state = self._orbax.load_checkpointables(step, {"state": like})["state"]
    return state if same else other_workers.lay(run.adopt(state, divided), mine)

  def wait(self) -> None:
    """Until what was saved is on disk."""
    self._orbax.wait()

  def _check_fits(self, step: int, saved: Any, like: Any) -> None:
    """Orbax would cast dtypes in silence, and say the rest at length."""
    saved, like = _leaves(saved), _leaves(like)
    for name in sorted(saved | like):
      there, here = saved.get(name), like.get(name)
      if there != here:
        raise ValueError(
          f"The checkpoint at step {step} in {self._orbax.directory} is of "
          f"another model or optimizer: {name} is {there or 'missing'} there, "
          f"{here or 'missing'} here. Go back to the config that it was made "
          "with (config.json beside it), or start in another folder."
          + self._way_over(step)
        )

  def _way_over(self, step: int) -> str:
    """How to go on with a run's model where its state is of no use."""
    run = self._orbax.directory.parent
    if not (run / "config.json").is_file():
      return ""  # no trainer's folder
    return (
      " Its model can be taken along, into any method, number of workers or "
      f"split: python launch/export.py {run} {run}.safetensors --step={step}, "
      f"then --config.initial_params={run}.safetensors in another folder."
    )

  def _restore_data(self, step: int, batches: Any) -> None:
    """Apart from the state, so that the iterator's own errors are heard."""
    try:
      self._orbax.load_checkpointables(step, {"data": saveable(batches)})
    except KeyError as e:  # Orbax's, from what the iterator raised
      raise e.__cause__ or e from None


def saved_workers(folder: Path, step: int | None = None) -> tuple[int, int]:
  """(step, the number of workers) of a checkpoint; JAX need not have started.

  Args:
    folder: that of all checkpoints.
    step: None: the latest.

  Raises:
    FileNotFoundError: if there is none, with those that there are.
  """
  steps = sorted(int(x.name) for x in folder.glob("[0-9]*") if x.name.isdigit())
  if not steps or step not in (None, *steps):
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    there = f"those of {', '.join(map(str, steps))}" if steps else "none"
    raise FileNotFoundError(f"{folder}: no {wanted}; there are {there}.")
  step = steps[-1] if step is None else step
  # Orbax reads this file for us elsewhere, but starts JAX for it.
  file = folder / str(step) / "_CHECKPOINT_METADATA"
  return step, json.loads(file.read_text())["custom_metadata"]["workers"]


def _leaves(tree: Any) -> dict[str, str]:
  """Path -> shape and dtype; Orbax's metadata and states agree on paths."""

  def one(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.eval_shape(jax.random.key_data, x)  # as Orbax writes it
    return f"{tuple(x.shape)} {x.dtype}"

  return {
    jax.tree_util.keystr(path, simple=True, separator="."): one(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


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
    best = _lowest(checkpoints, self.n)
    return [c in best for c in checkpoints]


def _lowest(checkpoints, n: int) -> list[Any]:
  """The n with the lowest loss; never one without, or with NaN."""
  known = [c for c in checkpoints if c.metrics and c.metrics["loss"] < math.inf]
  return sorted(known, key=lambda c: c.metrics["loss"])[:n]


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
