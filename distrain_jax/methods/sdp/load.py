"""Who holds what of a model: a report from the static tables alone.

NumPy only. Letters in shapes: N workers, C cells of all families, a block that
is held whole counting as one.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distrain_jax.methods.sdp import cutting, tables
from distrain_jax.methods.sdp.alone import cut

CLOSED = 1e-9  # of a gap: what rounding leaves of 0


class Load(NamedTuple):
  """Made by `load`; prints as a table."""

  whole: int  # bytes of the model's parameters
  shared: int  # of those that every worker holds
  sampled: np.ndarray  # (N,), bytes of the others that each holds
  units: dict[str, np.ndarray]  # by family: (N,), units that each holds
  total: dict[str, int]  # by family: all units
  # (N, N): what two workers both hold, as a fraction of all sampled bytes; on
  # the diagonal what one of them holds.
  overlap: np.ndarray
  holders: tuple[int, int]  # of a cell: fewest, most
  connected: bool  # whether all workers hear of each other by what is sampled
  # 1 minus the second eigenvalue of a walk: from a worker to any of its cells,
  # from there to any of its holders. In [0, 1]; 0 where workers are apart.
  gap: float
  # (N,): operations of a worker's loss and gradient; None: nobody counted.
  flops: np.ndarray | None = None

  @property
  def bytes(self) -> np.ndarray:
    """(N,), of the parameters that each worker holds."""
    return self.shared + self.sampled

  @property
  def imbalance(self) -> float:
    """The largest worker's bytes over the mean."""
    return float(self.bytes.max() / self.bytes.mean())

  def __str__(self) -> str:
    return "\n".join([*_table(self), "", *_sentences(self)])


def load(
  names: Any,
  shapes: Any,
  *,
  workers: int,
  coverage: tables.Coverage = 0.5,
  level: str = "neuron",
  blocks: Collection[str] = (),
  assignment: tables.Assignment = "cyclic",
  seed: int = 0,
  shared: Collection[str] = (),
  param_dtype: DTypeLike | None = None,
) -> Load:
  """What each worker of `sdp` with these options holds; computes no array.

  With backward masking it is what each worker trains, the rest being held for
  its forward pass. Statistics such as BatchNorm's are not counted.

  Args:
    names, shapes: the model's, as of `sdp`.
    workers: N.
    coverage, level, blocks, assignment, seed, shared, param_dtype: as of `sdp`.

  Returns:
    A `Load`.

  Raises:
    ValueError: as `sdp`, and for a number of workers that cannot share so.

  >>> names = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
  >>> shapes = {"up": np.zeros((2, 8)), "down": np.zeros((8, 2))}
  >>> found = load(names, shapes, workers=4, coverage=0.5)
  >>> found.units["mlp"].tolist(), found.overlap[0].tolist()
  ([4, 4, 4, 4], [0.5, 0.25, 0.0, 0.25])
  """
  model, (params, _) = cut(
    names,
    shapes,
    workers=workers,
    coverage=coverage,
    level=level,
    blocks=blocks,
    assignment=assignment,
    seed=seed,
    shared=shared,
  )
  size = lambda x: (
    math.prod(x.shape) * jnp.dtype(param_dtype or x.dtype).itemsize
  )
  whole = sum(map(size, jax.tree.leaves(model.whole.params)))
  held, bytes_ = _cells(params, model.blocks.params, size)
  units, total = _units(params, model.found.families)
  count, weights = held.sum(0), held.astype(float)
  walk = _walk(weights)
  return Load(
    whole=whole,
    shared=whole - int(bytes_.sum()),
    sampled=held @ bytes_,
    units=units,
    total=total,
    overlap=(weights * bytes_) @ weights.T / bytes_.sum(),
    holders=(int(count.min()), int(count.max())),
    connected=_connected(walk > 0),
    gap=_gap(walk),
  )


