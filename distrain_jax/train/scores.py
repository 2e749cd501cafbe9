"""What a run is judged by: a split's averages, as its config asks for them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from distrain_jax import data, models
from distrain_jax.runners import Run
from distrain_jax.train.evaluate import evaluator, with_bits_per_byte
from distrain_jax.train.members import members_evaluator
from distrain_jax.train.recalibrate import recalibrator

Scores = Mapping[str, float]


def of_model(
  c: ConfigDict,
  run: Run,
  task: models.Task,
  model: nn.Module,
  dataset: data.Dataset,
  rows: Mapping[str, int],
  training_batches: Callable[[], Iterator[Any]],
) -> Callable[[Any, str], Scores]:
  """`(params, split) -> {"loss", ...}`; see `Experiment.evaluate`.

  Args:
    c: the config.
    run, task, model: what is trained.
    dataset: with the splits.
    rows: which rows of a batch are this process's.
    training_batches: from the run's first one.
  """
  average = evaluator(run, task.evaluate)
  inputs = "tokens" if dataset.info.kind == "text" else "image"
  recalibrate = recalibrator(run, model, inputs=inputs)
  count = c.evaluation.recalibrate

  def evaluate(params, split):
    if count:
      # Always the run's first ones: the evaluation depends on params alone.
      with contextlib.closing(training_batches()) as batches:
        params = recalibrate(params, itertools.islice(batches, count))
    source, batches = _batches(c, dataset, split, rows)
    means = average(params, batches)
    return with_bits_per_byte(means, source.info.bytes_per_token)

  return evaluate


def of_members(
  c: ConfigDict,
  run: Run,
  task: models.Task,
  model: nn.Module,
  dataset: data.Dataset,
  rows: Mapping[str, int],
) -> Callable[[Any, str], Scores] | None:
  """`(state, split) -> {"members_loss", ...}`, where the config asks for it.

  Args: as of `of_model`.

  Raises:
    ValueError: if the workers of the config's method are all alike.
  """
  del model
  if not c.evaluation.members:
    return None
  if run.method.member is None:
    raise ValueError(
      "config.evaluation.members=True scores the workers' own models, but with "
      f"config.method.name={run.method.name!r} they are all alike. Set "
      "--config.evaluation.members=False."
    )
  average = members_evaluator(run, task)
  return lambda state, split: average(
    state, _batches(c, dataset, split, rows)[1]
  )


def _batches(c, dataset, split: str, rows):
  source = getattr(dataset, split)
  size = c.evaluation.batch_size
  return source, data.eval_batches(source, batch_size=size, **rows)
