"""How far the members of a population are from their mean, by layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distrain_jax.soups import trees


class Distance(NamedTuple):
  """Of the members n of N, w_n, from their mean m."""

  squared: float  # (1/N) sum_n |w_n - m|^2
  # sqrt(squared / ((1/N) sum_n |w_n|^2)): root mean squares of both; 0 where
  # all is 0. Of members independent of each other and of mean 0: about 1.
  relative: float


class Consensus(NamedTuple):
  """What `consensus_distance` returns."""

  total: Distance
  by_layer: dict[str, Distance]  # their `squared` sum up to the total's


def consensus_distance(
  models: Sequence[Any], *, depth: int | None = None
) -> Consensus:
  """D = (1/N) sum_n |w_n - m|^2 with m the mean, by layer and in total.

  Of `Variables` only what is trained counts, not running statistics; leaves
  that are no floats never do.

  Args:
    models: as for `uniform`.
    depth: how deep to tell layers apart; see `layers`.

  Raises:
    ValueError: as `uniform` and `layers`.

  >>> pair = [{"a": np.zeros(2)}, {"a": np.array([2.0, 0.0])}]
  >>> consensus_distance(pair).total.squared
  1.0
  """
  trees.check("consensus_distance", models)
  models = [trees.trained(model) for model in models]
  leaves = [jax.tree.leaves(model) for model in models]
  squares = [_squares(xs) for xs in zip(*leaves)]  # (D, norm) a leaf
  by_layer = {
    name: _distance([squares[i] for i in own])
    for name, own in trees.layers(models[0], depth).items()
  }
  return Consensus(_distance(squares), by_layer)


def _squares(xs) -> tuple[float, float]:
  """(mean squared distance, mean squared norm) of the N values of a leaf."""
  xs = [trees.as_array(x) for x in xs]
  if not trees.is_float(xs[0]):
    return 0.0, 0.0
  kind = np.promote_types(np.float64, _numpy(xs[0]).dtype)
  xs = [_numpy(x).astype(kind) for x in xs]
  # Around the first: equal members are then at 0, to the bit.
  mean = xs[0] + sum(x - xs[0] for x in xs) / len(xs)
  square = lambda x: float(np.sum(np.abs(x) ** 2))
  apart = sum(square(x - mean) for x in xs) / len(xs)
  return apart, sum(map(square, xs)) / len(xs)


def _numpy(x) -> np.ndarray:
  """NumPy's; what it does not know (bfloat16) as float32."""
  x = np.asarray(x)
  return x if x.dtype.kind in "fc" else x.astype(np.float32)


def _distance(squares) -> Distance:
  apart, norm = (sum(x) for x in zip(*squares)) if squares else (0.0, 0.0)
  return Distance(apart, (apart / norm) ** 0.5 if norm else 0.0)
