"""Theta in the layout of public PyTorch weights, and back.

PyLO (https://github.com/Belilovsky-Lab/pylo, arXiv 2506.10315) keeps a network
of kernels (out, in), and the decays' offsets beside it, not in the file. Its
rule reads PyTorch's parameters, which are transposed: of a square one, rows and
columns change places, and steps differ from ours.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distrain_jax.learned.theta import Theta, check_theta

# Their layers -> the number of ours.
LAYERS = {"input": 0, "linear_0": 1, "output": 2}
# The offsets that go with the published muLO_M.
PUBLISHED_DECAYS = {
  "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
  "rms_decays": (0.01079706,),
  "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
}


def theta_from_torch(
  tensors: Mapping[str, Any], decays: Mapping[str, Any] | None = None
) -> Theta:
  """Theta of a PyTorch network's tensors.

  Args:
    tensors: `network.input.weight` and so on, with or without `network.`, as
      arrays (`tensor.numpy()`, or what a safetensors file holds).
    decays: the offsets `momentum_decays`, `rms_decays`, `adafactor_decays`;
      None: those of the published muLO_M.

  Returns:
    NumPy arrays of float32.

  Raises:
    ValueError: tensors that are missing, or of other shapes.
  """
  decays = PUBLISHED_DECAYS if decays is None else decays
  short = {name.removeprefix("network."): x for name, x in tensors.items()}
  theta = {name: np.asarray(x, np.float32) for name, x in decays.items()}
  for layer, number in LAYERS.items():
    for part, ours in (("weight", "w"), ("bias", "b")):
      name = f"{layer}.{part}"
      if name not in short:
        raise ValueError(
          f"theta_from_torch: no tensor network.{name}; given are "
          f"{', '.join(sorted(tensors)) or 'none'}. Wanted the weight and bias "
          f"of {', '.join(LAYERS)}."
        )
      x = np.asarray(short[name], np.float32)
      theta[f"{ours}{number}"] = np.ascontiguousarray(x.T)
  check_theta("theta_from_torch", theta)
  return theta


def theta_to_torch(theta: Theta) -> tuple[dict[str, np.ndarray], dict]:
  """The inverse of `theta_from_torch`: tensors by name, and the decays.

  Raises:
    ValueError: a theta of another schema.
  """
  check_theta("theta_to_torch", theta)
  tensors = {}
  for layer, number in LAYERS.items():
    for part, ours in (("weight", "w"), ("bias", "b")):
      x = np.asarray(theta[f"{ours}{number}"], np.float32).T
      tensors[f"network.{layer}.{part}"] = np.ascontiguousarray(x)
  decays = {name: np.asarray(theta[name]) for name in PUBLISHED_DECAYS}
  return tensors, decays
