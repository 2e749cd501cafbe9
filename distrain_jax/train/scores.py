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
from distrain_jax.train.members import (
  greedy_soup,
  members_evaluator,
  mixer,
  relative_distance,
)
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
  evaluate: Callable[[Any, str], Scores],
) -> Callable[[Any, str], Scores] | None:
  """`(state, split) -> {"members_loss", ...}`, where the config asks for it.

  Of a population also the greedy soup, chosen on the validation split by
  accuracy, its number of members, and how far the members are apart (see
  `soups.consensus_distance`: `relative`).

  Args: as of `of_model`, and
    evaluate: what that returned.

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
  of_split = lambda state, split: average(
    state, _batches(c, dataset, split, rows)[1]
  )
  if not run.method.population:
    return of_split
  mix, distance = mixer(run), relative_distance(run)

  def of_population(state, split):
    held_out = lambda model: evaluate(model, "validation")["accuracy"]
    soup, size = greedy_soup(mix, state, run.workers, held_out)
    greedy = evaluate(soup, split)
    return {
      **of_split(state, split),
      **{f"greedy_{name}": greedy[name] for name in ("loss", "accuracy")},
      "greedy_size": size,
      "distance": float(distance(state)),
    }

  return of_population


def _batches(c, dataset, split: str, rows):
  source = getattr(dataset, split)
  size = c.evaluation.batch_size
  return source, data.eval_batches(source, batch_size=size, **rows)
