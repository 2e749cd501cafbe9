"""Text that is always at hand: the Python standard library's own sources.

About 9 MB of Python, byte level: token = byte, 256 tokens. The end token is
byte 0, which no Python source may hold, so that the vocabulary stays a power
of two. The text is the running interpreter's: another Python version has
slightly different files, so results compare only between runs of the same one.
"""

import os
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

from distrain_jax.data.packing import ArrayStream, Windows, check_length, pack
from distrain_jax.data.source import Info, Splits
from distrain_jax.data.splits import TEST, check_fraction, hash64, part

END = 0  # the byte that ends a file
# Installed packages and tests are not the library; the tables of `encodings`
# and `pydoc_data` are generated, many nearly equal: a test part would be easy.
SKIP = frozenset(
  {"site-packages", "dist-packages", "test", "tests", "idle_test"}
  | {"lib2to3", "__pycache__", "encodings", "pydoc_data"}
)


def files(root: pathlib.Path) -> Iterator[tuple[str, bytes]]:
  """(relative path, text) of each UTF-8 source file, in a fixed order."""
  for folder, inside, names in os.walk(root):
    inside[:] = sorted(set(inside) - SKIP)  # os.walk descends into these only
    for name in sorted(names):
      if not name.endswith(".py") or name.startswith("_sysconfigdata"):
        continue  # _sysconfigdata tells how and where this Python was built
      path = pathlib.Path(folder, name)
      text = path.read_bytes().replace(b"\r\n", b"\n")
      try:
        text.decode()
      except UnicodeDecodeError:
        continue
      yield path.relative_to(root).as_posix(), text.replace(b"\0", b"")


def stdlib_text(
  *,
  length: int,
  validation_fraction: float = 0.1,
  max_bytes: int | None = None,
) -> Splits:
  """Records of `length` bytes of Python, split by file.

  A tenth of the files, by a hash of their path, are the test part; of the
  rest, `validation_fraction` the validation part.

  Args:
    length: tokens (bytes) in a record.
    validation_fraction: share of the files that are not for testing.
    max_bytes: stop after this many bytes and a file in each part; files come
      in the order of a hash, so that all parts shrink alike. None: all.

  Raises:
    ValueError: for a bad length or fraction.
    FileNotFoundError: if this Python has no library sources on disk.
  """
  check_length(length)
  check_fraction(validation_fraction, "data.validation_fraction")
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  texts = dict(files(root))
  parts = _by_part(texts, (1 - TEST) * validation_fraction, max_bytes)
  if not all(parts.values()):
    raise FileNotFoundError(
      f"Only {len(texts)} Python sources under {root}: this Python ships its "
      "library compiled or zipped. Use data.name='tokens' and your own text, "
      "made by `python launch/prepare_data.py --out=DIR FILES`."
    )
  info = Info(
    "stdlib_text",
    "text",
    count=0,  # Windows counts
    vocab_size=256,
    end_token=END,
    bytes_per_token=1.0,
  )
  streams = (ArrayStream(pack(parts[s], END)) for s in Splits._fields)
  return Splits(*(Windows(stream, info, length) for stream in streams))


def _by_part(
  texts: dict[str, bytes], held: float, max_bytes: int | None
) -> dict[str, list[np.ndarray]]:
  """The texts of each part; `held` is validation's share of all files."""
  parts: dict[str, list[np.ndarray]] = {split: [] for split in Splits._fields}
  taken = 0
  # Another hash than the split's, or the test part would come first.
  for name in sorted(texts, key=lambda name: hash64(b"order " + name.encode())):
    if max_bytes is not None and taken >= max_bytes and all(parts.values()):
      break
    taken += len(texts[name])
    split = part(name.encode(), validation=held, test=TEST)
    parts[split].append(np.frombuffer(texts[name], np.uint8))
  return parts
