"""What a config says of a population: how its members differ."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from distrain_jax import data, methods
from distrain_jax.data import mixing
from distrain_jax.method import all_workers
from distrain_jax.population import members
from distrain_jax.train import averaging, optimizers
from distrain_jax.train import config as configs
from distrain_jax.whole import is_whole

INNER = "member"  # the axis of members that share a device
MIXING = ("mixup", "cutmix", "smoothing", "erasing")


def is_population(c: ConfigDict) -> bool:
  return c.method.name in methods.POPULATIONS


def check(c: ConfigDict) -> None:
  """Refuses settings of a population where there is none.

  Raises:
    ValueError: naming the field, its value, the rule and a way out.
  """
  if not is_population(c):
    fresh = configs.default_config().population
    for field, value in c.population.items():
      if value != fresh[field]:
        raise ValueError(
          f"config.population.{field}={value!r}, but the workers of "
          f"config.method.name={c.method.name!r} are no population. Leave it at "
          f"{fresh[field]!r}, or choose {', '.join(methods.POPULATIONS)}."
        )
    return
  if c.method.name == "dart" and start_apart(c):
    raise ValueError(
      "config.method.name='dart' trains one model at first, and averages members "
      "that were one. Set --config.population.same_init=True."
    )
  averaging.check(c)
  each = c.population.per_device
  if not is_whole(each, 1):
    raise ValueError(
      f"config.population.per_device={each!r} is how many members share a "
      "device, at least 1."
    )


def check_members(
  c: ConfigDict, mesh_shape: Mapping[str, int], axis: str
) -> None:
  """Refuses what members of so many numbers cannot have; as `validate`."""
  if not is_population(c):
    return
  for field in MIXING:
    if not all(isinstance(x, Real) for x in c.population[field]):
      raise ValueError(
        f"config.population.{field}={c.population[field]!r} are numbers, one a "
        "member, one for all, or () for none."
      )
  options = members.Options(
    axis,
    learning_rates=c.method.learning_rates,
    leave=c.method.leave or (),
  )
  members.check_options(c.method.name, options)
  members.check_size(c.method.name, options, size(c, mesh_shape, axis))


def for_reading(c: ConfigDict) -> ConfigDict:
  """A copy for who only reads its run, on a mesh of another size.

  Without what is of members by their numbers, or of steps to come.
  """
  c = c.copy_and_resolve_references()
  c.population.per_device, c.simulate = 1, 0
  if is_population(c):
    fresh = configs.default_config()
    c.method.leave = c.method.learning_rates = None
    for field in (*MIXING, "repair"):
      c.population[field] = fresh.population[field]
  return c


def check_rows_over(
  c: ConfigDict, mesh_shape: Mapping[str, int], axis: str
) -> None:
  """Refuses what cannot divide a member's rows.

  Args:
    c: the config.
    mesh_shape: axis -> size of the mesh as built.
    axis: the method's.

  Raises:
    ValueError: naming the field, its value, the rule and a way out.
  """
  over = c.population.rows_over
  others = [a for a in mesh_shape if a != axis]
  if len(set(over)) < len(over) or not set(over) <= set(others):
    raise ValueError(
      f"config.population.rows_over={over!r} are the axes of config.mesh="
      f"{dict(mesh_shape)} that divide a member's rows, each once, beside the "
      f"members' own, {axis!r}: a tuple of {tuple(others)}, or () for none."
    )
  parts = math.prod(mesh_shape[name] for name in over)
  rows = c.batch_size // size(c, mesh_shape, axis)
  if rows % parts:
    raise ValueError(
      f"config.population.rows_over={over!r} cuts a member's {rows} rows of "
      f"config.batch_size={c.batch_size} into {parts} unequal parts. Make it a "
      f"multiple of {parts * size(c, mesh_shape, axis)}, or set "
      "--config.population.rows_over='()'."
    )


def size(c: ConfigDict, mesh_shape: Mapping[str, int], axis: str) -> int:
  """How many workers share a batch's rows: members, for a population."""
  return mesh_shape[axis] * (c.population.per_device if is_population(c) else 1)


