"""SPARTA: members that average a few random coordinates after every step.

Beton, Howes, Cheema and Gensyn, "Improving the Efficiency of Distributed
Training using Sparse Parameter Averaging", 2025,
https://openreview.net/forum?id=stFPf3gzq1.

The nearest neighbour of WASH (https://arxiv.org/abs/2405.17517): at the same
coordinates, the mean in the place of a permutation. The members' average is
the same; their distance from it shrinks.
"""

import functools
from typing import Any

import optax

from distrain_jax.method import LossFn, Method, StatefulLoss
from distrain_jax.population import members, sparse, swapping


def sparta(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "population",
  rate: float = 0.005,
  layer_schedule: str = "constant",
  equal_volume: bool = False,
  depths: Any = None,
  exclude: tuple[str, ...] = (),
  period: int = 1,
  stop_after: int | None = None,
  tied: bool = False,
  relative_rate: sparse.Schedule | None = None,
  accumulate: int = 1,
  clip_norm: float | None = None,
  learning_rates: tuple[float, ...] | None = None,
  leave: tuple[int, ...] = (),
  inner: str | None = None,
) -> Method:
  """Sparse averaging; arguments and errors as of `wash`.

  Returns:
    A `Method`; its `params` is the members' average.
  """
  options = members.Options(
    axis, accumulate, clip_norm, learning_rates, leave, inner
  )
  chosen = sparse.Sparse(
    rate,
    layer_schedule,
    equal_volume,
    depths,
    period,
    stop_after,
    tied,
    relative_rate,
    exclude,
  )
  average = functools.partial(swapping.average_parts, axes=options.axes)

  def exchange(member: members.Member, rates, key):
    (params,) = swapping.exchange_chosen(
      [member.params], rates, key, average, options.axes
    )
    return member._replace(params=params)

  return sparse.population("sparta", loss_fn, tx, options, chosen, exchange)
