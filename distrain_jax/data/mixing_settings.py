"""How strongly `mixing` mixes, for each member of a population."""

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distrain_jax.data import members as population
from distrain_jax.data import random_order


class Mixing(NamedTuple):
  """How strongly a batch is mixed; each a scalar, and 0 is off. See `mix`."""

  mixup: Any = 0.0  # alpha >= 0: lambda ~ Beta(alpha, alpha)
  cutmix: Any = 0.0  # alpha >= 0: lambda ~ Beta(alpha, alpha)
  smoothing: Any = 0.0  # [0, 1): of each label, spread over all classes
  erasing: Any = 0.0  # [0, 1]: probability, by row


def per_member(settings: Sequence[Mixing]) -> Mixing:
  """n settings as one `Mixing` of (n,) float32 NumPy arrays, to be indexed.

  Raises:
    ValueError: if there are none, or one is out of range.
  """
  settings = list(settings)
  if not settings:
    raise ValueError("per_member: needs at least one Mixing; got none.")
  for i, mixing in enumerate(settings):
    check(f"settings[{i}]: ", mixing)
  return Mixing(*(np.asarray(x, np.float32) for x in zip(*settings)))


def mixing_grid(
  members: int | Sequence[int],
  seed: int,
  *,
  mixup: Sequence[float] = (0.0, 0.5, 1.0),
  smoothing: Sequence[float] = (0.0, 0.05, 0.1),
  cutmix: Sequence[float] = (0.0, 0.5, 1.0),
  erasing: Sequence[float] = (0.0, 0.15, 0.35),
) -> list[Mixing]:
  """Settings that differ: all combinations, shuffled, one a member.

  The values are those of the code released with PAPA
  (https://arxiv.org/abs/2304.03094) for CIFAR; for ImageNet it has mixup
  (0, 0.1, 0.2). That code shuffles with another generator, so the same seed
  gives other members other combinations there.

  Args:
    members: how many, or their numbers, as for `train_iterator`. A member's
      combination depends on its number and the seed, on nobody else; member
      81, or whatever the number of combinations, has that of member 0 again.
    seed: 0 <= seed < 2**63.
    mixup, smoothing, cutmix, erasing: the values to combine.

  Raises:
    ValueError: for bad members or seed, or a value out of range.
  """
  if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
    raise ValueError(f"seed={seed!r} must be an integer in [0, 2**63).")
  chosen = np.asarray(population.numbers(members))
  grid = [
    Mixing(mixup=m, cutmix=c, smoothing=s, erasing=e)
    for m, s, c, e in itertools.product(mixup, smoothing, cutmix, erasing)
  ]
  per_member(grid)  # checks it
  stream, rounds = random_order.SETTINGS, random_order.ROUNDS
  keys = random_order.words(int(seed), stream, 0, 1, rounds)[0]
  return [
    grid[i] for i in random_order.permute(chosen % len(grid), len(grid), keys)
  ]


RANGES = {  # field -> (what it is, whether a number can be one)
  "mixup": ("an alpha, finite and at least 0", lambda x: 0 <= x < math.inf),
  "cutmix": ("an alpha, finite and at least 0", lambda x: 0 <= x < math.inf),
  "smoothing": ("a fraction in [0, 1)", lambda x: 0 <= x < 1),
  "erasing": ("a probability in [0, 1]", lambda x: 0 <= x <= 1),
}


def check(who: str, mixing: Mixing) -> None:
  """Refuses numbers out of range; arrays pass, whose values may be traced.

  Raises:
    ValueError: with `who` first, then the field and its value.
  """
  for name, (what, can_be) in RANGES.items():
    x = getattr(mixing, name)
    if isinstance(x, jax.Array | np.ndarray):
      continue
    number = isinstance(x, numbers.Real) and not isinstance(x, bool)
    if not (number and can_be(x)):
      raise ValueError(
        f"{who}Mixing.{name}={x!r} must be {what}; 0 turns it off."
      )


def is_off(setting: Any) -> bool:
  """Whether a setting is known to be 0 where the program is made."""
  return isinstance(setting, numbers.Real) and setting == 0
