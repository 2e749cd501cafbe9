"""Who holds what: tables of the workers' cells, made before anything compiles.

A family of units is cut into cells: one group of units in one layer. Workers
stand on a ring with the groups; each holds the groups of a window that starts
where it stands. So all hold equally many, every cell has equally many holders,
and neighbours overlap: with 8 groups and coverage 1/2 worker 2 holds the groups
2, 3, 4, 5. Coverage 1/N is disjoint models; from 2/N on they are connected.

NumPy only. Letters in shapes: N workers, L layers (1 where a family is not
stacked), G groups, l layers and g groups that a worker holds, F fragments.
"""

import math
from typing import NamedTuple

import numpy as np

TOLERANCE = 2e-3  # of a coverage written in three digits, such as 0.333


class Holding(NamedTuple):
  """Which cells each worker holds, and who updates each of them.

  `size`, the number of layers or groups, stands for none: a worker may hold
  fewer than the others, its last places are then empty.
  """

  size: tuple[int, int]  # (L, G)
  lanes: np.ndarray  # (N, l): layers of each worker, in order of depth
  groups: np.ndarray  # (N, l, g): groups in each of them
  # (L * G, F): each fragment's owner, one of the cell's holders. A cell is cut
  # into F fragments where its elements are, so that all own equally many.
  owners: np.ndarray

  @property
  def cells(self) -> np.ndarray:
    """(N, l * g): layer * G + group of each place; L * G where it is empty."""
    (layers, groups), n = self.size, len(self.lanes)
    cells = self.lanes[:, :, None] * groups + self.groups
    empty = (self.lanes[:, :, None] == layers) | (self.groups == groups)
    return np.where(empty, layers * groups, cells).reshape(n, -1)

  @property
  def held(self) -> np.ndarray:
    """(N, L * G), bool."""
    n, total = len(self.lanes), math.prod(self.size)
    held = np.zeros((n, total + 1), bool)
    np.put_along_axis(held, self.cells, True, axis=1)
    return held[:, :total]

  @property
  def coverage(self) -> float:
    """The fraction of the cells that a worker holds, the mean over workers."""
    return float(self.held.mean())

  @property
  def of_layers(self) -> float:
    """The fraction of the layers of which it holds something."""
    by_layer = self.held.reshape(len(self.lanes), *self.size)
    return float(by_layer.any(2).mean())


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
  return _listed(held, first), who[np.where(inside, natural, spread)]


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
  return _listed(held, np.zeros(workers, int)), owners


def _listed(held: np.ndarray, first: np.ndarray) -> np.ndarray:
  """(N, G) bools -> (N, g): groups from each worker's first on, then G."""
  (workers, groups), g = held.shape, held.sum(1).max()
  rows = np.full((workers, g), groups)
  for row, mine, start in zip(rows, held, first):
    order = (start + np.arange(groups)) % groups
    found = order[mine[order]]
    row[: len(found)] = found
  return rows


def places(workers: int, rng: np.random.Generator | None) -> np.ndarray:
  """Where the workers stand on the ring: (N,).

  Without `rng` in their own order. With it at steps of a random stride: two
  workers that are neighbours in one family or layer are far in another, and
  the exchange stays one message a distance, all of one size.
  """
  if rng is None:
    return np.arange(workers)
  coprime = [s for s in range(1, workers + 1) if math.gcd(s, workers) == 1]
  stride, first = rng.choice(coprime), rng.integers(workers)
  return (np.arange(workers) * stride + first) % workers


