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

from distrain_jax.methods.sdp.rings import IN_ORDER as IN_ORDER
from distrain_jax.methods.sdp.rings import Places as Places
from distrain_jax.methods.sdp.rings import (
  listed,
  nested,
  renamed,
  ring,
  windows,
)


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


def neurons(
  layers: int,
  units: int,
  workers: int,
  coverage: float,
  at: Places = IN_ORDER,
  first_units: bool = False,
) -> Holding | None:
  """Neuron level: every layer, of each the window of the worker's place.

  Args:
    layers: L, 1 where all layers are to have the same windows.
    units: of one layer.
    workers: N.
    coverage: the fraction of the units that each worker is to hold.
    at: where the workers stand, in every layer.
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
    each = []
    for _ in range(layers):
      places, order = at.draw(workers, groups)
      held, owners = windows(groups, workers, coverage, places)
      each.append(renamed(held, owners, order))
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
  at: Places = IN_ORDER,
) -> Holding | None:
  """Block level: a window of the layers, each layer whole.

  Layers go round the ring of workers as often as they can: of 16 layers and 8
  workers worker 2 holds, at coverage 1/2, the layers 2, 3, 4, 5, 10, 11, 12, 13.

  Args:
    layers: L.
    workers: N.
    coverage: the fraction of the layers that each worker is to hold.
    at: where the workers stand, in every round.

  Returns:
    The holding; None for a single layer.
  """
  groups = ring(layers, workers)
  if groups is None:
    return None
  held = np.zeros((workers, layers), bool)
  owners = []
  for first in range(0, layers, groups):
    places, order = at.draw(workers, groups)
    window, owner = windows(groups, workers, coverage, places)
    window, owner = renamed(window, owner, order)
    for row, mine in zip(held, window):
      row[first + mine[mine < groups]] = True
    owners.append(owner)
  lanes = listed(held, np.zeros(workers, int))  # in order of depth
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
  at: Places = IN_ORDER,
) -> Holding | None:
  """Both levels: a window of the layers, of each a window of its units.

  The holders of a layer stand on a ring of their own, in which its units are
  dealt out: each cell has as many holders as its layer's coverage allows.

  Args:
    layers: L.
    units: of one layer; 1 for what every holder of a layer holds.
    workers: N.
    coverage: the fraction of the layers, and of their units.
    at: where the workers stand.

  Returns:
    The holding; None if the layers cannot be cut.
  """
  outer = blocks(layers, workers, coverage[0], at)
  if outer is None or units == 1:
    return outer
  who = [np.flatnonzero(row) for row in outer.held.T]  # holders, layer by layer
  inner = [neurons(1, units, len(h), coverage[1]) for h in who]
  if inner[0] is None:
    return None
  width = max(one.groups.shape[-1] for one in inner)
  groups = np.full((*outer.lanes.shape, width), inner[0].size[1])
  for w in range(workers):
    for i, layer in enumerate(outer.lanes[w]):
      if layer == layers:
        continue
      place = int(np.searchsorted(who[layer], w))
      groups[w, i] = inner[layer].groups[place, 0]
  owners = [h[one.owners] for h, one in zip(who, inner)]
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
