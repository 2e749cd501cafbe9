"""What a config cannot be: refused by its field, before anything compiles."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from distrain_jax import methods
from distrain_jax.train import mup, pipelined, populations
from distrain_jax.train.config import options_of, suggest

OPTIMIZERS = ("adam", "adamw", "momentum", "sgd", *mup.NAMES)
SCHEDULES = ("constant", "cosine", "linear", "step")
DTYPES = ("bfloat16", "float16", "float32")
MORE_DTYPES = {"estimate_dtype": ("int8",)}  # option -> what else it takes
AT_LEAST_ONE = (
  "steps",
  "batch_size",
  "evaluation.batch_size",
  "log.every",
  "checkpoint.keep",
  "profile.steps",
)
AT_LEAST_ZERO = (
  "seed",
  "simulate",
  "checkpoint.every",
  "checkpoint.keep_best",
  "evaluation.every",
  "evaluation.recalibrate",
  "optimizer.learning_rate",
  "optimizer.warmup_steps",
  "optimizer.weight_decay",
  "profile.start",
)


def chosen_method_options(c: ConfigDict) -> dict[str, Any]:
  """The options that are set.

  Raises:
    ValueError: for an unknown method, or an option that it does not have.
  """
  name = c.method.name
  factory = methods.FACTORIES.get(name)
  if factory is None:
    raise ValueError(
      f"config.method.name={name!r} is no method. "
      + suggest(name, methods.FACTORIES)
    )
  valid = options_of(factory)
  chosen = {k: v for k, v in c.method.items() if k != "name" and v is not None}
  for option in chosen:
    if option not in valid:
      raise ValueError(
        f"config.method.{option}={chosen[option]!r}, but {name} has no such "
        f"option; it has {', '.join(valid)}. Leave it unset, or choose another "
        "config.method.name."
      )
    if option.endswith("dtype"):
      known = (*DTYPES, *MORE_DTYPES.get(option, ()))
      _choice(f"method.{option}", chosen[option], known)
  return chosen


def check_loss_options(c: ConfigDict, kind: str, factory: Any) -> None:
  """Refuses what the task's loss does not have.

  Args:
    c: `config.loss`.
    kind: the task's name, for the message.
    factory: whose keyword-only options count.
  """
  valid = options_of(factory)
  for option in c:
    if option not in valid:
      raise ValueError(
        f"config.loss.{option}: the loss of {kind} has no such option. "
        + (suggest(option, valid) if valid else "It has none.")
      )


def validate(c: ConfigDict, mesh_shape: Mapping[str, int], axis: str) -> None:
  """Refuses what cannot work.

  Args:
    c: the config as given.
    mesh_shape: axis -> size of the mesh as built.
    axis: the method's.

  Raises:
    ValueError: naming the field, its value, the rule and a way out.
  """
  _choice("optimizer.name", c.optimizer.name, OPTIMIZERS)
  _choice("optimizer.schedule", c.optimizer.schedule, SCHEDULES)
  if not all(0 < x < 1 for x in c.optimizer.drops):
    raise ValueError(
      f"config.optimizer.drops={c.optimizer.drops!r} are fractions of the run, "
      "each above 0 and below 1."
    )
  _choice("stats", c.stats, ("averaged", "local", "synchronised"))
  _choice("bad_step.action", c.bad_step.action, ("stop", "skip"))
  _choice("evaluation.split", c.evaluation.split, ("validation", "test"))
  for field in AT_LEAST_ONE:
    _at_least(field, _get(c, field), 1)
  for field in AT_LEAST_ZERO:
    _at_least(field, _get(c, field), 0)
  if c.optimizer.tile is not None:
    _at_least("optimizer.tile", c.optimizer.tile, 1)
  if axis not in mesh_shape:
    raise ValueError(
      f"config.mesh={dict(mesh_shape)} has no axis {axis!r}, which "
      f"config.method.name={c.method.name!r} works on. Name it in the config "
      f'file: config.mesh = ConfigDict({{"{axis}": -1}}).'
    )
  if c.simulate:
    _simulated(c, mesh_shape, axis)
  populations.check(c)
  mup.check(c)
  _batch(c, mesh_shape, axis)
  populations.check_members(c, mesh_shape, axis)
  populations.check_rows_over(c, mesh_shape, axis)
  for logical, target in c.sharding.items():
    if target not in mesh_shape or target == axis:
      raise ValueError(
        f"config.sharding.{logical}={target!r} must name an axis of "
        f"config.mesh={dict(mesh_shape)} other than the method's, {axis!r}."
      )


def _simulated(c, mesh_shape, axis):
  """Refuses what one device cannot simulate."""
  if jax.process_count() > 1:
    raise ValueError(
      f"config.simulate={c.simulate} puts all workers on one device of one "
      f"process, but there are {jax.process_count()} processes. Start one, or "
      "set --config.simulate=0."
    )
  own = {axis}
  if c.method.name in methods.PIPELINED:
    own.add(pipelined.REPLICAS)
  for name, size in mesh_shape.items():
    if name not in own and size > 1:
      raise ValueError(
        f"config.simulate={c.simulate}: only the workers of "
        f"config.method.name={c.method.name!r} can be simulated, on "
        f"{' and '.join(sorted(own))}; config.mesh.{name}={size} divides "
        "what one worker holds. Make it 1, or set --config.simulate=0."
      )
  if c.population.per_device != 1:
    raise ValueError(
      f"config.population.per_device={c.population.per_device}, but with "
      f"config.simulate={c.simulate} all members share a device. Leave it at 1."
    )


def _batch(c, mesh_shape, axis):
  n = populations.size(c, mesh_shape, axis)
  accumulate = c.method.get("accumulate") or 1
  halves = methods.HALVES.get(c.method.name, 1)
  shares, sharing = n, f"{n} workers"
  if c.method.name in methods.PIPELINED:
    shares = pipelined.replicas(mesh_shape)
    sharing = f"{shares} pipelines"
  multiple = shares * halves * accumulate
  if c.batch_size % multiple:
    low = c.batch_size // multiple * multiple
    near = f"{low} or {low + multiple}" if low else f"{multiple}"
    of_halves = f"{halves} halves of a step of {c.method.name} times the "
    raise ValueError(
      f"config.batch_size={c.batch_size} is the global batch and must be a "
      f"multiple of the {of_halves if halves > 1 else ''}{sharing} of "
      f"config.mesh={dict(mesh_shape)} times "
      f"config.method.accumulate={accumulate}. Nearest: {near}, e.g. "
      f"--config.batch_size={low + multiple}."
    )
  if c.evaluation.batch_size % n:
    raise ValueError(
      f"config.evaluation.batch_size={c.evaluation.batch_size} must be a "
      f"multiple of the {n} workers of config.mesh={dict(mesh_shape)}, e.g. "
      f"--config.evaluation.batch_size={-(-c.evaluation.batch_size // n) * n}."
    )


def _choice(field, value, known):
  if value not in known:
    raise ValueError(f"config.{field}={value!r}. {suggest(value, known)}")


def _at_least(field, value, low):
  if value is None or value < low:
    raise ValueError(f"config.{field}={value!r} must be at least {low}.")


def _get(c, dotted):
  for part in dotted.split("."):
    c = c[part]
  return c
