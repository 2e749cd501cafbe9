"""Sharding a tree flat over the workers without losing the tree.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", 2019, https://arxiv.org/abs/1910.02054, shards one flat
vector. Here each leaf is flattened, padded to a multiple of N and viewed as
(N, m). Row w is worker w's shard: a tree of the original structure, so that
optax's masks and labels keep working. For the collectives small leaves are laid
side by side as the columns of one (N, M) buffer; a large one travels alone,
since copying it beside the others would cost its memory once more.

Letters in shapes: N workers, m a leaf's columns, M those of a buffer.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.gradients import at_least_float32
from distrain_jax.method import Params

ALONE = 1 << 20  # elements from which a leaf has a buffer of its own
LANES = 1024  # columns of a buffer's last axis, where it is long enough
# Two of the (8, 128) tiles that XLA for TPU lays arrays out in: for an odd
# number of them it does not scatter either.
TILES = (8, 256)


class Leaf(NamedTuple):
  """What is needed to find a leaf again in a row."""

  shape: tuple[int, ...]
  dtype: Any
  columns: int  # m, at least size / N
  lanes: int | None = None  # of its buffer, where that is cut like the leaf

  @property
  def piece_shape(self) -> tuple[int, ...]:
    """As many axes as the leaf (masks may ask for ndim), all in the last."""
    return (1,) * (len(self.shape) - 1) + (self.columns,)


class Layout(NamedTuple):
  """Where each leaf of a tree is in the (N, M) buffers."""

  workers: int
  treedef: Any
  leaves: tuple[Leaf, ...]

  def rows(self, tree: Params) -> list[jax.Array]:
    """Each leaf as (N, m), zero-padded at the end of the last rows."""

    def one(x, leaf):
      pad = self.workers * leaf.columns - x.size
      return jnp.pad(x.ravel(), (0, pad)).reshape(self.workers, leaf.columns)

    return [one(x, leaf) for x, leaf in zip(jax.tree.leaves(tree), self.leaves)]

  def pieces(self, tree: Params, worker: jax.Array | int) -> Params:
    """Worker's piece of every leaf: the tree's structure, `piece_shape`s."""
    rows = self.rows(tree)
    return self.treedef.unflatten(
      jax.lax.dynamic_index_in_dim(x, worker, keepdims=False).reshape(
        leaf.piece_shape
      )
      for x, leaf in zip(rows, self.leaves)
    )

  def pack(self, rows: list[jax.Array], parts: int = 1) -> dict[str, jax.Array]:
    """(N, m) leaves, small ones side by side: {name: (N, rows, lanes)}.

    Zero-padded; a name is the leaves' dtype, and a number for one that is alone.

    Three axes with the workers first, the last two in whole tiles: XLA for
    TPU turns a scatter of anything else into a whole all-reduce, twice the
    bytes. There is a tile of rows at least for each of `parts`, or one row
    alone in what is too small to be cut.
    """
    groups: dict[str, list[jax.Array]] = {}
    last: dict[str, int | None] = {}
    names = self._buffers([x.dtype for x in rows])
    for x, name, leaf in zip(rows, names, self.leaves):
      groups.setdefault(name, []).append(x)
      last[name] = leaf.lanes if "/" in name else None
    return {
      k: _lanes(jnp.concatenate(v, axis=1), parts, last[k])
      for k, v in groups.items()
    }

  def _buffers(self, dtypes) -> list[str]:
    """In which buffer each leaf travels, by name."""

    def name(i, leaf, dtype):
      alone = leaf.columns * self.workers >= ALONE
      return f"{jnp.dtype(dtype)}/{i}" if alone else str(jnp.dtype(dtype))

    numbered = enumerate(zip(self.leaves, dtypes))
    return [name(i, leaf, dtype) for i, (leaf, dtype) in numbered]

  def unpack(self, buffers: dict[str, jax.Array], dtypes) -> list[jax.Array]:
    """Undoes `pack` along the last two axes; the leading ones stay.

    Args:
      buffers: {name: (..., rows, lanes)}.
      dtypes: the dtype each leaf was packed with, in leaf order.

    Returns:
      One (..., m) array per leaf.
    """
    flat = {k: x.reshape(*x.shape[:-2], -1) for k, x in buffers.items()}
    start = dict.fromkeys(flat, 0)
    out = []
    for leaf, name in zip(self.leaves, self._buffers(dtypes)):
      at = start[name]
      out.append(flat[name][..., at : at + leaf.columns])
      start[name] = at + leaf.columns
    return out

  def reduce_scatter(self, tree: Params, axis: str, wire_dtype=None) -> Params:
    """This worker's pieces of the workers' mean tree, in float32 or wider.

    Travels, and is summed, in `wire_dtype` (None: each leaf's own dtype).
    """
    rows = [x.astype(wire_dtype or x.dtype) for x in self.rows(tree)]
    sums = {
      k: jax.lax.psum_scatter(x, axis, scatter_dimension=0)
      for k, x in self.pack(rows).items()
    }
    mine = self.unpack(sums, [x.dtype for x in rows])
    return self.as_pieces(at_least_float32(x) / self.workers for x in mine)

  def all_gather(self, pieces: Params, axis: str) -> Params:
    """The whole tree from every worker's pieces, in each leaf's own dtype."""
    rows = [
      x.reshape(1, leaf.columns).astype(leaf.dtype)
      for x, leaf in zip(jax.tree.leaves(pieces), self.leaves)
    ]
    whole = {
      k: jax.lax.all_gather(x[0], axis) for k, x in self.pack(rows).items()
    }
    return self.as_tree(self.unpack(whole, self.dtypes))

  @property
  def dtypes(self) -> list[Any]:
    return [leaf.dtype for leaf in self.leaves]

  def as_pieces(self, rows) -> Params:
    """One worker's (m,) leaves -> its pieces."""
    pairs = zip(rows, self.leaves)
    return self.treedef.unflatten(x.reshape(y.piece_shape) for x, y in pairs)

  def as_tree(self, rows) -> Params:
    """(N, m) leaves -> the whole tree, padding taken off."""
    return self.treedef.unflatten(
      x.ravel()[: math.prod(leaf.shape)].reshape(leaf.shape)
      for x, leaf in zip(rows, self.leaves)
    )


def _lanes(x: jax.Array, parts: int, lanes: int | None) -> jax.Array:
  """(N, M) -> (N, rows, lanes); small buffers stay one row, unpadded."""
  n, m = x.shape
  rows, columns = TILES[0] * parts, TILES[1]
  if lanes is not None and m >= rows * lanes:
    return x.reshape(n, -1, lanes)
  if m < rows * LANES:
    return x.reshape(n, 1, m)
  lanes = LANES
  if m < 100 * rows * LANES:  # where the padding would be above 1 %
    lanes = -(-m // (rows * columns)) * columns
  return jnp.pad(x, ((0, 0), (0, -m % (rows * lanes)))).reshape(n, -1, lanes)


def _leaf(x, workers: int) -> Leaf:
  """A large leaf is cut between rows of its last axis where that is cheap.

  In whole tiles: its parts then lie in memory as the leaf does, and no copy is
  made for the wire.
  """
  if x.size >= ALONE and x.ndim > 1 and x.shape[-1] % TILES[1] == 0:
    last = x.shape[-1]
    tile = TILES[0] * last
    columns = -(-x.size // (workers * tile)) * tile
    if 100 * workers * columns <= 101 * x.size:  # no more than 1 % of padding
      return Leaf(x.shape, x.dtype, columns, last)
  return Leaf(x.shape, x.dtype, -(-x.size // workers))


def make_layout(tree: Params, workers: int) -> Layout:
  """The layout of a tree of arrays (or ShapeDtypeStructs) over N workers."""
  leaves, treedef = jax.tree.flatten(tree)
  return Layout(
    workers,
    treedef,
    tuple(_leaf(x, workers) for x in leaves),
  )


def restack(stacked: Any, target: Any, workers: int) -> Any:
  """Stacked per-worker state for another number of workers.

  Args:
    stacked: leaves (N,), the same scalar on all workers, or (N, ..., m).
    target: the same tree of ShapeDtypeStructs as one of the new workers has
      it, without the worker axis: () or (..., m').
    workers: their number.

  Returns:
    Leaves (workers,) or (workers, ..., m'): the same elements in the same
    order; only padding is dropped or added.
  """

  def one(x, like):
    if like.ndim == 0:
      return jnp.broadcast_to(x[0], (workers,))
    flat, size = x.ravel(), workers * like.size
    flat = jnp.pad(flat[:size], (0, max(0, size - flat.size)))
    return flat.reshape(workers, *like.shape)

  return jax.tree.map(one, stacked, target)
