"""What a data source is: records by number, and what they mean.

A source has `info`, `len(source)` and `source.gather(indices)`, nothing else:
a pipeline asks for whole batches of record numbers, so that data in memory is
read by one NumPy indexing and only data on disk is read record by record.

Letters in shapes: n records, b records asked for at once, (h, w, c) an image.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, Any]  # name -> array (b, ...); or a list, if shapes differ


class Info(NamedTuple):
  """What the records of a source are; fields of the other kind stay unset."""

  name: str  # of the data set, as in a config
  kind: str  # "image" or "text"
  count: int  # records in this source
  shape: tuple[int, int, int] | None = None  # (h, w, c) of a batch's images
  num_classes: int | None = None  # None: images without labels
  mean: tuple[float, ...] = (0.0,)  # per channel or one, in stored units
  std: tuple[float, ...] = (1.0,)  # per channel or one, in stored units
  length: int | None = None  # tokens a record predicts
  vocab_size: int | None = None
  end_token: int | None = None  # closes every document
  bytes_per_token: float | None = None  # nats a token / this = nats a byte


@runtime_checkable
class Source(Protocol):
  """Random access to records.

  `gather` gets record numbers (b,) int64, in any order, and returns image
  records as {"image": (b, h, w, c) uint8, "label": (b,) int32} (no "label" in
  a set without labels; "image" may be a list of arrays that differ in shape),
  text records as {"tokens": (b, length), "targets": (b, length)} int32.
  """

  info: Info
  in_memory: bool  # gather neither reads files nor decodes: one thread is best

  def __len__(self) -> int: ...

  def gather(self, indices: np.ndarray) -> Batch: ...


class Splits(NamedTuple):
  """Three sources that share no record."""

  train: Source
  validation: Source
  test: Source


class Arrays:
  """A source of records in memory: equal-length arrays by name."""

  in_memory = True

  def __init__(self, info: Info, **arrays: np.ndarray):
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
      raise ValueError(
        f"Arrays: all arrays need one length, one row a record; got {lengths}."
      )
    self.arrays = arrays
    self.info = info._replace(count=next(iter(lengths.values())))

  def __len__(self) -> int:
    return self.info.count

  def gather(self, indices: np.ndarray) -> Batch:
    return {name: array[indices] for name, array in self.arrays.items()}


class Subset:
  """Records `start` to `stop` of another source."""

  def __init__(self, source: Source, start: int, stop: int):
    if not 0 <= start < stop <= len(source):
      raise ValueError(
        f"Subset: records [{start}, {stop}) of a source of {len(source)}."
      )
    self.source, self.start = source, start
    self.in_memory = source.in_memory
    self.info = source.info._replace(count=stop - start)

  def __len__(self) -> int:
    return self.info.count

  def gather(self, indices: np.ndarray) -> Batch:
    return self.source.gather(np.asarray(indices) + self.start)


def stack(records: list[Mapping[str, Any]]) -> Batch:
  """Records to a batch; values that differ in shape stay a list."""
  batch = {}
  for name in records[0]:
    values = [np.asarray(record[name]) for record in records]
    even = len({value.shape for value in values}) == 1
    batch[name] = np.stack(values) if even else values
  return batch


def in_memory(source: Source, block: int = 1024) -> Arrays:
  """Reads and decodes a whole source once; for small sets on disk.

  Raises:
    ValueError: where images differ in shape and cannot be one array.
  """
  blocks = []
  for start in range(0, len(source), block):
    stop = min(start + block, len(source))
    blocks.append(source.gather(np.arange(start, stop)))
  arrays = {name: [part[name] for part in blocks] for name in blocks[0]}
  for name, parts in arrays.items():
    shapes = {p.shape[1:] if hasattr(p, "shape") else None for p in parts}
    if len(shapes) != 1 or None in shapes:
      raise ValueError(
        f"data.in_memory=True: the records of {source.info.name!r} differ in "
        f"the shape of {name!r}, so they cannot be one array. Leave it False."
      )
  return Arrays(
    source.info, **{k: np.concatenate(v) for k, v in arrays.items()}
  )


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """' Did you mean ...?' with the nearest known name, or nothing."""
  near = difflib.get_close_matches(str(name), list(known), n=1)
  return f" Did you mean {near[0]!r}?" if near else ""
