"""Averages over a whole split, whatever the batches and workers."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from distrain_jax import spmd
from distrain_jax.runners import Run


def evaluator(
  run: Run, sums_of: Callable[[Any, Any], Mapping[str, jax.Array]]
) -> Callable[[Any, Iterable[Any]], dict[str, float]]:
  """`(params, batches) -> {"loss", "accuracy"}`, averaged over all that counts.

  Args:
    run: whose mesh the batches are spread over.
    sums_of: `(params, batch) -> {"loss_sum", "correct_sum", "weight"}`, such
      as `models.Task.evaluate`: sums over rows, so that the last batch, which
      is padded, counts for what it has.

  Returns:
    A function; it compiles once.
  """
  jitted = jax.jit(sums_of)

  def evaluate(params, batches):
    return averages(lambda batch: jitted(params, run.spread(batch)), batches)

  return evaluate


def averages(
  sums_of: Callable[[Any], Mapping[str, jax.Array]], batches: Iterable[Any]
) -> dict[str, float]:
  """Sums of batches -> averages over all that counts.

  Args:
    sums_of: (batch) -> {"loss_sum", "correct_sum", "weight"}; a name may have
      something before it: "members_loss_sum" becomes "members_loss".
    batches: at least one with a row that counts.
  """
  totals: dict[str, float] = {}
  running: Mapping[str, Any] = {}
  for batch in batches:
    with spmd.no_current_mesh():
      sums = sums_of(batch)
    _add(totals, running)  # of the batch before, while this one runs
    running = sums
  _add(totals, running)
  weight = totals.pop("weight", 0.0)
  if not weight:
    raise ValueError("evaluate: the split has no rows that count.")
  named = lambda name: name.replace("correct_sum", "accuracy_sum")[:-4]
  losses_first = sorted(totals, key=lambda name: not name.endswith("loss_sum"))
  return {named(name): totals[name] / weight for name in losses_first}


def with_bits_per_byte(
  means: dict[str, float], bytes_per_token: float | None
) -> dict[str, float]:
  """Adds the loss in bits a byte of text, comparable between tokenizers."""
  if bytes_per_token is None:
    return means
  return means | {
    "bits_per_byte": means["loss"] / math.log(2) / bytes_per_token
  }


def _add(totals, sums):
  for name, value in sums.items():
    totals[name] = totals.get(name, 0.0) + float(value)
