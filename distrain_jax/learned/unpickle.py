"""Theta out of a pickle, without running what the pickle says.

The original (https://github.com/bentherien/mu_learned_optimization) and other
users of Haiku keep theta as pickled dicts of arrays. A pickle is a program: it
may call anything that can be imported. Here each name that a pickle of arrays
has use for stands for a small thing of our own, and any other is refused; not
even NumPy's or JAX's own functions are called.

Their theta is a mapping of `nn`, in which the layers `w0`, `b0`, ... are under
`~`, and of the decays' offsets, which are called as in `theta.shapes`. To keep it:

  save_theta("theta.safetensors", theta_from_pickle(path), {"step_mult": 0.01})
"""

import io
import itertools
import os
import pathlib
import pickle
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from distrain_jax.learned.theta import Theta, check_theta, shapes

LARGEST = 64 << 20  # bytes of a file; theta has some 10 kB
MOST = 100_000  # values in all; theta has some 20
KINDS = "fiub"  # floats, integers, booleans: no objects, no records

# What is shared is printed again and again by `repr`: without end, if nested.
short = reprlib.repr


class _Name:
  """A name of the pickle: it can be called, and nothing else."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable[..., Any]):
    object.__setattr__(self, "_call", call)

  def __call__(self, *args: Any) -> Any:
    return self._call(*args)

  def __setattr__(self, name: str, value: Any) -> NoReturn:
    raise pickle.UnpicklingError(f"it sets {name!r} of a name")

  def __setstate__(self, state: Any) -> NoReturn:
    raise pickle.UnpicklingError("it sets the state of a name")


class _Kind:
  """What `numpy.dtype` leaves in a pickle."""

  __slots__ = ("order", "text")

  def __init__(self, text: Any, *_: Any):
    if not isinstance(text, str) or not text or text[0] not in KINDS:
      raise pickle.UnpicklingError(f"it has arrays of dtype {short(text)}")
    self.text, self.order = text, "="

  def __setstate__(self, state: Any) -> None:
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
    if order not in ("<", ">", "=", "|"):
      raise pickle.UnpicklingError(f"it has a dtype's state {short(state)}")
    self.order = order

  def made(self) -> np.dtype:
    order = "=" if self.order == "|" else self.order
    return np.dtype(self.text).newbyteorder(order)


class _Array:
  """What is left of an array: bytes, until they are read."""

  __slots__ = ("value",)

  def __init__(self, *_: Any):
    self.value = None

  def __setstate__(self, state: Any) -> None:
    if not isinstance(state, tuple) or len(state) != 5:
      raise pickle.UnpicklingError("it has an array's state of another form")
    _, shape, kind, fortran, raw = state
    self.value = _read(raw, kind, shape, "F" if fortran else "C")


def _read(raw: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
  """An array of bytes; protocol 2 has them as text."""
  if isinstance(raw, str):
    raw = raw.encode("latin1")
  if not isinstance(kind, _Kind) or not isinstance(raw, (bytes, bytearray)):
    raise pickle.UnpicklingError("it has an array that is no array of numbers")
  return np.frombuffer(bytes(raw), kind.made()).reshape(shape, order=order)


def _from_jax(fun: Any, args: Any, state: Any, *_: Any) -> _Array:
  del fun, args  # of NumPy's, which `state` makes up for
  array = _Array()
  array.__setstate__(state)
  return array


def _scalar(kind: Any, raw: Any) -> np.ndarray:
  return _read(raw, kind, (), "C")


def _mapping(*given: Any) -> dict:
  """Of pairs or of a mapping, as plain dict."""
  return dict(*given)


def _text(text: Any, encoding: Any = "latin1") -> bytes:
  if not isinstance(text, str) or encoding != "latin1":
    raise pickle.UnpicklingError(f"it has text in {short(encoding)}")
  return text.encode("latin1")


_NUMPY = ("numpy.core", "numpy._core")
NAMES: dict[tuple[str, str], Callable[..., Any]] = {
  ("_codecs", "encode"): _text,
  ("collections", "OrderedDict"): _mapping,
  ("flax.core.frozen_dict", "FrozenDict"): _mapping,
  ("haiku._src.data_structures", "FlatMap"): _mapping,
  ("haiku._src.data_structures", "FlatMapping"): _mapping,
  ("haiku._src.data_structures", "frozendict"): _mapping,
  ("jax._src.array", "_reconstruct_array"): _from_jax,
  ("jax._src.device_array", "reconstruct_device_array"): _from_jax,
  ("numpy", "dtype"): _Kind,
  ("numpy", "ndarray"): _Array,
}
for _package in _NUMPY:
  NAMES[f"{_package}.multiarray", "_reconstruct"] = _Array
  NAMES[f"{_package}.multiarray", "scalar"] = _scalar
  NAMES[f"{_package}.numeric", "_frombuffer"] = _read


class _Reader(pickle.Unpickler):
  """Finds our own things in the place of what can be imported."""

  def find_class(self, module: str, name: str) -> _Name:
    known = NAMES.get((module, name))
    if known is None:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}")
    return _Name(known)

  def persistent_load(self, pid: Any) -> NoReturn:
    raise pickle.UnpicklingError(
      f"it refers to {short(pid)}, outside of the file"
    )


def read_pickle(path: str | os.PathLike) -> Any:
  """A pickle of dicts, lists, numbers and arrays; nothing in it is run.

  Args:
    path: of a file of any pickle protocol.

  Returns:
    What was pickled: mappings as dicts, NumPy's and JAX's arrays as NumPy's.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a pickle, one of above 64 MiB or 100,000 values, or one that
      asks for anything else, by name.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  if size > LARGEST:
    raise ValueError(
      f"read_pickle: {path} has {size:,} bytes; theta has some 10,000, and "
      f"nothing above {LARGEST:,} is read. Save theta alone."
    )
  try:
    tree = _Reader(io.BytesIO(path.read_bytes())).load()
    return _plain(tree, itertools.count())
  except Exception as e:  # a pickle can go wrong in any way
    raise ValueError(
      f"read_pickle: {path} is no pickle of dicts and arrays of numbers: {e}. "
      "Nothing in it was run. Where it comes from, save theta as such: "
      "jax.tree.map(numpy.asarray, theta)."
    ) from e


