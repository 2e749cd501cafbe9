"""Documents to token shards: split, tokenise, write, and only then appear.

Everything is written into `OUT.partial` beside the final folder, which gets
its name in one step at the end: a folder called OUT is always whole. What a
killed run left is removed by the next one.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

from distrain_jax.data.source import Splits
from distrain_jax.data.splits import check_fraction, part
from distrain_jax.data.token_shards import (
  FORMAT,
  Metadata,
  Split,
  SplitWriter,
  dtype_for,
  write_metadata,
)
from distrain_jax.data.tokenizer import Tokenizer

CHUNK = 2048  # tokens a record: what a reader unpacks at once
BLOCK = 2**20  # characters tokenised at once


@contextlib.contextmanager
def appearing(
  out: str | os.PathLike, overwrite: bool
) -> Iterator[pathlib.Path]:
  """A folder to write into, that becomes `out` if nothing fails.

  Raises:
    FileExistsError: if `out` exists and `overwrite` is False.
  """
  out = pathlib.Path(os.path.abspath(out))
  partial = out.with_name(out.name + ".partial")
  replaced = out.with_name(out.name + ".replaced")
  if replaced.exists() and not out.exists():
    replaced.rename(out)  # an overwriting run died between its two renames
  if out.exists() and not overwrite:
    raise FileExistsError(
      f"--out={out} exists. Choose another folder, or pass --overwrite to "
      "replace it when the new one is whole."
    )
  for left in (partial, replaced):
    shutil.rmtree(left, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  if out.exists():
    out.rename(replaced)
  partial.rename(out)
  shutil.rmtree(replaced, ignore_errors=True)


def prepare(
  documents: Iterable[str],
  out: str | os.PathLike,
  tokenizer: Tokenizer | Callable[[], Tokenizer],
  *,
  validation: float = 0.01,
  test: float = 0.01,
  chunk: int = CHUNK,
  shard_tokens: int = 2**27,
  overwrite: bool = False,
) -> Metadata:
  """Makes a folder of token shards that `token_shards.tokens` reads.

  A document's split is decided by a hash of its text (`splits.part`): equal
  documents share a split. Documents without any non-blank character are left
  out.

  Args:
    documents: texts.
    out: the folder to make.
    tokenizer: or a function that makes it, called once `out` is accepted.
    validation: expected share of documents held out for validation.
    test: the same for testing.
    chunk: tokens a record.
    shard_tokens: tokens a file.
    overwrite: replace `out` if it exists.

  Returns:
    What was written.

  Raises:
    FileExistsError: see `appearing`.
    ValueError: for bad fractions, or if a split got no document.
  """
  check_fraction(validation, "--validation")
  check_fraction(test, "--test")
  check_fraction(validation + test, "--validation + --test")
  with appearing(out, overwrite) as folder:
    tok = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer()
    dtype = dtype_for(tok.vocab_size)
    writers = {
      name: SplitWriter(
        folder,
        name,
        dtype=dtype,
        end_token=tok.end_token,
        chunk=chunk,
        shard_tokens=shard_tokens,
      )
      for name in Splits._fields
    }
    splits = _write(documents, tok, writers, validation, test)
    metadata = Metadata(
      FORMAT, tok.name, tok.vocab_size, tok.end_token, dtype, chunk, splits
    )
    if tok.json is not None:
      (folder / "tokenizer.json").write_text(tok.json)
    write_metadata(folder, metadata)
  return metadata


def _write(documents, tok, writers, validation, test) -> dict[str, Split]:
  """Every document to its part's writer; refuses to leave a part empty."""
  for texts in blocks(documents):
    for text, ids in zip(texts, tok.encode(texts)):
      raw = text.encode(errors="replace")
      name = part(raw, validation=validation, test=test)
      writers[name].add(ids, len(raw))
  splits = {name: writer.close() for name, writer in writers.items()}
  counts = {name: split.documents for name, split in splits.items()}
  if not all(counts.values()):
    raise ValueError(
      f"Documents by part: {counts}; each needs one at least. Raise "
      "--validation and --test, or cut long text files into documents with "
      "--separator."
    )
  return splits


def training_part(
  documents: Iterable[str], validation: float, test: float
) -> Iterator[str]:
  """The documents that `prepare` puts into the training part."""
  for text in documents:
    raw = text.encode(errors="replace")
    if part(raw, validation=validation, test=test) == "train":
      yield text


def blocks(documents: Iterable[str]) -> Iterator[list[str]]:
  """Lists of documents of about BLOCK characters; blank ones left out."""
  block, waiting = [], 0
  for text in documents:
    if not text.strip():
      continue
    block.append(text)
    waiting += len(text)
    if waiting >= BLOCK:
      yield block
      block, waiting = [], 0
  if block:
    yield block
