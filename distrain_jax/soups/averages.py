"""Soups: several models averaged into one.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time", 2022,
https://arxiv.org/abs/2203.05482.

A model is any pytree of arrays, `Variables(params, model_state)` included.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distrain_jax.soups import trees


def uniform(models: Sequence[Any]) -> Any:
  """The mean of all models; BatchNorm's running statistics are averaged too.

  Those are not the statistics of the average: see `train.recalibrator`.

  Args:
    models: pytrees of arrays of the same structure, shapes and dtypes.

  Returns:
    The mean, leaf by leaf, summed in float32 or wider and returned in the
    leaves' own dtypes. Leaves that are no floats (counters, keys) must be equal
    in all models, and stay.

  Raises:
    ValueError: for no models, models that are unlike, or values that are not
      finite; it says which.

  >>> import numpy as np
  >>> uniform([{"w": np.zeros(2)}, {"w": np.ones(2)}])["w"].tolist()
  [0.5, 0.5]
  """
  trees.check("uniform", models)
  return trees.average(models, [1 / len(models)] * len(models))


def weighted(models: Sequence[Any], weights: Sequence[float]) -> Any:
  """sum_n weights[n] models[n]; see `uniform`.

  Args:
    models: as for `uniform`.
    weights: one number a model, that sum to 1 within 1e-6. One may be below 0:
      the result then lies outside of the models.

  Raises:
    ValueError: as `uniform`, and for weights that are not as said.
  """
  trees.check("weighted", models)
  weights = check_weights("weighted", weights, len(models))
  return trees.average(models, weights)


def check_weights(
  where: str, weights: Sequence[float], count: int
) -> list[float]:
  """As floats, or a ValueError: `count` finite numbers that sum to 1."""
  given = [float(w) for w in weights]
  if len(given) != count:
    raise ValueError(
      f"{where}: `weights` has {len(given)} numbers for {count} models; pass "
      "one a model."
    )
  total = sum(given)
  if not math.isfinite(total):
    raise ValueError(f"{where}: `weights` must be finite; got {given}.")
  if abs(total - 1) > 1e-6:
    raise ValueError(
      f"{where}: `weights` must sum to 1; {given} sum to {total:g}."
      + (f" Divide each by {total:g}." if total else "")
    )
  return given


class Scored(NamedTuple):
  """A soup that `greedy` has scored."""

  members: tuple[int, ...]  # which of the models
  score: float


class Greedy(NamedTuple):
  """What `greedy` returns."""

  model: Any
  chosen: tuple[int, ...]  # which of the models, in the order of joining
  # All that was scored, in order: each model alone, then each soup.
  tried: tuple[Scored, ...]


def greedy(
  models: Sequence[Any],
  score: Callable[[Any], float],
  *,
  average: Callable[[Sequence[Any]], Any] = uniform,
) -> Greedy:
  """Adds the models one by one, from the best, where that makes it better.

  A model stays in the soup if the soup's score is above the one before, not if
  it is equal: as the released code of PAPA (https://arxiv.org/abs/2304.03094),
  where Wortsman et al. keep equal ones too. So the result scores at least as
  well as the best model alone, on the data of `score`.

  Args:
    models: as for `uniform`.
    score: (model) -> a number on held-out data; higher is better. It is called
      2N - 1 times for N models.
    average: (models) -> the soup of several; for instance one that estimates
      BatchNorm's statistics anew. A soup of one is that model itself.

  Raises:
    ValueError: as `uniform`, or if a model's own score is NaN.
  """
  trees.check("greedy", models)
  tried = []
  for i, model in enumerate(models):
    tried.append(Scored((i,), float(score(model))))
    if math.isnan(tried[-1].score):
      raise ValueError(
        f"greedy: the score of models[{i}] is NaN. Leave that model out, or "
        "mend `score`: (model) -> a number, higher is better."
      )
  best, *others = sorted(tried, key=lambda x: -x.score)  # stable
  soup = models[best.members[0]]
  for other in others:
    members = best.members + other.members
    new = average([models[i] for i in members])
    tried.append(Scored(members, float(score(new))))
    if tried[-1].score > best.score:
      soup, best = new, tried[-1]
  return Greedy(soup, best.members, tuple(tried))
