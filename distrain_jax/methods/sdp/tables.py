"""From a method's options to every worker's table."""

import math
import zlib
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import jax
import numpy as np

from distrain_jax.methods.sdp import assignments, rings, whole
from distrain_jax.methods.sdp.assignments import Holding, Places
from distrain_jax.methods.sdp.structure import LEVELS, Structure
from distrain_jax.whole import is_whole

ASSIGNMENTS = ("cyclic", "shuffled", "balanced", "nested", "rolling")
REDRAWN = ("shuffled", "rolling")
# (family, layers or 1, units, workers) -> its holding; None: shared by all.
Assignment = str | Callable[[str, int, int, int], Holding | None]
Coverage = float | tuple[float, float]


def of_levels(level: str, coverage: Coverage) -> Coverage:
  """One number for both levels as a pair of it."""
  if level == "both" and isinstance(coverage, Real):
    return coverage, coverage
  return coverage


def check(level: str, coverage: Coverage, assignment: Assignment) -> None:
  """Refuses options that mean nothing.

  Raises:
    ValueError: saying which, and what it may be.
  """
  if level not in LEVELS:
    raise ValueError(f"sdp: `level` is {', '.join(LEVELS)}; got {level!r}.")
  if assignment == "nested" and level != "neuron":
    raise ValueError(
      "sdp: assignment='nested' is by width, for level='neuron'; got level="
      f"{level!r}. Change one."
    )
  wanted = 2 if level == "both" else 1
  given = coverage if isinstance(coverage, (tuple, list)) else (coverage,)
  good = all(isinstance(c, Real) and 0 < c <= 1 for c in given)
  if len(given) != wanted or not good:
    form = "(of the layers, of their units)" if wanted == 2 else "one number"
    raise ValueError(
      "sdp: `coverage` is the fraction of what is sampled that each worker "
      f"holds, in (0, 1], and with level={level!r} {form}; got {coverage!r}."
    )
  if not callable(assignment) and assignment not in ASSIGNMENTS:
    raise ValueError(
      f"sdp: `assignment` is {', '.join(ASSIGNMENTS)}, or a function (family, "
      f"layers, units, workers) -> Holding; got {assignment!r}."
    )


def check_redraw(assignment: Assignment, redraw_every: int | None) -> None:
  """Refuses to draw anew what does not change.

  Raises:
    ValueError: if redraw_every is no number of steps, or without meaning.
  """
  if redraw_every is not None and not is_whole(redraw_every, 1):
    raise ValueError(
      "sdp: `redraw_every` is the number of steps between two draws of the "
      f"masks, at least 1, or None; got {redraw_every!r}."
    )
  if redraw_every is None:
    fits = assignment != "rolling"
  else:
    fits = assignment in REDRAWN
  if not fits:
    raise ValueError(
      f"sdp: redraw_every={redraw_every!r} and assignment={assignment!r} do not "
      f"go together: of {' and '.join(map(repr, REDRAWN))} another one is drawn "
      "every so many steps, others stay as they are."
    )


def hold(
  structure: Structure,
  workers: int,
  *,
  level: str,
  coverage: Coverage,
  assignment: Assignment,
  seed: int,
  draw: int | None = None,
) -> dict[str, Holding]:
  """Every family's holding.

  Raises:
    ValueError: if something has no holder, or nothing can be cut.
  """
  holdings = {}
  for family, (layers, units) in structure.families.items():
    if callable(assignment):
      found = assignment(family, layers, units, workers)
    else:
      # Of the family's own, so that adding one does not change the others;
      # the layers are one table, whatever is sampled inside of them.
      name = family if level == "neuron" else "layers"
      at = _places(name, assignment, seed, draw)
      first = assignment == "nested"
      found = _one(level, layers, units, workers, coverage, at, first)
    if found is not None:
      _check_size(family, found, layers, units, workers)
      holdings[family] = assignments.check(family, found)
  _check_lanes(holdings, level)
  if not holdings:
    raise ValueError(
      f"sdp: none of {dict(structure.families)} (layers, units) can be cut for "
      f"{workers} workers: every family has a single unit. Choose another "
      "level, or a model with more."
    )
  return holdings


def hold_blocks(
  blocks: Mapping[str, Any],
  workers: int,
  *,
  level: str,
  coverage: Coverage,
  assignment: Assignment,
  seed: int,
  draw: int | None = None,
) -> np.ndarray:
  """Who holds which of the blocks that are held whole: (N, K), bool.

  Args:
    blocks: shapes by name.

  Raises:
    ValueError: if the coverage is not that of a whole number of holders.
  """
  if callable(assignment):
    found = [assignment(name, 1, 1, workers) for name in blocks]
    everyone = np.ones(workers, bool)
    columns = [everyone if x is None else x.held[:, 0] for x in found]
    return np.stack(columns, axis=1)
  sizes = {
    name: sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    for name, leaves in ((n, jax.tree.leaves(b)) for n, b in blocks.items())
  }
  rng = None
  if assignment == "shuffled":
    rng = np.random.default_rng([seed, zlib.crc32(b"blocks"), draw or 0])
  wanted = coverage[0] if level == "both" else coverage
  holders = rings.holders(workers, wanted)
  balanced = assignment == "balanced"
  held = whole.hold(sizes, workers, holders, rng, balanced)
  return np.roll(held, draw or 0, axis=0) if assignment == "rolling" else held


def _check_size(family, holding, layers, units, workers) -> None:
  """Refuses a table that is not of this family, as a function may give."""
  good = (
    isinstance(holding, Holding)
    and holding.size[0] == layers
    and units % holding.size[1] == 0
    and len(holding.lanes) == workers
    and holding.groups.shape[:2] == holding.lanes.shape
    and len(holding.owners) == math.prod(holding.size)
  )
  if not good:
    raise ValueError(
      f"sdp: `assignment` gave no table of {family!r}: it returns None, or a "
      f"Holding of {layers} layers and {units} units (in groups of one size) "
      f"for {workers} workers; got {holding!r}."
    )


def _check_lanes(holdings: dict[str, Holding], level: str) -> None:
  """Refuses tables by which a worker's arrays have different layers."""
  stacked = {k: h.lanes for k, h in holdings.items() if h.size[0] > 1}
  if not stacked:
    return
  first, lanes = next(iter(stacked.items()))
  if level == "neuron":  # and so have all arrays of which nothing is sampled
    lanes = np.tile(np.arange(holdings[first].size[0]), (len(lanes), 1))
  for family, other in stacked.items():
    if not np.array_equal(lanes, other):
      wanted = "all layers" if level == "neuron" else f"those of {first!r}"
      raise ValueError(
        f"sdp: by `assignment` the layers that workers hold of {family!r} are "
        f"not {wanted}, but at level={level!r} one block's arrays stay "
        "together."
      )


def _places(
  name: str, assignment: Assignment, seed: int, draw: int | None
) -> Places:
  """Where workers stand, for a family or the layers."""
  if assignment == "rolling":
    return Places(turn=draw or 0)
  if assignment != "shuffled":
    return Places()
  own = [seed, zlib.crc32(name.encode()), draw or 0]
  return Places(np.random.default_rng(own), strides=draw is None)


def _one(level, layers, units, workers, coverage, at, first) -> Holding | None:
  if level == "neuron":
    return assignments.neurons(layers, units, workers, coverage, at, first)
  if level == "block":
    return assignments.blocks(layers, workers, coverage, at)
  return assignments.both(layers, units, workers, coverage, at)
