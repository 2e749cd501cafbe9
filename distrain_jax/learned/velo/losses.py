"""How the loss has gone, as nine numbers that VeLO's LSTM reads.

Averages of the loss over ten horizons, from ten steps to the whole training. A
feature compares neighbours: the shorter average over the longer one, both
measured from the lowest that the shorter one has been.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

COUNT = 10  # of averages
SHORTEST = 10  # steps


class Losses(NamedTuple):
  """Ten averages, those of short horizons first."""

  means: jax.Array  # (10,), float32, not corrected for their start at 0
  minima: jax.Array  # (10,), float32, the lowest so far, corrected


def init_losses() -> Losses:
  """Before any loss."""
  zeros = jnp.zeros(COUNT, jnp.float32)
  return Losses(zeros, jnp.full(COUNT, jnp.inf, jnp.float32))


def horizons(num_steps: jax.Array) -> jax.Array:
  """Steps after which a loss counts 1/e, (10,): 10 to num_steps, evenly in log."""
  grid = np.linspace(0, 1, COUNT, dtype=np.float32)
  longest = jnp.log(num_steps.astype(jnp.float32))
  return jnp.exp(np.log(SHORTEST) * (1 - grid) + longest * grid)


def next_losses(
  old: Losses,
  loss: jax.Array,
  count: jax.Array,
  num_steps: jax.Array,
  nan_to_num: bool,
) -> tuple[Losses, jax.Array]:
  """The averages with one more loss, and what the LSTM reads.

  A loss counts as at most twice the largest average. As in the authors' code,
  that average is corrected as if it held this loss already, and the features
  are 0 for the first two losses.

  Args:
    old: before.
    loss: ().
    count: (), how many losses came before.
    num_steps: (), of the whole training.
    nan_to_num: whether a loss that is not finite counts as the most it may.

  Returns:
    `Losses`, and features (9,) in [-1, 1].
  """
  pace = 1 / horizons(num_steps)
  weight = -jnp.expm1(-pace * (count.astype(jnp.float32) + 1))
  loss = loss.astype(jnp.float32)
  most = 2 * jnp.abs(jnp.max(old.means / weight))
  if nan_to_num:
    loss = jnp.where(jnp.isfinite(loss), loss, most)
  loss = jnp.where(count == 0, loss, jnp.minimum(most, loss))
  means = jnp.exp(-pace) * old.means - jnp.expm1(-pace) * loss
  average = means / weight
  minima = jnp.minimum(old.minima, average)
  short, long, lowest = average[:-1], average[1:], minima[:-1]
  ratio = (short - lowest) / jnp.maximum(1e-8, long - lowest)
  features = jnp.clip(ratio - 1, -1.0, 1.0)
  features = jnp.where(count < 2, jnp.zeros_like(features), features)
  return Losses(means, minima), features
