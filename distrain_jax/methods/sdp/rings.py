"""Workers and groups of units on a ring: who holds, and owns, which group.

NumPy only. Letters in shapes: N workers, G groups, g groups that a worker holds,
F fragments of a group.
"""

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 2e-3  # of a coverage written in three digits, such as 0.333


def ring(units: int, workers: int) -> int | None:
  """How many groups units are cut into; None where they cannot be.

  As many as workers where those divide the units; else single units, as the
  heads of a small model, if there are more than one.

  >>> ring(2048, 8), ring(12, 8), ring(1, 8)
  (8, 12, None)
  """
  if units % workers == 0:
    return workers
  return units if units > 1 else None


def holders(workers: int, coverage: float) -> int:
  """How many workers hold each unit.

  Raises:
    ValueError: if that is no whole number, saying what is nearest.

  >>> [holders(8, c) for c in (0.125, 0.375, 0.5, 1.0)]
  [1, 3, 4, 8]
  """
  count = round(coverage * workers)
  if count == 0 or abs(coverage * workers - count) > TOLERANCE:
    below = math.floor(coverage * workers)
    nearest = " or ".join(
      _fraction(n, workers) for n in (below, below + 1) if n > 0
    )
    raise ValueError(
      f"sdp: coverage={coverage} on {workers} workers gives each unit "
      f"{coverage * workers:g} holders, which is no whole number. Nearest: "
      f"{nearest}."
    )
  return count


def _fraction(n: int, of: int) -> str:
  """n / of in digits, and as it is written where that needs many."""
  exact = f"{n / of:.6g}"
  return exact if float(exact) == n / of else f"{exact} ({n}/{of})"


def windows(
  groups: int, workers: int, coverage: float, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Windows on the ring of groups.

  The holders of a group stand side by side. Where the workers do not divide
  the groups, some may hold one group more than others: 3 of 8 workers hold each
  of 12 groups, so half of the workers hold 5 of them and half 4.

  Args:
    groups: G.
    workers: N.
    coverage: the fraction of the groups that each worker is to hold.
    places: (N,), where on the ring of workers each one stands.

  Returns:
    `(held (N, g), owners (G, F))`: the groups in the order of the ring, G where
    a worker has fewer; and the fragments' owners.
  """
  r = holders(workers, coverage)
  fragments = workers // math.gcd(groups, workers)
  natural = np.arange(groups * fragments) * workers // (groups * fragments)
  natural = natural.reshape(groups, fragments)  # places, if those are holders
  # The last one's window starts at the group, those before it reach it.
  at = (natural[:, -1:] - np.arange(r)) % workers  # (G, r), places
  spread = at[:, np.arange(fragments) * r // fragments]
  inside = (natural[:, :, None] == at[:, None]).any(-1).all(1, keepdims=True)
  who = np.argsort(places)  # worker at each place
  held = np.zeros((workers, groups), bool)
  held[who[at], np.arange(groups)[:, None]] = True
  first = places * groups // workers
  return listed(held, first), who[np.where(inside, natural, spread)]


def nested(
  groups: int, workers: int, coverage: float
) -> tuple[np.ndarray, np.ndarray]:
  """The first groups of the ring, fewer for each worker than for the last.

  Worker 0 holds all, and their number falls by a constant factor, so that the
  mean is `coverage`: as in HeteroFL (Diao et al., 2021,
  https://arxiv.org/abs/2010.01264) with a rate for each client. Arrays are as
  long as worker 0's: nothing is saved.

  Returns:
    As `windows`.
  """
  low, high = 0.0, 1.0
  for _ in range(60):  # the factor whose mean is the coverage
    factor = (low + high) / 2
    mean = np.maximum(factor ** np.arange(workers), 1 / groups).mean()
    low, high = (factor, high) if mean < coverage else (low, factor)
  counts = np.rint(groups * high ** np.arange(workers)).clip(1)
  held = np.arange(groups) < counts[:, None]
  each = held.sum(0)  # holders: the first workers
  owners = np.arange(workers) * each[:, None] // workers
  return listed(held, np.zeros(workers, int)), owners


def renamed(held, owners, order: np.ndarray):
  """A ring's groups, by position, as what stands there."""
  names = np.append(order, len(order))  # none stays none
  return names[held], owners[np.argsort(order)]


def listed(held: np.ndarray, first: np.ndarray) -> np.ndarray:
  """(N, G) bools -> (N, g): groups from each worker's first on, then G."""
  (workers, groups), g = held.shape, held.sum(1).max()
  rows = np.full((workers, g), groups)
  for row, mine, start in zip(rows, held, first):
    order = (start + np.arange(groups)) % groups
    found = order[mine[order]]
    row[: len(found)] = found
  return rows


class Places(NamedTuple):
  """Where workers stand on a ring, and what stands beside them."""

  # Shuffles them, and the groups, anew for each ring; None: all in their own
  # order.
  rng: np.random.Generator | None = None
  turn: int = 0  # groups by which all windows move on
  # Whether shuffled workers stand at steps of a random stride: two that are
  # neighbours in one family or layer are far in another. Else side by side, so
  # that draws that take turns send their messages over the same distances.
  strides: bool = True

  def draw(self, workers: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """((N,) places of the workers, (G,) the groups in the order of the ring).

    However they stand, the exchange is one message a distance.
    """
    if self.rng is None:
      at = (np.arange(workers) + self.turn) % workers
      return at, np.arange(groups)
    steps = [s for s in range(1, workers + 1) if math.gcd(s, workers) == 1]
    stride = self.rng.choice(steps) if self.strides else 1
    at = (np.arange(workers) * stride + self.rng.integers(workers)) % workers
    return at, self.rng.permutation(groups)


IN_ORDER = Places()
