"""Documents to one stream of tokens, and the stream to fixed-length records.

    documents  a b c | d e |          each closed by the end token, here 0
    stream     a b c 0 d e 0
    length 3   tokens  (a b c) (0 d e)     record i starts at token 3 i
               targets (b c 0) (d e 0)     tokens shifted by one

Consecutive records share one token, the last target and the next first input,
so every token but the stream's first is a target exactly once; only a tail of
fewer than `length` targets is left out. Records are found by arithmetic, so
nothing is copied until a batch asks for it.

Letters in shapes: b records, s tokens in a stream.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from distrain_jax.data.source import Batch, Info


class Stream(Protocol):
  """A long sequence of token ids with random access."""

  in_memory: bool

  def __len__(self) -> int: ...

  def read(self, starts: np.ndarray, width: int) -> np.ndarray:
    """(b, width): for each of starts (b,) the tokens from there on."""


class ArrayStream:
  """A stream in memory, or memory-mapped: tokens (s,), any integer dtype."""

  in_memory = True

  def __init__(self, tokens: np.ndarray):
    self.tokens = tokens

  def __len__(self) -> int:
    return len(self.tokens)

  def read(self, starts: np.ndarray, width: int) -> np.ndarray:
    return self.tokens[np.asarray(starts)[:, None] + np.arange(width)]


def pack(documents: Iterable[np.ndarray], end_token: int) -> np.ndarray:
  """(s,): the documents in order, the end token after each."""
  parts = []
  for document in documents:
    parts += [document, np.asarray([end_token], document.dtype)]
  return np.concatenate(parts)


class Windows:
  """A source of records of `length` tokens and targets over a stream.

  Args:
    stream: the tokens.
    info: what they are; `count` and `length` are filled in.
    length: tokens in a record, and targets.

  Raises:
    ValueError: if the stream is too short for one record.
  """

  def __init__(self, stream: Stream, info: Info, length: int):
    check_length(length)
    count = (len(stream) - 1) // length
    if count < 1:
      raise ValueError(
        f"data.length={length}: a record needs {length + 1} tokens, but a "
        f"split of {info.name!r} has {len(stream)} in all. Set data.length "
        f"to at most {len(stream) - 1}, or use more text."
      )
    self.stream, self.length = stream, length
    self.in_memory = stream.in_memory
    self.info = info._replace(count=count, length=length)

  def __len__(self) -> int:
    return self.info.count

  def gather(self, indices: np.ndarray) -> Batch:
    starts = np.asarray(indices, np.int64) * self.length
    window = self.stream.read(starts, self.length + 1).astype(np.int32)
    return {"tokens": window[:, :-1], "targets": window[:, 1:]}


def check_length(length: int | None) -> None:
  """A ValueError unless `length` is a positive integer."""
  if not isinstance(length, int) or length < 1:
    raise ValueError(
      f"data.length={length!r} is the number of tokens in a text record, a "
      "positive integer; e.g. --config.data.length=256."
    )