def neurons(
  layers: int,
  units: int,
  workers: int,
  coverage: float,
  rng: np.random.Generator | None = None,
  first_units: bool = False,
) -> Holding | None:
  """Neuron level: every layer, of each the window of the worker's place.

  Args:
    layers: L, 1 where all layers are to have the same windows.
    units: of one layer.
    workers: N.
    coverage: the fraction of the units that each worker is to hold.
    rng: shuffles the workers' places in every layer.
    first_units: `nested` instead of windows.

  Returns:
    The holding; None if the units cannot be cut.
  """
  groups = ring(units, workers)
  if groups is None:
    return None
  if first_units:
    each = [nested(groups, workers, coverage)] * layers
  else:
    each = [
      windows(groups, workers, coverage, places(workers, rng))
      for _ in range(layers)
    ]
  return Holding(
    size=(layers, groups),
    lanes=np.tile(np.arange(layers), (workers, 1)),
    groups=np.stack([held for held, _ in each], axis=1),
    owners=np.concatenate([owners for _, owners in each]),
  )


def blocks(
  layers: int,
  workers: int,
  coverage: float,
  rng: np.random.Generator | None = None,
) -> Holding | None:
  """Block level: a window of the layers, each layer whole.

  Layers go round the ring of workers as often as they can: of 16 layers and 8
  workers worker 2 holds, at coverage 1/2, the layers 2, 3, 4, 5, 10, 11, 12, 13.

  Args:
    layers: L.
    workers: N.
    coverage: the fraction of the layers that each worker is to hold.
    rng: shuffles the workers' places in every round.

  Returns:
    The holding; None for a single layer.
  """
  groups = ring(layers, workers)
  if groups is None:
    return None
  held = np.zeros((workers, layers), bool)
  owners = []
  for first in range(0, layers, groups):
    at = places(workers, rng)
    window, owner = windows(groups, workers, coverage, at)
    for row, mine in zip(held, window):
      row[first + mine[mine < groups]] = True
    owners.append(owner)
  lanes = _listed(held, np.zeros(workers, int))  # in order of depth
  return Holding(
    size=(layers, 1),
    lanes=lanes,
    groups=np.zeros((*lanes.shape, 1), int),
    owners=np.concatenate(owners),
  )


def both(
  layers: int,
  units: int,
  workers: int,
  coverage: tuple[float, float],
  rng: np.random.Generator | None = None,
) -> Holding | None:
  """Both levels: a window of the layers, of each a window of its units.

  The holders of a layer stand on a ring of their own, in which its units are
  dealt out: each cell has as many holders as its layer's coverage allows.

  Args:
    layers: L.
    units: of one layer; 1 for what every holder of a layer holds.
    workers: N.
    coverage: the fraction of the layers, and of their units.
    rng: shuffles the workers' places.

  Returns:
    The holding; None if the layers cannot be cut.
  """
  outer = blocks(layers, workers, coverage[0], rng)
  if outer is None or units == 1:
    return outer
  at = [np.flatnonzero(row) for row in outer.held.T]  # holders, layer by layer
  inner = [neurons(1, units, len(h), coverage[1]) for h in at]
  if inner[0] is None:
    return None
  width = max(one.groups.shape[-1] for one in inner)
  groups = np.full((*outer.lanes.shape, width), inner[0].size[1])
  for w in range(workers):
    for i, layer in enumerate(outer.lanes[w]):
      if layer == layers:
        continue
      place = int(np.searchsorted(at[layer], w))
      groups[w, i] = inner[layer].groups[place, 0]
  owners = [h[one.owners] for h, one in zip(at, inner)]
  size = (layers, inner[0].size[1])
  return Holding(size, outer.lanes, groups, np.concatenate(owners))


def check(family: str, holding: Holding) -> Holding:
  """Refuses a table by which something would be lost.

  Raises:
    ValueError: if a cell has no holder, or an owner that does not hold it.
  """
  held = holding.held
  lost = np.flatnonzero(~held.any(0))
  if lost.size:
    layer, group = divmod(int(lost[0]), holding.size[1])
    raise ValueError(
      f"sdp: no worker holds group {group} of {family!r} in layer {layer} "
      f"(and {lost.size - 1} more): what nobody holds is never trained. Raise "
      "the coverage, or give it a holder in `assignment`."
    )
  cells = np.arange(held.shape[1])[:, None]
  if not held[holding.owners, cells].all():
    raise ValueError(
      f"sdp: an owner of {family!r} is not among the holders of its cell."
    )
  return holding
