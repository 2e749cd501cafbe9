"""Sharding a tree over the workers leaf by leaf.

Each leaf, or each layer of a leaf of stacked layers, belongs to one worker,
largest first to whoever has least. All workers run one program, so that what
they hold is as long as the longest: their leaves one after the other in a flat
buffer a dtype, zero-padded.

Letters in shapes: N workers; a buffer is (rows, lanes), or (N, rows, lanes) of
all workers.
"""

import functools
import heapq
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.gradients import at_least_float32
from distrain_jax.layout import LANES, TILES
from distrain_jax.leafwise import only
from distrain_jax.method import Params

Buffers = dict[str, jax.Array]  # {dtype of the leaves: (rows, lanes)}


class Part(NamedTuple):
  """Of a leaf, what one worker has."""

  leaf: int
  layers: tuple[int, ...] | None  # ascending; None: the whole leaf


class LeafLayout(NamedTuple):
  """Which leaves of a tree are whose; see `make_leaf_layout`."""

  workers: int
  treedef: Any
  leaves: tuple[jax.ShapeDtypeStruct, ...]
  parts: tuple[tuple[Part, ...], ...]  # by worker, in the leaves' order
  columns: dict[str, int]  # elements of the buffers, by dtype

  def shape(self, part: Part) -> tuple[int, ...]:
    whole = self.leaves[part.leaf].shape
    return whole if part.layers is None else (len(part.layers), *whole[1:])

  def own(self, buffers: Buffers, worker: int) -> Params:
    """A worker's leaves in the tree, with `optax.MaskedNode` for others'."""
    found, at = {}, dict.fromkeys(self.columns, 0)
    flat = {k: x.reshape(-1) for k, x in buffers.items()}
    for part in self.parts[worker]:
      key, shape = self._key(part.leaf), self.shape(part)
      size = math.prod(shape)
      found[part.leaf] = flat[key][at[key] : at[key] + size].reshape(shape)
      at[key] += size
    leaves = [found.get(i) for i in range(len(self.leaves))]
    return only(self.treedef, leaves, found)

  def buffers(self, own: Params, worker: int, dtype: Any = None) -> Buffers:
    """Undoes `own`, in one dtype or (None) each buffer in its leaves'."""
    flat: dict[str, list[jax.Array]] = {key: [] for key in self.columns}
    for x, part in zip(jax.tree.leaves(own), self.parts[worker]):
      key = self._key(part.leaf)
      flat[key].append(x.reshape(-1).astype(dtype or key))
    out = {}
    for key, columns in self.columns.items():
      rest = columns - sum(x.size for x in flat[key])
      zeros = jnp.zeros(rest, dtype or key)
      out[key] = _lanes(jnp.concatenate([*flat[key], zeros]))
    return out

  def pieces(
    self, tree: Params, worker: jax.Array, dtype: Any = None
  ) -> Buffers:
    """This worker's of the whole tree."""
    branches = [
      functools.partial(self._taken, worker=w, dtype=dtype)
      for w in range(self.workers)
    ]
    return by_worker(worker, branches, jax.tree.leaves(tree))

  def all_pieces(self, tree: Params, dtype: Any = None) -> Buffers:
    """All workers', (N, rows, lanes)."""
    leaves = jax.tree.leaves(tree)
    every = [self._taken(leaves, w, dtype) for w in range(self.workers)]
    return jax.tree.map(lambda *x: jnp.stack(x), *every)

  def reduce_scatter(self, tree: Params, axis: str, wire_dtype=None) -> Buffers:
    """This worker's of the workers' mean tree, in float32 or wider.

    Travels, and is summed, in `wire_dtype` (None: the leaves' own).
    """
    one = lambda x: jax.lax.psum_scatter(x, axis, scatter_dimension=0)
    sums = jax.tree.map(one, self.all_pieces(tree, wire_dtype))
    return jax.tree.map(lambda x: at_least_float32(x) / self.workers, sums)

  def all_gather(self, pieces: Buffers, axis: str) -> Params:
    """The whole tree from every worker's, in each leaf's own dtype."""
    one = lambda key, x: jax.lax.all_gather(x.astype(key), axis)
    return self.whole({key: one(key, x) for key, x in pieces.items()})

  def whole(self, every: Buffers) -> Params:
    """The tree of all workers' buffers, (N, rows, lanes)."""
    found: list[list[Any]] = [[] for _ in self.leaves]
    for w in range(self.workers):
      own = self.own({k: x[w] for k, x in every.items()}, w)
      for x, part in zip(jax.tree.leaves(own), self.parts[w]):
        found[part.leaf].append((part, x))
    return self.treedef.unflatten(
      joined([(p.layers, x) for p, x in parts], 0) for parts in found
    )

  def _taken(self, leaves, worker, dtype):
    own = [
      x if layers is None else taken(x, layers, 0)
      for x, layers in ((leaves[i], layers) for i, layers in self.parts[worker])
    ]
    return self.buffers(own, worker, dtype)

  def _key(self, leaf: int) -> str:
    return str(self.leaves[leaf].dtype)


