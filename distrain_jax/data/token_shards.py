"""Token shards: a text tokenised once, in ArrayRecord files.

A folder holds `dataset.json` and, for each split, shards such as
`train-00000.array_record`. All documents of a split, each closed by the end
token, make one stream (`packing`); record c of the split is the stream's
tokens [c * chunk, (c + 1) * chunk) as little-endian integers, only the last
one shorter. So any token is found by division, at any record length.
`launch/prepare_data.py` makes such a folder.

Letters in shapes: b records asked for.
"""

import dataclasses
import json
import os
import pathlib

import numpy as np

from distrain_jax.data.packing import Windows
from distrain_jax.data.source import Info, Splits

FORMAT = 1
METADATA = "dataset.json"
DTYPES = ("<u1", "<u2", "<u4")


@dataclasses.dataclass
class Split:
  """A split's line in `dataset.json`."""

  documents: int = 0
  tokens: int = 0  # with the end tokens
  bytes: int = 0  # of the documents' UTF-8
  shards: list[dict] = dataclasses.field(default_factory=list)
  # each {"file": name, "records": how many, "size": bytes of the file}


@dataclasses.dataclass
class Metadata:
  """What `dataset.json` holds."""

  format: int
  tokenizer: str
  vocab_size: int
  end_token: int
  dtype: str
  chunk: int
  splits: dict[str, Split]


def dtype_for(vocab_size: int) -> str:
  """The narrowest of DTYPES that holds ids below `vocab_size`."""
  return DTYPES[(vocab_size > 2**8) + (vocab_size > 2**16)]


def write_metadata(folder: pathlib.Path, metadata: Metadata) -> None:
  text = json.dumps(dataclasses.asdict(metadata), indent=2) + "\n"
  (folder / METADATA).write_text(text)


def read_metadata(folder: str | os.PathLike) -> Metadata:
  """The metadata of a folder, after checking that its files are whole.

  Raises:
    FileNotFoundError: no such data set, or a missing shard, with the command
      that makes one.
    ValueError: metadata or a shard that is not as it was written.
  """
  path = pathlib.Path(folder) / METADATA
  if not path.is_file():
    raise FileNotFoundError(
      f"No {METADATA} in data.folder={str(folder)!r}: not a folder of token "
      f"shards. Make one: `python launch/prepare_data.py --out={folder} FILES` "
      "(text, JSON lines or parquet)."
    )
  try:
    fields = json.loads(path.read_text())
    splits = {k: Split(**v) for k, v in fields.pop("splits").items()}
    metadata = Metadata(**fields, splits=splits)
    if metadata.format != FORMAT or set(splits) != set(Splits._fields):
      raise ValueError(f"format {metadata.format}, splits {sorted(splits)}")
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ValueError(
      f"{path} is not what this version writes, format {FORMAT} ({e}). Make "
      "the folder again with launch/prepare_data.py --overwrite."
    ) from e
  for split in splits.values():
    for shard in split.shards:
      _check(path.parent / shard["file"], shard["size"])
  return metadata


def _check(file: pathlib.Path, size: int) -> None:
  again = "Copy the folder again, or make it with launch/prepare_data.py."
  if not file.is_file():
    raise FileNotFoundError(f"{file} is missing. {again}")
  if file.stat().st_size != size:
    raise ValueError(
      f"{file} has {file.stat().st_size} bytes, was written with {size}. {again}"
    )


