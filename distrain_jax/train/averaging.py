"""What the trainer tells PAPA: when members average, and how it is mended."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from distrain_jax import gradients, models, soups
from distrain_jax.population.averages import Repair

REPLACED = ("all", "pair")  # variants of PAPA whose members become averages
EPOCHS = 5  # from one average to the next, as in the paper


def check(c: ConfigDict) -> None:
  """Refuses `config.population.repair` where no member becomes an average.

  Raises:
    ValueError: naming the field, its value, the rule and a way out.
  """
  if not c.population.repair or _replaced(c):
    return
  here = f"config.method.name={c.method.name!r}"
  if c.method.name == "papa":
    here += f" with config.method.variant={c.method.variant!r}"
  raise ValueError(
    "config.population.repair=True corrects averages right after members became "
    f"them, but those of {here} do not. Leave it at False, or set "
    "--config.method.name=papa and --config.method.variant=all or pair."
  )


def options(
  c: ConfigDict,
  model: nn.Module,
  example: Mapping[str, jax.ShapeDtypeStruct],
  count: int,
  members: int,
  mixed: Callable[..., Any] | None,
) -> dict[str, Any]:
  """Options of `papa` that a config does not spell out.

  Args:
    c: the config.
    model: that members train.
    example: a row of a batch; the model's input is the first.
    count: records of the training data; 0: unknown, where nothing will be
      trained: then nothing averages.
    members: how many.
    mixed: (micro-batch, its key) -> what a member's loss sees in their place;
      None: they.

  Raises:
    ValueError: if nothing can be repaired, or the run is over before members
      average.
  """
  chosen: dict[str, Any] = {}
  if _replaced(c) and c.method.every is None:
    chosen["every"] = _five_epochs(c, count, members) if count else c.steps
  if c.population.repair:
    accumulate = c.method.accumulate or 1
    chosen["repair"] = _repairer(model, example, mixed, accumulate)
  return chosen


def _replaced(c: ConfigDict) -> bool:
  return c.method.name == "papa" and c.method.variant in REPLACED


def _five_epochs(c: ConfigDict, count: int, members: int) -> int:
  """Of a member, in steps."""
  if c.method.epoch_steps is not None:
    raise ValueError(
      f"config.method.epoch_steps={c.method.epoch_steps!r} starts the count of "
      "config.method.every anew in each epoch, so that has to be set, to less: "
      "--config.method.every=... Or leave both unset: members then average "
      f"every {EPOCHS} epochs."
    )
  passes = 1 if c.population.same_order else members  # over the data, at once
  steps = max(EPOCHS * count * passes // c.batch_size, 1)
  last = min(c.steps, c.method.stop_after or c.steps)
  if steps > last:
    end = "method.stop_after" if last < c.steps else "steps"
    raise ValueError(
      f"config.method.every is not set: members average every {EPOCHS} epochs "
      f"of {count} rows, {steps} steps, and config.{end}={last} ends before. "
      f"Set it, in steps, e.g. --config.method.every={max(last // 4, 1)}, or "
      f"--config.{end}={steps} or more."
    )
  return steps


def _repairer(model, example, mixed, accumulate: int) -> Repair:
  """Of what a member's loss sees: its rows as it mixes them, all at once."""
  name, x = next(iter(example.items()))
  try:
    mend = soups.repairer(model, models.zoo.abstract(model, x), x, inputs=name)
  except ValueError as e:
    raise ValueError(
      f"config.population.repair=True: {e} Set --config.population.repair=False."
    ) from e
  if mixed is None:
    return mend

  def seen(rows):
    if accumulate == 1:
      return mixed(rows.batch, rows.key)[0]
    micro = gradients.microbatches(rows.batch, accumulate)
    key = functools.partial(jax.random.fold_in, rows.key)  # as of its gradient
    mix = lambda batch, i: mixed(batch, key(i))[0]
    whole = jax.vmap(mix)(micro, jnp.arange(accumulate))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole)

  def run(own, average, rows, mean, sharing):
    rows = rows._replace(batch=seen(rows))
    return mend(own, average, rows, mean, sharing)

  return run