def _cells(params: cutting.Cut, blocks, size) -> tuple[np.ndarray, np.ndarray]:
  """Who holds which cell, (N, C), bool; and its bytes, (C,)."""
  held, bytes_ = (
    [params.blocks.held],
    [[_sum(size, b) for b in blocks.values()]],
  )
  families: dict[str, list[Any]] = {}
  for sampled in params.nets.leaves:
    if sampled is not None:
      families.setdefault(sampled.leaf.family, []).append(sampled)
  for arrays in families.values():
    holding = arrays[0].holding
    count = math.prod(holding.size)
    held.append(holding.held)
    each = sum(size(s.leaf) for s in arrays) // count
    bytes_.append([each] * count)
  return np.concatenate(held, 1), np.concatenate(bytes_).astype(int)


def _sum(size, tree) -> int:
  return sum(map(size, jax.tree.leaves(tree)))


def _units(params: cutting.Cut, families):
  """{family: units of each worker (N,)}, {family: all}."""
  units, total = {}, {}
  for s in params.nets.leaves:
    if s is None or s.leaf.family in units:
      continue
    family, holding = s.leaf.family, s.holding
    total[family] = math.prod(families[family])
    a_cell = total[family] // math.prod(holding.size)
    units[family] = holding.held.sum(1) * a_cell
  if params.blocks.layouts:
    units["blocks"] = params.blocks.held.sum(1)
    total["blocks"] = params.blocks.held.shape[1]
  return units, total


def _walk(held: np.ndarray) -> np.ndarray:
  """Probabilities from worker to worker in two steps, (N, N); rows sum to 1.

  All cells of a worker are as likely, and all holders of a cell. A worker that
  holds none stays where it is.
  """
  own = held.sum(1, keepdims=True)
  walk = (held / held.sum(0)) @ held.T / np.maximum(own, 1)
  return np.where(own > 0, walk, np.eye(len(held)))


def _connected(near: np.ndarray) -> bool:
  for _ in range(len(near).bit_length()):  # each doubles the steps taken
    near = near @ near
  return bool(near.all())


def _gap(walk: np.ndarray) -> float:
  if len(walk) == 1:
    return 1.0
  # Its eigenvalues are real: the walk is reversible.
  second = np.sort(np.linalg.eigvals(walk).real)[-2]
  gap = float(np.clip(1 - second, 0, 1))
  return gap if gap > CLOSED else 0.0


def _table(x: Load) -> list[str]:
  """A row a worker, or one for all where they are alike."""
  head = ["worker", "bytes", "of model", "sampled", *x.units]
  columns = [x.bytes, x.sampled, *x.units.values()]
  if x.flops is not None:
    head.append("FLOPs")
    columns.append(x.flops)
  n = len(x.sampled)
  alike = all((np.asarray(c) == c[0]).all() for c in columns)
  rows = [head]
  for w in range(1 if alike else n):
    row = [f"each of {n}" if alike else str(w), f"{x.bytes[w]:,}"]
    row += [f"{x.bytes[w] / x.whole:.1%}", f"{x.sampled[w]:,}"]
    row += [f"{u[w]:,} of {x.total[f]:,}" for f, u in x.units.items()]
    rows.append(row + ([f"{x.flops[w]:.4g}"] if x.flops is not None else []))
  widths = [max(map(len, column)) for column in zip(*rows)]
  pad = lambda row: [cell.rjust(k) for cell, k in zip(row, widths)]
  rows.insert(1, ["-" * k for k in widths])
  return ["  ".join(pad(row)) for row in rows]


def _sentences(x: Load) -> list[str]:
  apart = x.overlap[~np.eye(len(x.overlap), dtype=bool)]
  pairs = _span(apart, ".3f") if apart.size else "none"
  fewest, most = x.holders
  holders = str(most) if fewest == most else f"{fewest} to {most}"
  return [
    f"The model has {x.whole:,} bytes, of which all workers share {x.shared:,}.",
    f"Holders of a cell: {holders}; two workers both hold {pairs} of what is "
    "sampled.",
    f"{'Connected' if x.connected else 'Not connected'}, spectral gap "
    f"{x.gap:.3f}; the largest worker has {x.imbalance:.3f} times the mean.",
  ]


def _span(values: np.ndarray, form: str) -> str:
  """Least to most, once where they print alike."""
  ends = dict.fromkeys(f"{v:{form}}" for v in (values.min(), values.max()))
  return " to ".join(ends)
