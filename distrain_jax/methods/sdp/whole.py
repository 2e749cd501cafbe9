"""Residual blocks that a worker holds whole or not at all, whatever their shapes.

Where blocks differ, as a ResNet's do, what two workers hold has no common
shape. Each worker lays its blocks side by side in one buffer a dtype, as long
as the longest worker's, and runs a program of its own: a branch of
`lax.switch`, in which the absent blocks are not there.

Every worker owns 1/N of every block, held or not, with its optimizer's state,
as in ZeRO-1. One all-to-all brings the holders' gradients to the owners, another
one the new values back: as many bytes as an all-reduce of what the longest worker
holds. That is the coverage of all where blocks can be dealt out evenly, and more
where they cannot: of the five blocks of a ResNet-18 that keep the shape, at 1/2
of eight workers, 0.98 cyclic and 0.74 balanced. The tables are the same for all
owners, so that nothing is indexed by worker.

Letters in shapes: N workers, S columns of a worker's buffer, m columns of a
block in one dtype, K blocks.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distrain_jax import layout
from distrain_jax.gradients import at_least_float32

Buffers = dict[str, jax.Array]  # dtype -> (N, S)


def split(tree: Any, names: Collection[str], depth: int = 0) -> tuple[Any, Any]:
  """(the rest of a tree, its blocks by name).

  Args:
    tree: a dict; with depth=1 a dict of such dicts, as a model's collections.
      What is none, or anything where there are no names, is all rest.
    names: keys; one that is not there is left out.
    depth: of the keys.
  """
  if not names or not isinstance(tree, Mapping):
    return tree, {}
  if not depth:
    rest = {k: v for k, v in tree.items() if k not in names}
    return rest, {n: tree[n] for n in names if n in tree}
  pairs = {k: split(v, names) for k, v in tree.items()}
  blocks: dict[str, Any] = {}
  for k, (_, found) in pairs.items():
    for n, block in found.items():
      blocks.setdefault(n, {})[k] = block
  return {k: rest for k, (rest, _) in pairs.items()}, blocks


def merge(rest: Any, blocks: Mapping[str, Any], depth: int = 0) -> Any:
  """Undoes `split`, with the blocks that there are."""
  if not blocks:
    return rest
  if not depth:
    return {**rest, **blocks}
  inner = lambda k: {n: b[k] for n, b in blocks.items() if k in b}
  return {k: merge(v, inner(k)) for k, v in rest.items()}


class Blocks(NamedTuple):
  """Of one model's parameters, or statistics; static."""

  # Roles x K, bool: N workers of the first draw, then of the next.
  held: np.ndarray
  layouts: dict[str, layout.Layout]  # of each block, in the order of K
  draws: int = 1

  @property
  def workers(self) -> int:
    return len(self.held) // self.draws

  def of(self, role: int) -> tuple[str, ...]:
    """The blocks that the worker of a role holds."""
    return tuple(n for n, h in zip(self.layouts, self.held[role]) if h)

  def switch(self, role: jax.Array, branch: Callable[[int], Any]) -> Any:
    """branch(a role that holds the same as `role`), compiled for each set.

    Under `vmap` all branches run for all workers.
    """
    sets, first, index = np.unique(
      self.held, axis=0, return_index=True, return_inverse=True
    )
    if len(sets) == 1:
      return branch(0)
    branches = [lambda w=int(w): branch(w) for w in first]
    return jax.lax.switch(jnp.asarray(index.reshape(-1))[role], branches)

  def by_draw(self, role: jax.Array, fn: Callable[[int], Any]) -> Any:
    """fn(the first role of the draw that `role` is of)."""
    first = [draw * self.workers for draw in range(self.draws)]
    if self.draws == 1:
      return fn(0)
    branches = [lambda r=r: fn(r) for r in first]
    return jax.lax.switch(role // self.workers, branches)

  def pack(self, blocks: Mapping[str, Any], role: int) -> Buffers:
    """What a worker holds, or has for it: blocks -> {dtype: (N, S)}."""
    columns = {n: self._columns(n, blocks[n]) for n in self.of(role)}
    return self._side_by_side(columns, role, self.workers)

  def unpack(self, buffers: Buffers, role: int) -> dict[str, Any]:
    """Undoes `pack`."""
    out, at = {}, dict.fromkeys(buffers, 0)
    for name in self.of(role):
      rows = []
      for leaf in self.layouts[name].leaves:
        kind = str(leaf.dtype)
        x = buffers[kind][:, at[kind] : at[kind] + leaf.columns]
        at[kind] += leaf.columns
        rows.append(x)
      out[name] = self.layouts[name].as_tree(rows)
    return out

  def pieces(self, blocks: Mapping[str, Any], me: jax.Array) -> dict[str, Any]:
    """All blocks -> what worker `me` owns of them (see `layout`)."""
    return {n: x.pieces(blocks[n], me) for n, x in self.layouts.items()}

  def to_owners(
    self,
    buffers: Buffers,
    role: jax.Array,
    axis: str,
    wire_dtype: DTypeLike | None = None,
  ) -> dict[str, Any]:
    """Holders' buffers -> means over them, as owned pieces in float32."""
    got = {
      k: _exchange(x.astype(wire_dtype or x.dtype), axis)
      for k, x in buffers.items()
    }
    return self.by_draw(role, lambda first: self._means(got, first))

  def _means(self, got: Buffers, first: int) -> dict[str, Any]:
    """Of what all workers sent to an owner, in the draw of role `first`."""
    sums: dict[str, list[Any]] = {n: [] for n in self.layouts}
    for sender in range(self.workers):
      mine = {k: x[sender] for k, x in got.items()}
      for name, leaves in self._cut(mine, first + sender).items():
        leaves = [at_least_float32(x) for x in leaves]
        before = sums[name]
        sums[name] = [a + b for a, b in zip(before, leaves)] or leaves
    held = self.held[first : first + self.workers]
    counts = dict(zip(self.layouts, held.sum(0)))
    return {
      n: x.as_pieces([s / counts[n] for s in sums[n]])
      for n, x in self.layouts.items()
    }

  def to_holders(
    self, pieces: Mapping[str, Any], role: jax.Array, axis: str
  ) -> Buffers:
    """Owners' pieces -> each holder's buffers, in the blocks' own dtypes."""
    columns = {}
    for name, kept in self.layouts.items():
      leaves = zip(jax.tree.leaves(pieces[name]), kept.leaves)
      columns[name] = [
        (str(y.dtype), x.reshape(1, -1).astype(y.dtype)) for x, y in leaves
      ]

    def rows(first: int):  # to all workers: (N, S)
      each = [
        self._side_by_side(columns, first + w, 1) for w in range(self.workers)
      ]
      return jax.tree.map(lambda *x: jnp.concatenate(x), *each)

    sent = self.by_draw(role, rows)
    return {k: _exchange(x, axis) for k, x in sent.items()}

  def to_all(self, pieces: Mapping[str, Any], axis: str) -> dict[str, Any]:
    """Owners' pieces -> all blocks on every worker."""
    return {n: x.all_gather(pieces[n], axis) for n, x in self.layouts.items()}

  def whole(self, stacked: Mapping[str, Any]) -> dict[str, Any]:
    """All workers' pieces (N, ..., m) -> all blocks. No messages."""
    rows = lambda n: [
      x.reshape(self.workers, -1) for x in jax.tree.leaves(stacked[n])
    ]
    return {n: x.as_tree(rows(n)) for n, x in self.layouts.items()}

  def first_holders(self, stacked: Buffers, role: jax.Array) -> dict[str, Any]:
    """All workers' buffers (N, N, S) -> all blocks. No messages."""

    def of_draw(first: int):
      out: dict[str, Any] = {}
      for worker in range(self.workers):
        mine = {k: x[worker] for k, x in stacked.items()}
        out = {**self.unpack(mine, first + worker), **out}
      return {n: out[n] for n in self.layouts}

    return self.by_draw(role, of_draw)

  def stack(self, blocks: Mapping[str, Any], role: jax.Array) -> Buffers:
    """All blocks -> all workers' buffers (N, N, S). No messages."""

    def of_draw(first: int):
      each = [self.pack(blocks, first + w) for w in range(self.workers)]
      return jax.tree.map(lambda *x: jnp.stack(x), *each)

    return self.by_draw(role, of_draw)

  @property
  def columns(self) -> dict[str, int]:
    """S by dtype: as many as the longest worker's blocks have."""
    each = [self._count(role) for role in range(len(self.held))]
    kinds = {str(x.dtype) for y in self.layouts.values() for x in y.leaves}
    return {k: max(c.get(k, 0) for c in each) for k in sorted(kinds)}

  def _count(self, role: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in self.of(role):
      for leaf in self.layouts[name].leaves:
        kind = str(leaf.dtype)
        counts[kind] = counts.get(kind, 0) + leaf.columns
    return counts

  def _columns(self, name: str, block: Any) -> list[tuple[str, jax.Array]]:
    """(dtype, (N, m)) of each leaf."""
    kept = self.layouts[name]
    pairs = zip(kept.rows(block), kept.leaves)
    return [(str(y.dtype), x.astype(y.dtype)) for x, y in pairs]

  def _side_by_side(self, columns, role: int, rows: int) -> Buffers:
    """What a worker holds of [(dtype, (rows, m)), ...] by block, padded."""
    parts: dict[str, list[jax.Array]] = {k: [] for k in self.columns}
    for name in self.of(role):
      for kind, x in columns[name]:
        parts[kind].append(x)
    return {k: _padded(parts[k], rows, n, k) for k, n in self.columns.items()}

  def _cut(self, row: dict[str, jax.Array], role: int):
    """{dtype: (S,)} as that worker lays it out -> [(m,), ...] by block."""
    out, at = {}, dict.fromkeys(row, 0)
    for name in self.of(role):
      leaves = []
      for leaf in self.layouts[name].leaves:
        kind = str(leaf.dtype)
        leaves.append(row[kind][at[kind] : at[kind] + leaf.columns])
        at[kind] += leaf.columns
      out[name] = leaves
    return out


def _padded(parts, rows: int, columns: int, dtype: str) -> jax.Array:
  """Arrays (rows, m) side by side, with zeros up to (rows, columns)."""
  rest = columns - sum(x.shape[1] for x in parts)
  return jnp.concatenate([*parts, jnp.zeros((rows, rest), dtype)], axis=1)


def _exchange(x: jax.Array, axis: str) -> jax.Array:
  """Row w to worker w: (N, S) -> (N, S), row w from worker w."""
  return jax.lax.all_to_all(x, axis, 0, 0)


def make(
  blocks: Mapping[str, Any],
  draws: list[np.ndarray],
  dtype: DTypeLike | None = None,
) -> Blocks:
  """Blocks of arrays or shapes, and who holds them.

  Args:
    blocks: by name, in the order of K.
    draws: (N, K), bool, of who holds them; each has a holder.
    dtype: in which workers hold them; None: their own.
  """
  layouts = {}
  for name, block in blocks.items():
    like = lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)
    shapes = jax.tree.map(like, block)
    layouts[name] = layout.make_layout(shapes, len(draws[0]))
  return Blocks(np.concatenate(draws), layouts, len(draws))


def hold(
  sizes: Mapping[str, int],
  workers: int,
  holders: int,
  rng: np.random.Generator | None = None,
  balanced: bool = False,
) -> np.ndarray:
  """Who holds which block: (N, K), bool.

  Each block's holders stand side by side on the ring of workers, from a place
  that goes round as the blocks do; or, balanced, they are those that have least
  so far, the largest blocks first.

  Args:
    sizes: of the blocks, in bytes, in the order of depth.
    workers: N.
    holders: of each block.
    rng: shuffles the blocks before they are dealt out.
    balanced: by bytes.

  >>> hold(dict.fromkeys("abcd", 1), 4, 2).astype(int).tolist()
  [[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
  """
  held = np.zeros((workers, len(sizes)), bool)
  order = np.arange(len(sizes)) if rng is None else rng.permutation(len(sizes))
  if balanced:
    bytes_ = np.array(list(sizes.values()))
    load = np.zeros(workers)
    for block in order[np.argsort(-bytes_[order], kind="stable")]:
      chosen = np.argsort(load, kind="stable")[:holders]
      held[chosen, block] = True
      load[chosen] += bytes_[block]
    return held
  for i, block in enumerate(order):
    first = i // workers * workers  # of this round, which may be short
    length = min(workers, len(sizes) - first)
    start = (i - first) * workers // length
    held[(start + np.arange(holders)) % workers, block] = True
  return held
