"""VeLO's theta in the layout of its authors' Haiku modules.

https://github.com/google/learned_optimization keeps three parts: the LSTM's
start, the layers that see tensors, by Haiku's names, and the bank, whose first
kernel is in pieces, one for each group of an element's inputs.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from distrain_jax.learned.theta import Theta
from distrain_jax.learned.velo.theta import check_velo_theta

# Their layers -> ours.
LAYERS = {
  "linear": "unused",
  "linear_1": "pool",
  "linear_2": "own",
  "rnn/linear": "lstm",
  "rnn_to_controls": "controls",
  "step_size": "rate",
}
PIECES = 14  # of the first kernel


def velo_theta_from_haiku(tree: Mapping[str, Any]) -> Theta:
  """Theta of the authors' `HyperV2`, e.g. of the published VeLO.

  Args:
    tree: `lstm_init_state`, a pair or mapping of hidden and cell, (1, h) each;
      `rnn_params`, layer -> {"w", "b"}; `ff_mod_stack`, {"~": {"w0__0", ...,
      "w0__13", "b0", "w1", "b1", "w2", "b2"}}, the bank's networks first. As
      arrays, such as flax.serialization.msgpack_restore gives.

  Returns:
    NumPy arrays of float32. The published VeLO is used with `velo`'s defaults.

  Raises:
    ValueError: a part or an array that is missing, or of another shape.
  """
  name = "velo_theta_from_haiku"
  theta = {}

  def get(part, *keys):
    found, path = tree, (part, *keys)
    for key in path:
      if not isinstance(found, Mapping) or key not in found:
        there = sorted(found) if isinstance(found, Mapping) else "an array"
        raise ValueError(
          f"{name}: no {'.'.join(path)}; where {key!r} should be is {there}. "
          "Wanted the parts lstm_init_state, rnn_params and ff_mod_stack of "
          "HyperV2's theta."
        )
      found = found[key]
    return found

  start = get("lstm_init_state")
  pair = list(start.values()) if isinstance(start, Mapping) else list(start)
  if isinstance(start, Mapping) and {"hidden", "cell"} <= start.keys():
    pair = [start["hidden"], start["cell"]]
  if len(pair) != 2:
    raise ValueError(
      f"{name}: lstm_init_state holds {len(pair)} arrays, wanted hidden and "
      "cell."
    )
  theta["start_hidden"], theta["start_cell"] = (np.ravel(x) for x in pair)
  for theirs, ours in LAYERS.items():
    for part in ("w", "b"):
      theta[f"{ours}_{part}"] = get("rnn_params", theirs, part)
  bank = lambda entry: np.asarray(get("ff_mod_stack", "~", entry))
  pieces = [bank(f"w0__{i}") for i in range(PIECES)]
  theta["bank_w0"] = np.concatenate(pieces, -2)
  for entry in ("b0", "w1", "b1", "w2", "b2"):
    theta[f"bank_{entry}"] = bank(entry)
  theta = {key: np.asarray(x, np.float32) for key, x in theta.items()}
  check_velo_theta(name, theta)
  return theta
