"""From a source to batches: training without end, evaluation exactly once.

Training batch t of B records is positions [t B, (t + 1) B) of the endless
order (`random_order`): a pure function of the seed and t. Process p of P makes
rows [p B / P, (p + 1) B / P) of it, with the words for augmentation that
belong to those positions, so the global batch is the same bits for any P.
An epoch flows into the next inside a batch: no record is dropped, none is
padded, and each is seen once an epoch.

A population of N members takes B/N consecutive rows of a batch a member, from
an endless order of the member's own over all n records: row r of a member's
share of batch t is position t B/N + r of that order. So a member sees what it
would see alone with batches of B/N, whoever else there is, and goes on
undisturbed when others leave or join.

Letters: B the global batch, N members, P processes, n records, t batches.
"""

import json
import os
import sys
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from distrain_jax.data import augment as aug
from distrain_jax.data import members as population
from distrain_jax.data.random_order import order, words
from distrain_jax.data.source import Batch, Source


class _TrainBatches:
  """Random access to this process's rows of training batch t."""

  def __init__(self, source, batch_size, seed, augment, rows, members):
    self.source, self.seed = source, seed
    self.augment = aug.parse(augment, source.info)
    self.share = population.share(batch_size, members)
    self.parts = population.parts(rows, self.share, members)

  def __len__(self) -> int:
    return sys.maxsize // self.share  # positions stay int64

  def __getitem__(self, t: int) -> Batch:
    n, begin = len(self.source), int(t) * self.share
    records = [
      order(self.seed, begin + first + np.arange(count), n, member)
      for member, first, count in self.parts
    ]
    batch = self.source.gather(np.concatenate(records))
    if self.source.info.kind != "image":
      return batch
    info = self.source.info
    if not self.augment or self.augment[0].name != "random_resized_crop":
      batch = aug.fit(batch, info)
    for stream, a in enumerate(self.augment, start=1):  # 0 is the order's
      random_words = [
        words(self.seed, stream, begin + first, count, a.words, member)
        for member, first, count in self.parts
      ]
      batch = a.apply(batch, np.concatenate(random_words), info)
    return aug.normalise(batch, info)


class TrainIterator(grain.DatasetIterator):
  """An endless iterator over this process's rows of each global batch.

  Its state is how many batches it gave, the same in every process, and what
  decides their content. Orbax saves it as it saves any Grain iterator, and
  restores it in any number of processes.
  """

  def __init__(self, parent: grain.DatasetIterator, decides: dict[str, Any]):
    super().__init__(parent)
    self._batches, self._decides = parent, decides

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    return self._batches.get_state() | self._decides

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues after `state`.

    Seed, records and the rows of a member must be those of the state; the
    members may be fewer or more. Who was there goes on with the next rows of
    its own order, and who joins starts its own at the same place.

    Raises:
      ValueError: if the state is of another seed, source or batch size of a
        member, or of members of whom some left while others joined whose
        numbers are not above all that there were.
    """
    population.check_resumes(state, self._decides)
    self._batches.set_state({"next_index": int(state["next_index"])})

  async def load(self, directory: Any) -> Awaitable[None]:
    """For Orbax: reads any process's file, since all hold the same state."""

    async def read():
      files = sorted(directory.glob("process_*-of-*.json"))
      if not files:
        raise ValueError(f"No state of a data iterator in {directory}.")
      self.set_state(json.loads(files[0].read_text()))

    return read()

  def start_prefetch(self) -> None:
    self._batches.start_prefetch()

  def close(self) -> None:
    self._batches.close()