def _plain(tree: Any, seen: Iterator[int]) -> Any:
  """Without our stand-ins, and nothing shared: a few bytes can nest references.

  Args:
    tree: what was read.
    seen: counts values, each as often as it is referred to.
  """
  if next(seen) >= MOST:
    raise pickle.UnpicklingError(f"it holds more than {MOST:,} values")
  if isinstance(tree, _Array):
    tree = tree.value
  if isinstance(tree, dict):
    odd = [k for k in tree if not isinstance(k, (str, int))]
    if odd:
      raise pickle.UnpicklingError(f"it has a key of {type(odd[0]).__name__}")
    return {k: _plain(v, seen) for k, v in tree.items()}
  if isinstance(tree, (list, tuple)):
    return type(tree)(_plain(v, seen) for v in tree)
  simple = (np.ndarray, str, bytes, int, float, type(None))
  if not isinstance(tree, simple):
    raise pickle.UnpicklingError(f"it holds {type(tree).__name__}")
  return tree


def theta_from_pickle(path: str | os.PathLike) -> Theta:
  """Theta of the original's pickled one, or of a dict that holds it.

  Args:
    path: of the file.

  Returns:
    NumPy arrays of float32.

  Raises:
    FileNotFoundError: no such file.
    ValueError: as `read_pickle`; no theta in it, several, or one of another
      schema.
  """
  tree = read_pickle(path)
  found = list(_thetas(tree))
  if len(found) != 1:
    keys = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree)
    raise ValueError(
      f"theta_from_pickle: {path} has {len(found)} mappings with the layers "
      f"`nn` and their decays' offsets, wanted one; at its root are {keys}."
    )
  flat = _by_last_name(found[0])
  theta = {
    k: np.asarray(v, np.float32) if k in shapes() else v
    for k, v in flat.items()
  }
  check_theta("theta_from_pickle", theta)
  return theta


def _thetas(tree):
  """Mappings with all that is beside the layers, however deep."""
  if isinstance(tree, Mapping):
    if {"nn", "momentum_decays"} <= tree.keys():
      yield tree
      return
    tree = list(tree.values())
  for x in tree if isinstance(tree, (list, tuple)) else ():
    yield from _thetas(x)


def _by_last_name(tree) -> dict[str, Any]:
  """nn/~/w0 -> w0, whatever lies between."""
  flat: dict[str, Any] = {}
  for key, x in tree.items():
    inner = _by_last_name(x) if isinstance(x, Mapping) else {key: x}
    again = flat.keys() & inner.keys()
    if again:
      raise ValueError(f"theta_from_pickle: two arrays are called {again}.")
    flat |= inner
  return {str(key).rpartition("/")[2]: x for key, x in flat.items()}
