"""What a stage keeps of the micro-batches that it has seen forward, not back.

Entries leave in the order in which they came. Stages keep different numbers of
them, of different lengths, in buffers that are as long on all: as long as the
longest queue, not as its longest entry times the largest number.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.pipelining.packing import LANES, TILE, Packed, Packing


class Fifo(NamedTuple):
  """Where the entries of every stage lie."""

  entries: Packing  # [s]: an entry of stage s
  rows: tuple[int, ...]  # how many stage s keeps at once

  def empty(self) -> Packed:
    """Of what is alike, (rows, ...); of what is flat, one buffer of lanes.

    Whole tiles, or XLA for TPU would tile entries together, and copy all of
    them to do so.
    """
    zeros = self.entries.zeros()
    alike = jax.tree.map(
      lambda x: jnp.zeros((max(self.rows), *x.shape), x.dtype), zeros["alike"]
    )
    flat = {}
    for dtype in self.entries.columns:
      lanes = self._lanes(dtype)
      # What is read and written is as long as the longest entry.
      last = max((n - 1) * k for n, k in zip(self.rows, lanes))
      length = last + max(lanes)
      flat[dtype] = jnp.zeros((length, LANES), dtype)
    return {"alike": alike, "flat": flat}

  def pop(self, fifo: Packed, number, stage) -> tuple[Packed, Packed]:
    """(the FIFO, a micro-batch's entry), read before anything is written.

    Else XLA may read it late, and keep a copy of the whole FIFO for that.
    """
    row = self._row(number, stage)
    entry = {
      "alike": jax.tree.map(lambda x: _at(x, row), fifo["alike"]),
      "flat": {
        dtype: self._window(x, dtype, row, stage)[0].ravel()
        for dtype, x in fifo["flat"].items()
      },
    }
    return jax.lax.optimization_barrier((fifo, entry))

  def push(self, fifo: Packed, entry: Packed, number, stage, valid) -> Packed:
    """With the entry of a micro-batch, unless it is not valid."""
    row = self._row(number, stage)

    def one(x, new):
      new = jnp.where(valid, new, _at(x, row))
      return jax.lax.dynamic_update_index_in_dim(x, new, row, 0)

    flat = {}
    for dtype, x in fifo["flat"].items():
      old, start, mine = self._window(x, dtype, row, stage)
      new = entry["flat"][dtype].reshape(old.shape)
      # Behind this stage's own entry the next one lies.
      own = jnp.arange(old.shape[0])[:, None] < mine
      new = jnp.where(valid & own, new, old)
      flat[dtype] = jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)
    return {
      "alike": jax.tree.map(one, fifo["alike"], entry["alike"]),
      "flat": flat,
    }

  def _row(self, number, stage):
    return number % jnp.asarray(self.rows)[stage]

  def _lanes(self, dtype: str) -> list[int]:
    """Rows of lanes of each stage's entry, in whole tiles."""
    columns = [
      self.entries.columns_of(s).get(dtype, 0) for s in range(len(self.rows))
    ]
    return [-(-n // TILE) * TILE // LANES for n in columns]

  def _window(self, x, dtype, row, stage) -> tuple[Any, jax.Array, jax.Array]:
    """(as many lanes as the longest entry has, from where, how many are own)."""
    lanes = self._lanes(dtype)
    mine = jnp.asarray(lanes)[stage]
    start = row * mine
    window = jax.lax.dynamic_slice_in_dim(x, start, max(lanes), 0)
    return window, start, mine


def _at(x, row):
  return jax.lax.dynamic_index_in_dim(x, row, keepdims=False)
