"""Trees that differ by worker, in arrays that do not.

One program runs on all workers of a pipeline, so that what they hold must have
the same shapes. What all of them have alike stays as it is; the rest of each
one's is laid side by side in one flat buffer a dtype, as long as the longest.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Flat buffers are whole tiles, in which XLA for TPU lays arrays out: as rows of
# LANES they then lie in memory as flat.
TILE, LANES = 1024, 128
Packed = dict[str, Any]  # {"alike": (tree, ...), "flat": {dtype: (columns,)}}


class Part(NamedTuple):
  """A tree of one worker's, and where it lies."""

  treedef: Any
  shapes: tuple[Any, ...]  # (shape, dtype) of its leaves
  alike: int | None  # its place among what all have alike; None: flat


class Packing(NamedTuple):
  """Where the parts of every worker are; see `packing`."""

  parts: tuple[tuple[Part, ...] | None, ...]  # by worker; None: has nothing
  alike: tuple[Any, ...]  # trees of ShapeDtypeStruct that all workers have
  columns: dict[str, int]  # of the flat buffers, by dtype
  used: tuple[int, ...]  # bytes that each worker needs of them

  def zeros(self) -> Packed:
    """What a worker without anything holds."""
    zero = lambda x: jnp.zeros(x.shape, x.dtype)
    return {
      "alike": jax.tree.map(zero, self.alike),
      "flat": {d: jnp.zeros(n, d) for d, n in self.columns.items()},
    }

  def pack(self, parts: Sequence[Any], worker: int) -> Packed:
    """A worker's trees, in the order in which `packing` had them."""
    out = {"alike": list(self.alike), "flat": {d: [] for d in self.columns}}
    for tree, part in zip(parts, self.parts[worker]):
      leaves = jax.tree.leaves(tree)
      if part.alike is not None:
        tree = jax.tree.unflatten(
          jax.tree.structure(self.alike[part.alike]), leaves
        )
        out["alike"][part.alike] = tree
        continue
      for x, (_, dtype) in zip(leaves, part.shapes):
        out["flat"][dtype].append(jnp.ravel(x))
    flat = {}
    for dtype, rows in out["flat"].items():
      rest = self.columns[dtype] - sum(x.size for x in rows)
      flat[dtype] = jnp.concatenate([*rows, jnp.zeros(rest, dtype)])
    return {"alike": tuple(out["alike"]), "flat": flat}

  def unpack(self, packed: Packed, worker: int) -> list[Any]:
    """Undoes `pack`."""
    out, at = [], dict.fromkeys(self.columns, 0)
    for part in self.parts[worker]:
      if part.alike is not None:
        leaves = jax.tree.leaves(packed["alike"][part.alike])
      else:
        leaves = []
        for shape, dtype in part.shapes:
          size = int(np.prod(shape))
          x = packed["flat"][dtype][at[dtype] : at[dtype] + size]
          leaves.append(x.reshape(shape))
          at[dtype] += size
      out.append(part.treedef.unflatten(leaves))
    return out

  def columns_of(self, worker: int) -> dict[str, int]:
    """Of the flat buffers, how much a worker needs, by dtype."""
    columns: dict[str, int] = {}
    for part in self.parts[worker] or ():
      for shape, dtype in part.shapes if part.alike is None else ():
        columns[dtype] = columns.get(dtype, 0) + int(np.prod(shape))
    return columns

  def padding(self) -> tuple[int, ...]:
    """Bytes of each worker's flat buffers that it has no use for."""
    total = sum(n * np.dtype(d).itemsize for d, n in self.columns.items())
    return tuple(total - used for used in self.used)


def packing(by_worker: Sequence[Sequence[Any] | None]) -> Packing:
  """Where to put the parts of every worker.

  Args:
    by_worker: for each worker its trees (of arrays or ShapeDtypeStructs), or
      None for one that has nothing and whose content is of no matter. Trees
      of the same leaves, in order, count as alike whatever their keys are;
      the n-th of a kind on one worker goes with the n-th on the others.
  """
  described = [
    None if trees is None else [_shapes(tree) for tree in trees]
    for trees in by_worker
  ]
  present = [d for d in described if d is not None]
  common = {}  # leaves -> how many such trees every worker has
  for kind in present[0] if present else ():
    common[kind] = min(d.count(kind) for d in present)
  places, alike = {}, []  # (leaves, n-th) -> its place
  for trees, kinds in zip(by_worker, described):
    if kinds is None:
      continue
    seen: dict[Any, int] = {}
    for tree, kind in zip(trees, kinds):
      nth = seen[kind] = seen.get(kind, -1) + 1
      if nth < common[kind] and (kind, nth) not in places:
        places[kind, nth] = len(alike)
        alike.append(_structs(tree))
    break
  parts = []
  for trees, kinds in zip(by_worker, described):
    if kinds is None:
      parts.append(None)
      continue
    seen, mine = {}, []
    for tree, kind in zip(trees, kinds):
      nth = seen[kind] = seen.get(kind, -1) + 1
      place = places.get((kind, nth))
      mine.append(Part(jax.tree.structure(tree), kind, place))
    parts.append(tuple(mine))
  made = Packing(tuple(parts), tuple(alike), columns={}, used=())
  flat = [made.columns_of(w) for w in range(len(parts))]
  dtypes = sorted({d for columns in flat for d in columns})
  longest = {d: max(c.get(d, 0) for c in flat) for d in dtypes}
  longest = {d: -(-n // TILE) * TILE for d, n in longest.items()}
  used = [sum(n * np.dtype(d).itemsize for d, n in c.items()) for c in flat]
  return made._replace(columns=longest, used=tuple(used))


def _shapes(tree) -> tuple[Any, ...]:
  return tuple(
    (tuple(jnp.shape(x)), str(jnp.result_type(x)))
    for x in jax.tree.leaves(tree)
  )


def _structs(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
  )
