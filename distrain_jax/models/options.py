"""Plain values from a config turned into what they name, or refused."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "gelu": nn.gelu,
  "relu": nn.relu,
  "silu": nn.silu,
  "tanh": nn.tanh,
}
DTYPES = {
  "bfloat16": jnp.bfloat16,
  "float16": jnp.float16,
  "float32": jnp.float32,
}
# What the backward pass of a block finds stored; the rest it computes again.
REMAT = {
  "none": None,  # everything: no recomputation
  "full": "nothing_saveable",  # the block's input only
  "dots": "dots_saveable",  # results of all matrix products
  # Results of products with weights, not the attention matrices.
  "dots_with_no_batch_dims": "dots_with_no_batch_dims_saveable",
}


def suggest(given: Any, valid: Iterable[str]) -> str:
  """The end of an error: the nearest valid name, then all of them.

  >>> suggest("gelo", ["relu", "gelu"])
  "Did you mean 'gelu'? Valid: gelu, relu."
  """
  names = sorted(valid)
  by_lower = {name.lower(): name for name in names}
  near = difflib.get_close_matches(str(given).lower(), by_lower, n=1)
  hint = f"Did you mean {by_lower[near[0]]!r}? " if near else ""
  return f"{hint}Valid: {', '.join(names)}."


def pick(what: str, given: Any, table: Mapping[str, Any]) -> Any:
  """`table[given]`; a ValueError that names `what` where there is none."""
  if not isinstance(given, str) or given not in table:
    raise ValueError(f"{what}={given!r} is not known. {suggest(given, table)}")
  return table[given]


def check_positive(owner: str, **values: Any) -> None:
  """Refuses whatever is not a whole number above 0."""
  for name, value in values.items():
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1:
      raise ValueError(
        f"{owner}: `{name}` must be a whole number above 0; got {value!r}."
      )


def check_rate(owner: str, **values: Any) -> None:
  """Refuses whatever is not a number in [0, 1)."""
  for name, value in values.items():
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
      raise ValueError(f"{owner}: `{name}` must be in [0, 1); got {value!r}.")


def check_dtypes(owner: str, **values: Any) -> None:
  """Refuses names of dtypes that no model computes in."""
  for name, value in values.items():
    pick(f"{owner}: {name}", value, DTYPES)


def remat_policy(name: str) -> Any:
  """The checkpoint policy behind a name of `REMAT` other than 'none'."""
  return getattr(jax.checkpoint_policies, REMAT[name])
