"""Safetensors files: written in parts, read in place.

A file is the length of its header (8 bytes, little-endian), the header (JSON:
name -> dtype, shape, place; and metadata) and the values, in C order. Nothing
here holds a whole model, which is why the format's own library is not used: a
file is memory-mapped, and what is written may be made part by part.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# The format's names of dtypes -> ours.
DTYPES = {
  "F64": np.dtype("float64"),
  "F32": np.dtype("float32"),
  "F16": np.dtype("float16"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype("int64"),
  "I32": np.dtype("int32"),
  "I16": np.dtype("int16"),
  "I8": np.dtype("int8"),
  "U8": np.dtype("uint8"),
  "BOOL": np.dtype("bool"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array to be: in a file, or made of others when it is asked for."""

  shape: tuple[int, ...]
  dtype: np.dtype
  # () -> arrays that, ravelled and in this order, are the whole.
  parts: Callable[[], Iterable[np.ndarray]]

  @property
  def nbytes(self) -> int:
    return self.dtype.itemsize * math.prod(self.shape)

  def array(self) -> np.ndarray:
    """The values: a memory map where they lie in a file, else a new array."""
    parts = list(self.parts())
    if len(parts) == 1:
      return parts[0].reshape(self.shape)
    return np.concatenate([x.ravel() for x in parts]).reshape(self.shape)


class File(NamedTuple):
  """A safetensors file: its header, checked, and nothing read."""

  tensors: dict[str, Tensor]
  metadata: dict[str, str]


def as_tensor(x: Any) -> Tensor:
  """An array (NumPy's, or JAX's on this process) as one part."""
  if isinstance(x, Tensor):
    return x
  return Tensor(tuple(x.shape), np.dtype(x.dtype), lambda: [np.asarray(x)])


def open_file(path: str | os.PathLike) -> File:
  """A file's tensors by name.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a safetensors file, a cut one, or a dtype not in DTYPES.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  try:
    with path.open("rb") as file:
      length = int.from_bytes(file.read(8), "little")
      if size < 8 or length > size - 8:
        raise ValueError(f"its header would have {length} bytes")
      header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    start, end, tensors = 8 + length, 0, {}
    for name, entry in header.items():
      tensors[name] = _stored(path, start, **entry)
      end = max(end, entry["data_offsets"][1])
  except (ValueError, TypeError, KeyError, AttributeError) as e:
    raise ValueError(f"{path} is not a safetensors file: {e}.") from e
  if start + end != size:
    raise ValueError(
      f"{path} has {size:,} bytes, but its header describes {start + end:,}. "
      "Copy or make it again."
    )
  return File(tensors, metadata)


def _stored(path, start, *, dtype, shape, data_offsets) -> Tensor:
  if dtype not in DTYPES:
    raise ValueError(f"dtype {dtype}, known are {', '.join(DTYPES)}")
  kind, shape = DTYPES[dtype], tuple(shape)
  first, last = data_offsets
  read = lambda: [np.memmap(path, kind, "r", start + first, shape)]
  tensor = Tensor(shape, kind, read)
  if last - first != tensor.nbytes:
    raise ValueError(f"{last - first} bytes for a {dtype} of {shape}")
  if first == last:  # nothing to map
    return Tensor(shape, kind, lambda: [np.zeros(shape, kind)])
  return tensor


def open_all(source: str | os.PathLike) -> dict[str, Tensor]:
  """The tensors of a file, or of all files of a folder.

  A folder's index, if it has one, says which file each tensor is in.

  Raises:
    FileNotFoundError: no such file or folder, or no safetensors in it.
    ValueError: as `open_file`; an index that its files do not match; without
      an index, a name that two files have.
  """
  source = pathlib.Path(source)
  if not source.is_dir():
    return open_file(source).tensors
  if (source / INDEX).is_file():
    places = read_json(source / INDEX)["weight_map"]
    found = {f: open_file(source / f).tensors for f in set(places.values())}
    for name, file in places.items():
      if name not in found[file]:
        raise ValueError(f"{source / INDEX}: {name!r} is not in {file}.")
    return {name: found[file][name] for name, file in places.items()}
  files = sorted(source.glob("*.safetensors"))
  if not files:
    raise FileNotFoundError(
      f"{source}: no *.safetensors in it. Older weights (pytorch_model.bin) are "
      "pickles, which are not read; most models come with both."
    )
  tensors: dict[str, Tensor] = {}
  for file in files:
    more = open_file(file).tensors
    for name in more.keys() & tensors.keys():
      raise ValueError(
        f"{file}: {name!r} is in another file of the folder too. Name the file "
        "that is meant."
      )
    tensors |= more
  return tensors


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """An object in a JSON file; a ValueError where it is none."""
  try:
    value = json.loads(path.read_text())
  except ValueError as e:
    raise ValueError(f"{path}: not JSON ({e}).") from e
  if not isinstance(value, dict):
    raise ValueError(f"{path}: wanted an object, got {str(value)[:80]!r}.")
  return value


def write_file(
  path: str | os.PathLike,
  tensors: Mapping[str, Any],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors (or arrays) by name, one part at a time.

  The file appears when it is whole; one of that name is replaced.

  Raises:
    ValueError: a dtype that is not in DTYPES, or parts that do not make up
      their tensor.
  """
  path = pathlib.Path(path)
  given = {name: as_tensor(x) for name, x in tensors.items()}
  # Large items first: every array then starts at a multiple of its items.
  order = sorted(given, key=lambda name: -given[name].dtype.itemsize)
  header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
  for name in order:
    tensor = given[name]
    if tensor.dtype not in CODES:
      raise ValueError(
        f"{path}: {name!r} is {tensor.dtype}; known: {', '.join(DTYPES)}."
      )
    first, end = end, end + tensor.nbytes
    place = {"shape": list(tensor.shape), "data_offsets": [first, end]}
    header[name] = {"dtype": CODES[tensor.dtype], **place}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name in order:
        _write(file, name, given[name])
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def _write(file, name: str, tensor: Tensor) -> None:
  end = file.tell() + tensor.nbytes
  for part in tensor.parts():
    if part.dtype != tensor.dtype:
      raise ValueError(f"{name}: a part of {part.dtype}, not {tensor.dtype}.")
    # As bytes: the buffer protocol does not know bfloat16.
    file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
  if file.tell() != end:
    raise ValueError(f"{name}: its parts do not make up {tensor.shape}.")