class SplitWriter:
  """Writes one split, document by document, into shards.

  Args:
    folder: where.
    name: of the split.
    dtype: of DTYPES.
    end_token: put after each document.
    chunk: tokens a record.
    shard_tokens: tokens a file, rounded up to whole records.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    *,
    dtype: str,
    end_token: int,
    chunk: int,
    shard_tokens: int,
  ):
    self.split = Split()
    self._folder, self._name, self._chunk = folder, name, chunk
    self._end = np.asarray([end_token], dtype)
    self._shard_records = -(-shard_tokens // chunk)
    self._waiting, self._count = [], 0  # tokens not yet in a record
    self._file, self._records = None, 0

  def add(self, tokens: np.ndarray, size: int) -> None:
    """One document: its tokens, and the bytes of its text."""
    self._waiting += [tokens.astype(self._end.dtype), self._end]
    self._count += len(tokens) + 1
    self.split.documents += 1
    self.split.tokens += len(tokens) + 1
    self.split.bytes += size
    if self._count >= self._chunk:
      self._flush(self._chunk)

  def close(self) -> Split:
    """Writes what is left and returns the split's metadata."""
    self._flush(1)
    self._end_shard()
    return self.split

  def _flush(self, at_least: int) -> None:
    """Writes records while `at_least` tokens wait."""
    stream, start = np.concatenate([self._end[:0], *self._waiting]), 0
    while len(stream) - start >= at_least:
      if self._records == self._shard_records:
        self._end_shard()
      self._write(stream[start : start + self._chunk].tobytes())
      start += self._chunk
    rest = stream[start:]
    self._waiting, self._count = [rest], len(rest)

  def _write(self, record: bytes) -> None:
    from array_record.python import array_record_module

    if self._file is None:
      number = len(self.split.shards)
      self._path = self._folder / f"{self._name}-{number:05d}.array_record"
      # One record a group: a reader unpacks what it asked for, no more.
      self._file = array_record_module.ArrayRecordWriter(
        str(self._path), "group_size:1"
      )
    self._file.write(record)
    self._records += 1

  def _end_shard(self) -> None:
    if self._file is None:
      return
    self._file.close()
    size = self._path.stat().st_size
    self.split.shards.append(
      {"file": self._path.name, "records": self._records, "size": size}
    )
    self._file, self._records = None, 0


class ShardStream:
  """A split on disk as a `packing.Stream`; reads only what is asked for."""

  in_memory = False

  def __init__(self, folder: pathlib.Path, metadata: Metadata, split: Split):
    from array_record.python import array_record_data_source

    self._chunk, self._dtype = metadata.chunk, np.dtype(metadata.dtype)
    self._tokens = split.tokens
    self._records = array_record_data_source.ArrayRecordDataSource(
      [f"{folder / s['file']}[0:{s['records']}]" for s in split.shards]
    )

  def __len__(self) -> int:
    return self._tokens

  def read(self, starts: np.ndarray, width: int) -> np.ndarray:
    first = starts // self._chunk  # (b,)
    last = (starts + width - 1) // self._chunk
    wanted = sorted({c for a, z in zip(first, last) for c in range(a, z + 1)})
    raw = self._records.__getitems__(wanted)
    chunks = {c: np.frombuffer(r, self._dtype) for c, r in zip(wanted, raw)}
    out = np.empty((len(starts), width), self._dtype)
    for row, start, a, z in zip(out, starts, first, last):
      joined = np.concatenate([chunks[c] for c in range(a, z + 1)])
      offset = start - a * self._chunk
      row[:] = joined[offset : offset + width]
    return out


def tokens(folder: str | os.PathLike | None, *, length: int) -> Splits:
  """Records of `length` tokens from a folder of token shards.

  Raises:
    FileNotFoundError, ValueError: see `read_metadata` and `Windows`.
  """
  if folder is None:
    raise ValueError(
      "data.folder=None: data.name='tokens' reads a folder made by `python "
      "launch/prepare_data.py --out=DIR FILES`; e.g. --config.data.folder=DIR."
    )
  metadata = read_metadata(folder)

  def windows(name):
    split = metadata.splits[name]
    stream = ShardStream(pathlib.Path(folder), metadata, split)
    info = Info(
      f"tokens:{pathlib.Path(folder).name}",
      "text",
      count=0,  # Windows counts
      vocab_size=metadata.vocab_size,
      end_token=metadata.end_token,
      bytes_per_token=split.bytes / split.tokens,
    )
    return Windows(stream, info, length)

  return Splits(*(windows(name) for name in Splits._fields))
