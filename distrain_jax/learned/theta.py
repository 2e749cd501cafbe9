"""The learned numbers of the optimizer: their schema, start and decays.

Metz et al., "Practical tradeoffs between memory, compute, and performance in
learned optimizers", 2022, https://arxiv.org/abs/2203.11860 (`small_fc_lopt`),
at the size of Thérien et al., 2024, https://arxiv.org/abs/2406.00153.

Theta is a dict of float32 arrays, so that it can be mapped over (`vmap`), saved
and perturbed like any pytree. Letters in shapes: h hidden units.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Theta = dict[str, jax.Array]

FEATURES = 39  # 28 of an element, 11 of the time
HIDDEN = 32
# Decays before anything is learned; theta holds offsets to them.
MOMENTUM = (0.9, 0.99, 0.999)
SECOND = (0.999,)
FACTORED = (0.9, 0.99, 0.999)


def shapes(hidden: int = HIDDEN) -> dict[str, tuple[int, ...]]:
  """The shape of each of theta's arrays.

  >>> import math
  >>> sum(math.prod(shape) for shape in shapes().values())
  2409
  """
  return {
    "w0": (FEATURES, hidden),
    "b0": (hidden,),
    "w1": (hidden, hidden),
    "b1": (hidden,),
    "w2": (hidden, 2),
    "b2": (2,),
    "momentum_decays": (len(MOMENTUM),),
    "rms_decays": (len(SECOND),),
    "adafactor_decays": (len(FACTORED),),
  }


def init_theta(key: jax.Array, hidden: int = HIDDEN) -> Theta:
  """What meta-training starts from.

  Weights are normal with deviation 1 / sqrt(fan in), cut at two deviations and
  not corrected for the cut; biases and decay offsets are 0.

  Args:
    key: decides the weights.
    hidden: units of both hidden layers.
  """
  theta = {}
  for name, shape in shapes(hidden).items():
    if name[0] == "w":
      key, own = jax.random.split(key)
      draw = jax.random.truncated_normal(own, -2.0, 2.0, shape, jnp.float32)
      theta[name] = draw / np.sqrt(shape[0]).astype(np.float32)
    else:
      theta[name] = jnp.zeros(shape, jnp.float32)
  return theta


def check_theta(name: str, theta: Any) -> None:
  """Refuses what is no theta.

  Args:
    name: of the caller, for the message.
    theta: arrays or tracers by name.

  Raises:
    ValueError: saying which entry is missing, unknown or of another shape.
  """
  made = (
    "Make one with init_theta(key), read one with load_theta(path), or leave "
    "it None for the shipped weights."
  )
  way_out = "Weights in PyTorch's layout: theta_from_torch."
  if isinstance(theta, Mapping) and "lstm_w" in theta:
    way_out = "These are VeLO's numbers, which velo(theta) takes."
  check_names(name, theta, shapes(), made, way_out)
  width = np.shape(theta["b0"])
  hidden = width[0] if len(width) == 1 else HIDDEN
  of = (
    f"{hidden} hidden units. Kernels are (in, out); a PyTorch weight is "
    "transposed: theta_from_torch."
  )
  check_shapes(name, theta, shapes(hidden), of)


def check_names(
  name: str, theta: Any, wanted: Mapping[str, Any], made: str, way_out: str
) -> None:
  """Refuses what is no dict, or one of other arrays, and says how to mend it.

  Args:
    name: of the caller.
    theta: arrays or tracers by name.
    wanted: anything by the names that there should be.
    made: how to come by a theta.
    way_out: what a dict of other arrays may be.
  """
  if not isinstance(theta, Mapping):
    raise ValueError(
      f"{name}: `theta` is a dict of the arrays {', '.join(wanted)}; got "
      f"{type(theta).__name__}. {made}"
    )
  missing, unknown = wanted.keys() - theta.keys(), theta.keys() - wanted.keys()
  if missing or unknown:
    raise ValueError(
      f"{name}: `theta` lacks {sorted(missing)} and has unknown "
      f"{sorted(unknown)}; it has the arrays {', '.join(wanted)}. {way_out}"
    )


def check_shapes(
  name: str, theta: Any, wanted: Mapping[str, tuple[int, ...]], of: str
) -> None:
  """Refuses an array of another shape; `of` says what the wanted ones are for."""
  for entry, shape in wanted.items():
    got = np.shape(theta[entry])
    if got != shape:
      raise ValueError(
        f"{name}: theta[{entry!r}] has shape {got}, wanted {shape} for {of}"
      )


def decay_rates(theta: Theta) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The rates of the moving averages that theta's offsets stand for.

  1 - rate = (1 - base) exp(10 offset). The second and factored moments' rates
  are kept within [0, 1], without which they could become negative.

  Returns:
    Of the momenta (3,), the second moment (1,), the factored moments (3,).
  """

  def rate(base, offset):
    # The bases are exact here: 1 - 0.999 in float32 is off by 5e-5 of itself.
    rest = np.asarray([1 - b for b in base], np.float32)
    return 1 - rest * jnp.exp(10 * offset.astype(jnp.float32))

  momentum = rate(MOMENTUM, theta["momentum_decays"])
  second = rate(SECOND, theta["rms_decays"])
  factored = rate(FACTORED, theta["adafactor_decays"])
  return momentum, jnp.clip(second, 0, 1), jnp.clip(factored, 0, 1)
