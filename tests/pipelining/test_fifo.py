"""Queues of different lengths, of entries of different sizes, in one buffer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.pipelining.fifo import Fifo
from distrain_jax.pipelining.packing import TILE, packing


def entry(size, number):
  """What a stage keeps: floats of its size, whole numbers, one alike."""
  fill = jnp.full((size,), float(number))
  return [{"x": fill, "n": jnp.full((size % 7,), number)}, jnp.ones(3) * number]


SIZES, ROWS = (10, 3 * TILE, TILE + 1), (6, 4, 1)


@pytest.fixture(scope="module")
def queue():
  return Fifo(packing([entry(size, 0) for size in SIZES]), ROWS)


@pytest.mark.parametrize("stage", range(3))
def test_entries_leave_as_they_came_in(stage, queue):
  fifo, rows, where = queue.empty(), ROWS[stage], jnp.asarray(stage)
  push, pop = jax.jit(queue.push), jax.jit(queue.pop)
  pack = lambda number: queue.entries.pack(entry(SIZES[stage], number), stage)
  for number in range(3 * rows):
    if number >= rows:  # the oldest goes before the next one comes
      fifo, got = pop(fifo, number - rows, where)
      got = queue.entries.unpack(got, stage)
      expected = entry(SIZES[stage], number - rows)
      jax.tree.map(np.testing.assert_array_equal, got, expected)
    fifo = push(fifo, pack(number), number, where, True)
    before = jax.tree.map(jnp.copy, fifo)
    fifo = push(fifo, pack(-5), number, where, False)  # not a valid one
    jax.tree.map(np.testing.assert_array_equal, fifo, before)


def test_a_buffer_is_as_long_as_the_longest_queue(queue):
  sizes = {d: x.size for d, x in queue.empty()["flat"].items()}
  # The second stage's: 4 entries of 3 tiles, not 6 of them.
  assert sizes["float32"] == 4 * 3 * TILE
  assert queue.empty()["alike"][0].shape == (6, 3)