def by_worker(worker: jax.Array, branches: list[Any], *operands: Any) -> Any:
  """`lax.switch`, nothing of which lies on several of a worker's devices.

  Of a mesh with automatic axes: else XLA would have branches speak to devices
  that take other ones, and all would wait.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.auto_axes:
    return jax.lax.switch(worker, branches, *operands)
  alike = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  on_each = lambda tree: jax.lax.with_sharding_constraint(tree, alike)
  return on_each(jax.lax.switch(worker, branches, *on_each(operands)))


def taken(x: jax.Array, layers: tuple[int, ...], axis: int) -> jax.Array:
  """Some indices of an axis, ascending."""
  first, last = layers[0], layers[-1]
  if last - first + 1 == len(layers):
    return jax.lax.slice_in_dim(x, first, last + 1, axis=axis)
  return jnp.take(x, np.asarray(layers), axis=axis)


def joined(parts: list[tuple[Any, jax.Array]], axis: int) -> jax.Array:
  """Undoes `taken`: (layers, array) of each part, all layers once."""
  if parts[0][0] is None:
    return parts[0][1]
  order = np.concatenate([layers for layers, _ in parts])
  both = jnp.concatenate([x for _, x in parts], axis)
  if (np.diff(order) > 0).all():
    return both
  return jnp.take(both, np.argsort(order), axis=axis)


def _lanes(x: jax.Array) -> jax.Array:
  """(columns,) -> (rows, lanes), in whole tiles where there are enough."""
  lanes = LANES if x.size % (TILES[0] * LANES) == 0 and x.size else x.size
  return x.reshape(-1, lanes) if lanes else x.reshape(1, 0)


def make_leaf_layout(
  tree: Params, workers: int, stacked: tuple[bool, ...]
) -> LeafLayout:
  """Whose leaves are whose.

  Args:
    tree: arrays, or anything with shapes and dtypes.
    workers: N.
    stacked: of each leaf, whether its first axis may be divided.
  """
  leaves, treedef = jax.tree.flatten(tree)
  shapes = tuple((np.shape(x), jnp.dtype(x.dtype)) for x in leaves)
  return _made(treedef, shapes, workers, stacked)


@functools.lru_cache(maxsize=64)
def _made(treedef, shapes, workers, stacked) -> LeafLayout:
  leaves = tuple(jax.ShapeDtypeStruct(*x) for x in shapes)
  units = []  # (bytes, leaf, layer)
  for i, (x, cut) in enumerate(zip(leaves, stacked)):
    count = x.shape[0] if cut else 1
    weight = x.size * x.dtype.itemsize // max(count, 1)
    if cut and count:
      units += [(weight, i, layer) for layer in range(count)]
    else:
      units.append((weight, i, None))
  lightest = [(0, w) for w in range(workers)]
  mine: list[dict[int, list[Any]]] = [{} for _ in range(workers)]
  for weight, i, layer in sorted(units, key=lambda u: (-u[0], u[1], u[2] or 0)):
    held, w = heapq.heappop(lightest)
    mine[w].setdefault(i, []).append(layer)
    heapq.heappush(lightest, (held + weight, w))
  parts = tuple(
    tuple(
      Part(i, None if own[i] == [None] else tuple(sorted(own[i])))
      for i in sorted(own)
    )
    for own in mine
  )
  made = LeafLayout(workers, treedef, leaves, parts, {})
  columns: dict[str, int] = {}
  for own in parts:
    sizes: dict[str, int] = {}
    for part in own:
      key = str(leaves[part.leaf].dtype)
      sizes[key] = sizes.get(key, 0) + math.prod(made.shape(part))
    for key, size in sizes.items():
      columns[key] = max(columns.get(key, 0), size)
  tile = TILES[0] * LANES
  whole = lambda n: n if n < tile else -(-n // tile) * tile
  return made._replace(columns={k: whole(n) for k, n in columns.items()})
