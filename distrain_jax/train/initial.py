"""Training that starts from given weights: a file checked, then laid out."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from distrain_jax.models import weights, zoo

FIELD = "config.initial_params"
# Options of models that change how, or how well, one is trained or computed;
# not what it computes.
FREE = {
  "attention",
  "axis_name",
  "dropout",
  "dtype",
  "init_std",
  "momentum",
  "param_dtype",
  "preset",
  "remat",
  "scan",
  "stochastic_depth",
  "zero_last_scale",
}


def description(name: str, model: nn.Module) -> dict[str, Any]:
  """What a file of a model's parameters says of the model.

  Args:
    name: `config.model.name`.
    model: the module of that name.

  Returns:
    The name, and the options that decide what it computes, as JSON has them.
  """
  fields = getattr(model, "config", model)
  options = [x for x in zoo.valid_options(name) if x not in FREE]
  return {"name": name} | {x: getattr(fields, x) for x in options}


def from_file(
  path: str, name: str, model: nn.Module, shapes: Any, shardings: Any
) -> Callable[[], Any]:
  """A function that reads a model's parameters, after checking that it can.

  Args:
    path: of a file that `models.weights.save` wrote.
    name: `config.model.name`.
    model: the module of that name.
    shapes: its parameters as `jax.ShapeDtypeStruct`s, whose dtypes result.
    shardings: where they shall lie, a tree as shapes.

  Returns:
    () -> the parameters. Each process reads what its own devices hold, leaf by
    leaf, so that no second copy of the model is in memory.

  Raises:
    FileNotFoundError: no such file.
    ValueError: where the file is of another model; what differs is named.
  """
  convert = "python launch/convert_weights.py import FOLDER FILE"
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"{FIELD}={path!r}: no such file. Make one of a Hugging Face model: "
      f"{convert}; of a run's: python launch/export.py RUN FILE; or of any tree "
      "of parameters: distrain_jax.models.weights.save. To start from random "
      "ones: "
      f"--{FIELD}=''."
    )
  try:
    _check_model(weights.model_of(path), name, model)
    given = weights.load(path, shapes)
  except ValueError as e:
    raise ValueError(
      f"{FIELD}={path!r} does not fit config.model: {e} (Weights as Hugging "
      f"Face stores them: {convert}.)"
    ) from e
  return lambda: jax.tree.map(_place, given, shapes, shardings)


def _check_model(described, name: str, model: nn.Module) -> None:
  """Settings that shapes do not show, such as a window or a wavelength."""
  fields = getattr(model, "config", model)
  if described and hasattr(fields, "mup"):
    described = {"mup": False} | described  # files may be older than the option
  for option, value in (described or {}).items():
    mine = name if option == "name" else getattr(fields, option, None)
    mine = list(mine) if isinstance(mine, tuple) else mine  # as JSON has it
    if mine != value:
      raise ValueError(
        f"it is of {option}={value!r}, not {mine!r}. Set "
        f"--config.model.{option}={value}."
      )


def _place(tensor, shape, sharding) -> jax.Array:
  # Copied: a device array on a CPU may share memory with what it is made of.
  part = lambda index: np.array(tensor.array()[index], shape.dtype)
  return jax.make_array_from_callback(shape.shape, sharding, part)
