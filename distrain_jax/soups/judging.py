"""Members, ensembles and soups judged on the splits of a config's data."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
from ml_collections import ConfigDict

from distrain_jax import data, train
from distrain_jax.models import Task
from distrain_jax.soups import (
  averages,
  channels,
  ensembles,
  paths,
  repairing,
  runs,
)
from distrain_jax.soups.paths import Path

SPLITS = ("validation", "test")
Scores = dict[str, dict[str, float]]  # split -> {"loss", "accuracy"}


class Judge(NamedTuple):
  """How models of one config are scored, and mended where that is due."""

  task: Task
  module: nn.Module
  splits: Mapping[str, Any]  # name -> its batches
  scores: Callable[[Any, str], dict[str, float]]  # (model, split)
  # (model) -> the model with BatchNorm's statistics estimated anew; of a model
  # without any it is the model.
  mend: Callable[[Any], Any]
  has_statistics: bool
  batches: Sequence[Any]  # of training, for statistics
  inputs: str  # key of the module's input in a batch


def judge_of(
  c: ConfigDict, model: Any, *, batches: int = 8, eval_batches: int = 0
) -> Judge:
  """The data and functions that judge models such as `model`.

  Args:
    c: a run's config; one device is used, whatever its mesh.
    model: one that is to be judged.
    batches: how many of training statistics are estimated from.
    eval_batches: the first so many of each split; 0: all.

  Raises:
    ValueError, FileNotFoundError: as `train.build`.
  """
  dataset, built = data.load(c.data), runs.program(c)
  average = train.evaluator(built.run, built.task.evaluate)

  def split(name):
    source, size = getattr(dataset, name), c.evaluation.batch_size
    found = data.eval_batches(source, batch_size=size)
    return (
      list(itertools.islice(found, eval_batches)) if eval_batches else found
    )

  splits = {name: split(name) for name in SPLITS}
  training = data.train_iterator(
    dataset.train, batch_size=c.batch_size, seed=c.seed, augment=dataset.augment
  )
  taken = list(itertools.islice(training, batches))
  training.close()
  inputs = "tokens" if dataset.info.kind == "text" else "image"
  recalibrate = train.recalibrator(built.run, built.model, inputs=inputs)
  state = getattr(model, "model_state", {})
  return Judge(
    built.task,
    built.model,
    splits,
    lambda model, split: average(model, splits[split]),
    lambda model: recalibrate(model, taken),
    bool(state.get(channels.STATISTICS)),
    taken,
    inputs,
  )


class Soups(NamedTuple):
  """What `cook` returns."""

  models: dict[str, Any]  # by name
  greedy: averages.Greedy
  no_repair: str  # why there is none among them; "": there is


def cook(members: Sequence[Any], judge: Judge, score: str = "") -> Soups:
  """All soups of the members.

  Args:
    members: models of one architecture.
    judge: of them.
    score: "accuracy" or "loss" on the validation split, by which the greedy
      soup is chosen; "": accuracy for images, loss for text.
  """
  plain, why = averages.uniform(members), ""
  found = {"uniform": plain}
  if judge.has_statistics:
    found["recalibrated"] = judge.mend(plain)
  inputs = judge.inputs
  try:
    repaired = repairing.repair(
      judge.module, members, judge.batches, inputs=inputs
    )
    found["repair"] = judge.mend(repaired.model)
  except ValueError as e:  # the members are checked: it is of the module
    why = str(e)
  score = score or ("accuracy" if inputs == "image" else "loss")
  sign = -1 if score == "loss" else 1
  best = averages.greedy(
    members,
    lambda model: sign * judge.scores(model, "validation")[score],
    average=lambda models: judge.mend(averages.uniform(models)),
  )
  return Soups(found | {"greedy": best.model}, best, why)


def table(
  members: Mapping[str, Any], soups: Soups, judge: Judge
) -> dict[str, Scores]:
  """Name -> split -> scores: of members, their mean, ensembles and soups."""
  every = lambda model: {x: judge.scores(model, x) for x in SPLITS}
  rows = {name: every(model) for name, model in members.items()}
  mean = lambda k, split: sum(x[split][k] for x in rows.values()) / len(rows)
  keys = ("loss", "accuracy")
  rows["mean of members"] = {x: {k: mean(k, x) for k in keys} for x in SPLITS}
  models = list(members.values())
  together = {
    x: ensembles.evaluate_ensemble(judge.task, models, judge.splits[x])
    for x in SPLITS
  }
  for how in ensembles.HOW:
    rows[f"ensemble of {how}"] = {x: together[x][how] for x in SPLITS}
  return rows | {
    f"soup: {name}": every(model) for name, model in soups.models.items()
  }


def walk(
  members: Mapping[str, Any],
  judge: Judge,
  pairs: Sequence[tuple[str, str]],
  *,
  points: int = 11,
  layer_points: int = 0,
  depth: int | None = None,
) -> tuple[dict[str, Path], dict[str, Path]]:
  """Paths of the validation loss between pairs of members, and by layer.

  Models on the way have BatchNorm's statistics estimated anew.

  Args:
    members: name -> model.
    judge: of them.
    pairs: names, from and to.
    points: of each path.
    layer_points: of each layer's path, for the first pair; 0: none.
    depth: as for `layer_paths`.

  Returns:
    ({"a to b": path}, {layer: path}).
  """

  def loss(model):  # of the ends themselves, and of others
    if not any(model is x for x in members.values()):
      model = judge.mend(model)
    return judge.scores(model, "validation")["loss"]

  found = {
    f"{a} to {b}": paths.path(members[a], members[b], loss, points)
    for a, b in pairs
  }
  layers = {}
  if layer_points:
    a, b = (members[x] for x in pairs[0])
    layers = paths.layer_paths(a, b, loss, layer_points, depth=depth)
  return found, layers
