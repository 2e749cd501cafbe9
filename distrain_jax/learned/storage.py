"""Theta in safetensors files, and the weights that the package ships.

A file holds the arrays of `theta.shapes`, or those of `velo.theta.velo_shapes`,
float32, and how they were made as metadata.
"""

import importlib.resources
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distrain_jax.learned.theta import Theta, check_theta, shapes
from distrain_jax.learned.velo.theta import (
  check_velo_theta,
  is_velo,
  velo_shapes,
)

# With muP or without -> the file in this package's folder `weights`.
SHIPPED = {True: "mulo.safetensors", False: "lo_sp.safetensors"}


# What the metadata of mulo's theta may hold -> options of `mulo`.
NUMBERS = ("step_mult", "exp_mult", "feature_eps")
CHOICES = ("update_norm", "eps_scaling")
# Its `mup` -> whether theta was made under muP.
PARAMETRISATIONS = {"absolute": True, "none": False}


class MadeWith(NamedTuple):
  """The settings that a theta was meta-trained with, and must be used with."""

  options: dict[str, Any]  # of `mulo`; those that are known
  mup: bool | None  # whether under muP; None: not known


def made_with(name: str, metadata: Mapping[str, str]) -> MadeWith:
  """What a file of mulo's theta says of its use.

  >>> made_with("example", {"step_mult": "0.01", "mup": "none"})
  MadeWith(options={'step_mult': 0.01}, mup=False)

  Args:
    name: of the file, for the message.
    metadata: of `load_theta`; a choice that is "" or "None" is none.

  Raises:
    ValueError: an entry that can't be read.
  """
  options: dict[str, Any] = {}
  for key in NUMBERS:
    if key in metadata:
      try:
        options[key] = float(metadata[key])
      except ValueError as e:
        raise ValueError(
          f"{name}: its metadata has {key}={metadata[key]!r}, wanted a number."
        ) from e
  for key in CHOICES:
    if metadata.get(key, "None") not in ("", "None"):
      options[key] = metadata[key]
  mup = metadata.get("mup")
  if mup is not None and mup not in PARAMETRISATIONS:
    raise ValueError(
      f"{name}: its metadata has mup={mup!r}, wanted "
      f"{' or '.join(PARAMETRISATIONS)}, or no such entry."
    )
  return MadeWith(options, PARAMETRISATIONS[mup] if mup is not None else None)


def check_any(name: str, theta: Theta) -> list[str]:
  """Refuses what is neither muLO's theta nor VeLO's.

  Returns:
    The names of its arrays, in the schema's order.

  Raises:
    ValueError: saying what is missing, unknown or of another shape.
  """
  if is_velo(theta):
    check_velo_theta(name, theta)
    return list(velo_shapes())
  check_theta(name, theta)
  return list(shapes())


def save_theta(
  path: str | os.PathLike,
  theta: Theta,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes theta; the file appears when it is whole.

  Args:
    path: of the file.
    theta: the arrays, of either architecture.
    metadata: strings by name, of which `made_with` reads some.

  Raises:
    ValueError: a theta of another schema.
  """
  names = check_any("save_theta", theta)
  header, values, end = {}, [], 0
  if metadata:
    header["__metadata__"] = {k: str(v) for k, v in metadata.items()}
  for name in names:
    x = np.ascontiguousarray(theta[name], "<f4")
    place = [end, end + x.nbytes]
    header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": place}
    values.append(x.tobytes())
    end += x.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values))
  partial.replace(path)


def load_theta(path: str | os.PathLike) -> tuple[Theta, dict[str, str]]:
  """Theta and the metadata of a file that `save_theta` wrote.

  Returns:
    NumPy arrays of float32, and strings.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a safetensors file, or of neither theta's schema.
  """
  return _read(str(path), pathlib.Path(path).read_bytes())


def _read(name: str, raw: bytes):
  try:
    start = 8 + int.from_bytes(raw[:8], "little")
    if start > len(raw):
      raise ValueError(f"it ends in its header, after {len(raw)} bytes")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", {})
    theta = {}
    for entry, place in header.items():
      if place["dtype"] != "F32":
        raise ValueError(f"{entry!r} is {place['dtype']}, wanted F32")
      first, end = place["data_offsets"]
      values = np.frombuffer(raw[start + first : start + end], "<f4")
      theta[entry] = values.reshape(place["shape"]).astype(np.float32)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{name} is not a safetensors file of theta: {e}.") from e
  check_any(name, theta)
  return theta, metadata


def shipped(name: str, mup: bool) -> tuple[Theta, MadeWith]:
  """The weights in the package.

  Args:
    name: of the caller, for the message.
    mup: whether those made under muP are meant, or their twin.

  Raises:
    ValueError: this release has none of that kind.
  """
  folder = importlib.resources.files("distrain_jax.learned") / "weights"
  file = folder / SHIPPED[mup]
  if not file.is_file():
    other = folder / SHIPPED[not mup]
    way_out = "theta=..., from load_theta(path) or init_theta(key)"
    if not mup and other.is_file():
      way_out = (
        "mup=mup_multipliers(params, names=...), which the shipped weights are "
        "made for, or mup=1.0 to use them without multipliers all the same"
      )
    raise ValueError(
      f"{name}: no weights are shipped for theta=None "
      f"{'under muP' if mup else 'without muP (mup=None)'}. Pass {way_out}."
    )
  theta, metadata = _read(file.name, file.read_bytes())
  return theta, made_with(file.name, metadata)
