"""An ensemble: members that train alone and never speak of it."""

import optax

from distrain_jax.method import LossFn, Method, StatefulLoss
from distrain_jax.population import members


def ensemble(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "population",
  accumulate: int = 1,
  clip_norm: float | None = None,
  learning_rates: tuple[float, ...] | None = None,
  leave: tuple[int, ...] = (),
  inner: str | None = None,
) -> Method:
  """Independent training of a population; only the metrics travel.

  The baseline of `wash`, `papa` and their neighbours. Arguments and errors as
  of `wash`.

  Returns:
    A `Method`; its `params` is the members' average, which is of little use
    if they started from different models. Their own scores, and those of
    their mean prediction, come with config.evaluation.members.
  """
  options = members.Options(
    axis, accumulate, clip_norm, learning_rates, leave, inner
  )
  return members.population("ensemble", loss_fn, tx, options)
