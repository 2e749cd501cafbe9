"""Text to token ids: bytes, or a Hugging Face `tokenizers` file.

Only `launch/prepare_data.py` tokenises, so that training needs neither the
library nor the time.
"""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from distrain_jax.data.source import did_you_mean

END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(NamedTuple):
  """What preparing data needs of a tokenizer."""

  name: str  # "byte" or the file it came from
  vocab_size: int  # ids are below it
  end_token: int  # closes a document
  encode: Callable[[Sequence[str]], list[np.ndarray]]  # without end tokens
  json: str | None  # a tokenizer.json; None: bytes


def byte_tokenizer() -> Tokenizer:
  """256 tokens: the bytes of UTF-8; byte 0 closes a document.

  U+0000, which no ordinary text holds, is dropped; lone surrogates become "?".
  """

  def encode(texts):
    return [
      np.frombuffer(t.replace("\0", "").encode(errors="replace"), np.uint8)
      for t in texts
    ]

  return Tokenizer("byte", 256, 0, encode, None)


def load_tokenizer(path: str, end: str | None = None) -> Tokenizer:
  """A `tokenizer.json` of the Hugging Face `tokenizers` library.

  Args:
    path: the file.
    end: the token that closes a document; None: the first of ENDS it has.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a tokenizer file, or it has no such token.
  """
  from tokenizers import Tokenizer as Loaded

  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"--tokenizer={path}: no such file. Pass 'byte', or a tokenizer.json: "
      "most models on the Hugging Face hub have one."
    )
  try:
    loaded = Loaded.from_file(str(path))
  except Exception as e:  # the library raises bare Exception
    raise ValueError(f"--tokenizer={path}: not a tokenizer.json ({e}).") from e
  return wrap(loaded, str(path), end)


def train_bpe(
  documents: Iterable[str], vocab_size: int, *, name: str = "bpe"
) -> Tokenizer:
  """A byte-level BPE of at most `vocab_size` tokens, learned from documents.

  Raises:
    ValueError: if there is no room for the 256 bytes and the end token.
  """
  from tokenizers import Tokenizer as Empty
  from tokenizers import decoders, models, pre_tokenizers, trainers

  if vocab_size < 257:
    raise ValueError(
      f"--train_bpe={vocab_size} must be at least 257: 256 bytes and the end "
      "token. For plain bytes pass --tokenizer=byte."
    )
  new = Empty(models.BPE())
  new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  new.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  new.train_from_iterator(documents, trainer)
  return wrap(new, name, END)


def wrap(loaded, name: str, end: str | None = None) -> Tokenizer:
  """A `tokenizers.Tokenizer` in our form; `end` as in `load_tokenizer`."""
  vocabulary = loaded.get_vocab(with_added_tokens=True)
  if end is None:
    end = next((t for t in ENDS if t in vocabulary), None)
  if end not in vocabulary:
    tried = f"{end!r}" if end else f"any of {', '.join(ENDS)}"
    raise ValueError(
      f"{name} has no token {tried} to close documents."
      f"{did_you_mean(end or END, vocabulary)} Name one: --end_token=TOKEN."
    )
  size = max(vocabulary.values()) + 1  # ids may have holes
  dtype = np.uint32 if size > 2**16 else np.uint16

  def encode(texts):
    texts = [t.encode(errors="replace").decode() for t in texts]
    done = loaded.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(e.ids, dtype) for e in done]

  return Tokenizer(name, size, vocabulary[end], encode, loaded.to_str())