def train_iterator(
  source: Source,
  *,
  batch_size: int,
  seed: int,
  augment: Sequence[str | aug.Augmentation] = (),
  members: int | Sequence[int] = 1,
  process_index: int = 0,
  process_count: int = 1,
  threads: int | None = None,
  prefetch: int | None = None,
) -> TrainIterator:
  """Endless training batches, reshuffled every epoch.

  Args:
    source: the training part of a data set.
    batch_size: B, of all processes and members together.
    seed: decides order and augmentation, 0 <= seed < 2**63.
    augment: names such as "pad_crop:4", or `Augmentation`s; images only.
    members: N, which must divide B, of a population whose members have orders
      and augmentations of their own; or their N numbers, in the order of
      their shares of a batch: (0, 2, 3) when number 1 of 4 has left. 1: the
      batch is one share, whoever it is divided among.
    process_index: which rows of each batch to make.
    process_count: P; must divide B.
    threads: that load batches in the background; 0: none, each batch is made
      when asked for. None: 1 for data in memory, up to 8 for data on disk.
    prefetch: batches ready or in the making; None: 2, or threads + 1.

  Returns:
    An iterator of {"image": (B/P, h, w, c) float32 normalised, "label":
    (B/P,) int32} or {"tokens", "targets": (B/P, length) int32}, NumPy arrays,
    with `get_state`, `set_state` and `close`.

  Raises:
    ValueError: for a bad batch size, seed, process, augmentation or member.
  """
  if isinstance(seed, bool) or not 0 <= seed < 2**63 or seed != int(seed):
    raise ValueError(f"seed={seed!r} must be an integer in [0, 2**63).")
  rows = _rows(batch_size, process_index, process_count)
  numbers = population.numbers(members)
  batches = _TrainBatches(source, batch_size, int(seed), augment, rows, numbers)
  decides = {
    "batch_size": batch_size,
    "seed": int(seed),
    "records": len(source),
    "members": numbers,
  }
  parent = iter(_background(batches, source, threads, prefetch))
  return TrainIterator(parent, decides)


class EvalBatches:
  """The batches of one pass over a source; iterate as often as you like."""

  def __init__(self, source, batch_size, rows, threads, prefetch):
    self.source, self.batch_size = source, batch_size
    self._rows = np.arange(rows.start, rows.stop)
    self._options = threads, prefetch

  def __len__(self) -> int:
    return -(-len(self.source) // self.batch_size)

  def __getitem__(self, t: int) -> Batch:
    wanted = t * self.batch_size + self._rows
    n = len(self.source)
    # Padding repeats the last record: real numbers, so no NaN can come of it.
    batch = self.source.gather(np.minimum(wanted, n - 1))
    if self.source.info.kind == "image":
      batch = aug.normalise(aug.fit(batch, self.source.info), self.source.info)
    return batch | {"weight": (wanted < n).astype(np.float32)}

  def __iter__(self) -> Iterator[Batch]:
    return iter(_background(self, self.source, *self._options))


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  threads: int | None = None,
  prefetch: int | None = None,
) -> EvalBatches:
  """Every record exactly once, in order, in ceil(n / B) full batches.

  All processes make equally many batches, of B/P rows each. The last batch is
  padded; "weight" (B/P,) float32 is 1 for a record and 0 for padding.
  Arguments, content and errors as `train_iterator`; nothing is random.
  """
  rows = _rows(batch_size, process_index, process_count)
  return EvalBatches(source, batch_size, rows, threads, prefetch)


def _background(batches, source, threads, prefetch):
  """Grain's dataset of `batches`, made ahead by threads."""
  if threads is None:
    # In memory, more threads would only fight over the interpreter's lock.
    threads = 1 if source.in_memory else min(8, os.cpu_count() or 1)
  if prefetch is None:
    prefetch = max(2, threads + 1)
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
  )
  return grain.MapDataset.source(batches).to_iter_dataset(options)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
  """Which rows of a global batch a process makes."""
  if not isinstance(batch_size, int) or batch_size < 1:
    raise ValueError(f"batch_size={batch_size!r} must be a positive integer.")
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index={process_index} must be in [0, {process_count}), the "
      "number of processes."
    )
  if batch_size % process_count:
    low = batch_size // process_count * process_count
    raise ValueError(
      f"batch_size={batch_size} is the global batch and must be a multiple of "
      f"the {process_count} processes. Nearest: "
      f"{low or process_count} or {low + process_count}."
    )
  each = batch_size // process_count
  return range(process_index * each, (process_index + 1) * each)
