"""The learned numbers of VeLO: their schema and start.

Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
https://arxiv.org/abs/2211.09760. Two networks: an LSTM that sees each tensor as
30 numbers and mixes a bank of small networks for it, and that mixture, which
sees each element as 30 numbers.

Theta is a dict of float32 arrays. Letters in shapes: h units of the LSTM, k
networks in the bank.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.learned.theta import Theta, check_names, check_shapes

LSTM = 512  # h, as published
BANK = 256  # k, as published
INPUTS = 30  # of the LSTM, and of an element's network: both have 30
UNITS = 4  # of both hidden layers of an element's network
OUTPUTS = 3  # of which the last is not used


def velo_shapes(
  lstm: int = LSTM, bank: int = BANK
) -> dict[str, tuple[int, ...]]:
  """The shape of each of theta's arrays; kernels are (in, out).

  `unused` is a layer whose result the authors' code throws away. It is kept so
  that counts and files agree with theirs.

  >>> import math
  >>> count = lambda *size: sum(map(math.prod, velo_shapes(*size).values()))
  >>> count(512, 256), count(16, 8)
  (2320385, 5057)
  """
  layer = lambda name, *shape: {f"{name}_w": shape, f"{name}_b": shape[-1:]}
  banked = lambda i, *shape: {
    f"bank_w{i}": (bank, *shape),
    f"bank_b{i}": (bank, shape[-1]),
  }
  return {
    **layer("unused", INPUTS, lstm),
    **layer("pool", INPUTS, lstm),  # its largest output over all tensors
    **layer("own", INPUTS, lstm),  # each tensor's
    **layer("lstm", 2 * lstm, 4 * lstm),  # input and state; gates i, g, f, o
    "start_hidden": (lstm,),
    "start_cell": (lstm,),
    **layer("controls", lstm, bank),
    **layer("rate", lstm, 1),
    **banked(0, INPUTS, UNITS),
    **banked(1, UNITS, UNITS),
    **banked(2, UNITS, OUTPUTS),
  }


def is_velo(theta: Any) -> bool:
  """Whether a dict of arrays is VeLO's rather than muLO's."""
  return isinstance(theta, Mapping) and "lstm_w" in theta


def init_velo_theta(
  key: jax.Array, lstm: int = LSTM, bank: int = BANK
) -> Theta:
  """What meta-training starts from.

  Kernels are normal with deviation 1 / sqrt(fan in), cut at two deviations and
  not corrected for the cut (Haiku's default, and the authors'); biases and the
  LSTM's state are 0.

  Args:
    key: decides the kernels.
    lstm: h.
    bank: k.

  Raises:
    ValueError: a size below 1.
  """
  if lstm < 1 or bank < 1:
    raise ValueError(
      "init_velo_theta: `lstm` counts units and `bank` networks, both 1 or "
      f"more; got lstm={lstm}, bank={bank}. Published are {LSTM} and {BANK}, "
      "and 16 and 8 under muP."
    )
  theta = {}
  for name, shape in velo_shapes(lstm, bank).items():
    if "_w" in name:
      key, own = jax.random.split(key)
      draw = jax.random.truncated_normal(own, -2.0, 2.0, shape, jnp.float32)
      theta[name] = draw / np.float32(math.sqrt(shape[-2]))
    else:
      theta[name] = jnp.zeros(shape, jnp.float32)
  return theta


def check_velo_theta(name: str, theta: Any) -> tuple[int, int]:
  """Refuses what is no theta of VeLO's.

  Args:
    name: of the caller, for the message.
    theta: arrays or tracers by name.

  Returns:
    The sizes h and k.

  Raises:
    ValueError: saying which entry is missing, unknown or of another shape.
  """
  made = "Make one with init_velo_theta(key)"
  way_out = f"{made}."
  if isinstance(theta, Mapping) and "momentum_decays" in theta:
    way_out = "These are muLO's numbers, which mulo(theta) takes."
  made += ", read one with load_theta(path)."
  check_names(name, theta, velo_shapes(), made, way_out)
  start, bank = np.shape(theta["start_hidden"]), np.shape(theta["bank_b0"])
  lstm = start[0] if len(start) == 1 else LSTM
  count = bank[0] if bank else BANK
  of = (
    f"{lstm} units of the LSTM and a bank of {count}. Kernels are (in, out); "
    "the bank's have its networks first."
  )
  check_shapes(name, theta, velo_shapes(lstm, count), of)
  return lstm, count
