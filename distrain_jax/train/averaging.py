"""What the trainer tells PAPA: when members average, and how it is mended."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from distrain_jax import models, soups
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
    count: records of the training data; 0: unknown.
    members: how many.
    mixed: (batch, key) -> what a member's loss sees in their place; None: they.

  Raises:
    ValueError: if nothing can be repaired, or the run is over before members
      average.
  """
  chosen: dict[str, Any] = {}
  if _replaced(c) and c.method.every is None:
    chosen["every"] = _five_epochs(c, count, members)
  if c.population.repair:
    chosen["repair"] = _repairer(model, example, mixed)
  return chosen


def _replaced(c: ConfigDict) -> bool:
  return c.method.name == "papa" and c.method.variant in REPLACED


def _five_epochs(c: ConfigDict, count: int, members: int) -> int:
  """Of a member, in steps."""
  if not count:
    raise ValueError(
      f"config.method.every is not set: members average every {EPOCHS} epochs, "
      f"but config.data.name={c.data.name!r} is not there to count its rows. "
      "Set it, in steps: --config.method.every=1000."
    )
  passes = 1 if c.population.same_order else members  # over the data, at once
  steps = max(EPOCHS * count * passes // c.batch_size, 1)
  if steps > c.steps:
    raise ValueError(
      f"config.method.every is not set: members average every {EPOCHS} epochs "
      f"of {count} rows, {steps} steps, and config.steps={c.steps} ends before. "
      f"Set it, in steps, e.g. --config.method.every={max(c.steps // 4, 1)}, or "
      f"--config.steps={steps} or more."
    )
  return steps


def _repairer(model, example, mixed) -> Repair:
  """Of what a member's loss sees: its rows as it mixes them."""
  name, x = next(iter(example.items()))
  try:
    mend = soups.repairer(model, models.zoo.abstract(model, x), x, inputs=name)
  except ValueError as e:
    raise ValueError(
      f"config.population.repair=True: {e} Set --config.population.repair=False."
    ) from e
  if mixed is None:
    return mend

  def run(own, average, rows, mean, sharing):
    batch, key = mixed(rows.batch, rows.key)
    rows = rows._replace(batch=batch, key=key)
    return mend(own, average, rows, mean, sharing)

  return run