def start_apart(c: ConfigDict) -> bool:
  """Whether members start from models of their own."""
  alike = c.population.same_init or c.initial_params
  return is_population(c) and not alike


def options(
  c: ConfigDict,
  factory: Any,
  model: nn.Module,
  example: Mapping[str, jax.ShapeDtypeStruct],
  info: data.Info,
  axis: str,
  numbers: Sequence[int],
) -> dict[str, Any]:
  """What the trainer itself passes to a population's factory.

  Args:
    c: the config.
    factory: its method's.
    model: that members train.
    example: a row of a batch.
    info: of the training data.
    axis, numbers: as for `loss`.

  Raises:
    ValueError: as `averaging.options`.
  """
  chosen: dict[str, Any] = {}
  if configs.takes(factory, "relative_rate"):
    chosen["relative_rate"] = optimizers.relative(c.optimizer, c.steps)
  chosen["inner"] = _inner(c)
  if c.method.name == "papa":
    settings = _settings_of(c, info.num_classes, numbers)
    axes = all_workers(axis, _inner(c))
    mixed = None
    if settings:
      mixed = mixing.mixer(settings, info.num_classes, axes)
    chosen |= averaging.options(
      c, model, example, info.count, len(numbers), mixed
    )
  return chosen


def numbers(c: ConfigDict, count: int) -> list[int]:
  """Those of so many members; see `leave` of `wash`."""
  return members.numbers(count, c.method.leave or ())


def loss(
  c: ConfigDict,
  loss_fn: Any,
  classes: int | None,
  axis: str,
  numbers: Sequence[int],
) -> Any:
  """The loss with each member's mixing of images, if there is any.

  Args:
    c: the config.
    loss_fn: without.
    classes: of the images; None: the data has none.
    axis: the method's.
    numbers: of the members, in order.

  Raises:
    ValueError: for settings of another kind of data, or that cannot be.
  """
  settings = _settings_of(c, classes, numbers)
  if not settings:
    return loss_fn
  axes = all_workers(axis, _inner(c))
  return mixing.mixing_loss(loss_fn, settings, classes, axes)


def init(
  init_one: Callable[[jax.Array], Any], numbers: Sequence[int]
) -> Callable[[jax.Array], Any]:
  """(key) -> the models of members of these numbers, on a leading axis."""

  def init_all(key):
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.asarray(numbers))
    return jax.vmap(init_one)(keys)

  return init_all


def stacked(shardings: Any, mesh: Mesh, axis: str) -> Any:
  """Shardings of models that have a leading axis of members."""
  one = lambda s: NamedSharding(mesh, P(axis, *s.spec))
  return jax.tree.map(one, shardings)


def _inner(c: ConfigDict) -> str | None:
  return INNER if c.population.per_device > 1 else None


def _settings_of(
  c: ConfigDict, classes: int | None, numbers: Sequence[int]
) -> list[mixing.Mixing]:
  """As `_settings`, of members of these numbers."""
  settings = _settings(c, classes)
  if 1 < len(settings) <= max(numbers):
    raise ValueError(
      f"config.population has mixing settings for {len(settings)} members, but "
      f"the last one has the number {max(numbers)}. Give one for each number "
      "from 0, or one for all."
    )
  return [settings[n] for n in numbers] if len(settings) > 1 else settings


def _settings(c: ConfigDict, classes: int | None) -> list[mixing.Mixing]:
  """Of each member, as far as they go; none where nothing is mixed."""
  given = {name: tuple(c.population[name]) for name in MIXING}
  count = max(map(len, given.values()))
  if not count:
    return []
  if classes is None:
    used = ", ".join(name for name, values in given.items() if values)
    raise ValueError(
      f"config.population.{used}: mixing is of images and their labels, and "
      f"config.data.name={c.data.name!r} has none. Set it to ()."
    )
  for name, values in given.items():
    if len(values) not in (0, 1, count):
      raise ValueError(
        f"config.population.{name}={values!r} has {len(values)} values, others "
        f"have {count}. Give one a member, one for all, or () for none."
      )
  of = lambda name, n: (given[name] * count or (0.0,) * count)[n]
  return [
    mixing.Mixing(**{name: float(of(name, n)) for name in MIXING})
    for n in range(count)
  ]
