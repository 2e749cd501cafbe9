"""Members between themselves and an average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distrain_jax.gradients import at_least_float32
from distrain_jax.population.members import Member, Rows

# (own, average, rows, mean, sharing) -> the average, corrected; a member's own
# function, as everything of a method. own: its model before, params or
# `Variables`; average: what it is to become; rows: what it saw in the step;
# mean: (a tree of this member's floats) -> the mean of those members' trees
# whose average it is; sharing: the names of the axes on which all become that
# same average, or None if this member's is its own.
Repair = Callable[[Any, Any, Rows, Callable[[Any], Any], Any], Any]


def mix(x: jax.Array, y: jax.Array, weight) -> jax.Array:
  """(1 - weight) x + weight y in float32 or wider; what is whole stays x.

  The result is rounded to x's dtype: what moves x by less than half its last
  bit is lost, at every step anew. In bfloat16, with 8 bits, a weight of 0.01
  moves nothing that is nearer to y than about a fifth of itself, and members
  never meet. Pull parameters in float32 (a model's param_dtype), which can
  compute in bfloat16 (its dtype), or use a weight near 1.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  wide, other = at_least_float32(x), at_least_float32(y)
  return ((1 - weight) * wide + weight * other).astype(x.dtype)


def with_model(member: Member, model: tuple[Any, Any]) -> Member:
  """The member with other `(params, model_state)`."""
  params, model_state = model
  return member._replace(params=params, model_state=model_state)
