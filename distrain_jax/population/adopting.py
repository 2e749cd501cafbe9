"""Members of a saved population that go on in one of others.

Written for arrays whose leading axis, of members, is divided among devices:
besides its own old and new members a device holds a few leaves and which values
are finite, whatever the number of members.

Letters in shapes: N members of old, M of new.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax import gradients


class Continued(NamedTuple):
  """Whose state the members of another population go on with."""

  at: jax.Array  # (M,), int32: place among the old members
  known: jax.Array  # (M,), bool: False for those who join
  sound: jax.Array  # (N,), bool: old members whose models are finite and
  # whose optimizers' states are numbers; an unset best loss there may be inf


def check_count(name: str, old: int, new: int, leave: Sequence[int]) -> None:
  """Nobody is dropped without being named."""
  if new < old and len(leave) < old - new:
    raise ValueError(
      f"{name}: the state has {old} members, {old - new} of whom would be lost "
      f"in a population of {new}. Say who leaves: leave=(number, ...); in a "
      "config, --config.method.leave='(2,)'."
    )


def check_numbers(
  name: str, old: Sequence[int], new: Sequence[int], leave: Sequence[int]
) -> None:
  """As `check_count`, where it is known who they are."""
  lost = tuple(n for n in old if n not in new and n not in leave)
  if lost:
    raise ValueError(
      f"{name}: the state is of members {tuple(old)}, of whom {lost} would be "
      f"lost in a population of {tuple(new)}. Name all who left, in earlier "
      f"runs too: leave=(number, ...), now {tuple(leave)}; in a config, "
      "--config.method.leave='(2,)'."
    )


def continued(
  model: Any, opt_state: Any, number: jax.Array, here: jax.Array
) -> Continued:
  """Members `here` (M,) of trees (N, ...); a number that is new joins."""
  sound = jnp.ones(number.shape[0], bool)
  is_number = lambda x: ~jnp.isnan(x)
  for tree, good in ((model, jnp.isfinite), (opt_state, is_number)):
    for x in jax.tree.leaves(tree):
      if jnp.issubdtype(x.dtype, jnp.inexact):
        sound &= good(x).all(tuple(range(1, x.ndim)))
  same = (here[:, None] == number[None]) & sound[None]
  return Continued(same.argmax(1), same.any(1), sound)


def restack(tree: Any, found: Continued) -> Any:
  """Who is known goes on; others start from the average of who is sound."""

  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = one(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))

    # One after the other: an index into a divided axis would have each device
    # gather all members.
    def place(m, out):
      own = jax.lax.cond(
        found.known[m],
        lambda: _one_of(x, found.at[m]),
        lambda: _average(x, found.sound),
      )
      return jnp.where(_is(m, out), own[None], out)

    new = jnp.zeros((found.at.shape[0], *x.shape[1:]), x.dtype)
    return jax.lax.fori_loop(0, new.shape[0], place, new)

  return jax.tree.map(one, tree)


def _average(x: jax.Array, sound: jax.Array) -> jax.Array:
  """Of who is sound, in float32 or wider; of what is whole, the first's."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return _one_of(x, sound.argmax())
  wide = gradients.at_least_float32(jnp.where(_along(sound, x), x, 0))
  return (wide.sum(0) / sound.sum()).astype(x.dtype)


def _one_of(x: jax.Array, at: jax.Array) -> jax.Array:
  """x[at] to the bit, by a sum that leaves the first axis where it lies."""
  alone = jnp.where(_is(at, x), x, jnp.zeros((), x.dtype))
  if x.dtype == bool:
    return alone.any(0)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return alone.sum(0, dtype=x.dtype)
  # As floats, -0.0 + 0.0 would be 0.0.
  bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  return alone.view(bits).sum(0, dtype=bits).view(x.dtype)


def _is(at, x: jax.Array) -> jax.Array:
  return _along(jnp.arange(x.shape[0]) == at, x)


def _along(mask: jax.Array, x: jax.Array) -> jax.Array:
  return mask.reshape((-1,) + (1,) * (x.ndim - 1))
