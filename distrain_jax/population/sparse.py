"""Populations that exchange a few coordinates: what WASH and SPARTA share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distrain_jax.method import LossFn, Method, Params, StatefulLoss
from distrain_jax.population import members, rates
from distrain_jax.population.members import ALONE, Member, Options, Phase
from distrain_jax.whole import is_whole

# (step, from 0) -> the learning rate relative to its peak, in [0, 1].
Schedule = Callable[[Any], Any]
_COIN = 0x7FFFFFFF  # what the key of a tied exchange's chance is folded with


class Sparse(NamedTuple):
  """Which coordinates, and when."""

  rate: float
  layer_schedule: str
  equal_volume: bool
  depths: Any
  period: int
  stop_after: int | None
  tied: bool
  relative_rate: Schedule | None
  exclude: Sequence[str] = ()


def check(name: str, sparse: Sparse) -> None:
  """Raises ValueError, in the name of the factory, for what cannot be."""
  rates.check_rate(name, sparse.rate)
  rates.check_schedule(name, sparse.layer_schedule)
  rates.check_exclude(name, sparse.exclude)
  _check_whole(name, "period", sparse.period, 1, "steps between exchanges")
  if sparse.stop_after is not None:
    what = "the number of steps that may end with an exchange"
    _check_whole(name, "stop_after", sparse.stop_after, 0, what)
  check_tied(name, sparse.tied, sparse.relative_rate)


def check_tied(name: str, tied: bool, relative_rate: Schedule | None) -> None:
  if tied and not callable(relative_rate):
    raise ValueError(
      f"{name}: tied=True follows the learning rate, so it needs "
      "`relative_rate`: a function (step) -> rate relative to its peak, in "
      "[0, 1], such as "
      "lambda step: tx_schedule(step) / peak; got "
      f"{relative_rate!r}. Pass one, or tied=False."
    )


def population(
  name: str,
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  options: Options,
  sparse: Sparse,
  exchange: Callable[[Member, list[np.ndarray], jax.Array], Member],
  check_model: Callable[[Params], Any] | None = None,
) -> Method:
  """Such a population; without a conditional where every step is alike.

  Args:
    name, loss_fn, tx, options: as of `members.population`.
    sparse: checked here.
    exchange: (member, the rates of its leaves, key) -> member.
    check_model: as `check` of `members.population`, of one that exchanges.
  """
  check(name, sparse)
  phases, which = _phases(name, sparse, exchange)

  def early(params):
    rates_of(name, sparse, params)
    if check_model is not None and sparse.rate:
      check_model(params)

  return members.population(name, loss_fn, tx, options, phases, which, early)


def _phases(name: str, sparse: Sparse, exchange):
  """`(phases, which)` as `members.population` takes them."""
  if sparse.rate == 0:
    return (ALONE,), None

  def run(member: Member, step, key, rows):
    del step, rows
    return exchange(member, rates_of(name, sparse, member.params), key)

  moving = Phase(exchange=run)
  if sparse.period == 1 and sparse.stop_after is None and not sparse.tied:
    return (moving,), None

  def which(step, key):
    due = (step + 1) % sparse.period == 0
    if sparse.stop_after is not None:
      due &= step < sparse.stop_after
    if sparse.tied:
      # Fewer exchanges rather than smaller ones: less travels, and what
      # matters to learning is how much is moved, not how often.
      coin = jax.random.uniform(jax.random.fold_in(key, _COIN))
      due &= coin < sparse.relative_rate(step)
    return jnp.asarray(due, jnp.int32)

  return (ALONE, moving), which


def rates_of(name: str, sparse: Sparse, params) -> list[np.ndarray]:
  """Of each leaf; 0 for those that are not floating: they are not trained."""
  depths = sparse.depths
  found = rates.layer_rates(
    name,
    params,
    rates.leaf_depths(params) if depths is None else depths,
    rate=sparse.rate,
    layer_schedule=sparse.layer_schedule,
    equal_volume=sparse.equal_volume,
    exclude=sparse.exclude,
  )
  floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  return [
    rate if floating(x) else np.zeros_like(rate)
    for x, rate in zip(jax.tree.leaves(params), found)
  ]


def _check_whole(name, option, value, least, what) -> None:
  if not is_whole(value, least):
    raise ValueError(
      f"{name}: `{option}` is {what}, a whole number from {least}; got "
      f"{value!r}."
    )
