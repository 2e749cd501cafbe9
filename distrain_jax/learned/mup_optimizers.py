"""AdamW and SGD under muP, whose best rate does not move with the width.

Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466, table
8. With absolute multipliers (`mup_info`'s default) rates are larger than one is
used to: that of a hidden kernel is divided by its fan in.
"""

from typing import Any

import jax
import optax

from distrain_jax.learned import matching
from distrain_jax.learned.kinds import MuInfo


def scale_by_mup(mup: Any, rule: str = "unit") -> optax.GradientTransformation:
  """Multiplies updates by muP's multiplier of their parameter.

  Args:
    mup: a tree of `MuInfo` as `mup_info` gives it, or of numbers; or a
      function `params -> tree`.
    rule: "unit" for updates of unit size (Adam's, Lion's, a learned rule's),
      "gradient" for updates along the gradient (SGD's).

  Raises:
    ValueError: another rule; from `init` and `update`, numbers with the rule
      "gradient", or a tree that is not like the parameters.
  """
  if rule not in ("unit", "gradient"):
    raise ValueError(f"scale_by_mup: `rule` is unit or gradient; got {rule!r}.")
  is_info = lambda x: isinstance(x, MuInfo)
  field = "multiplier" if rule == "unit" else "sgd_multiplier"

  def multipliers(params):
    own = mup(params) if callable(mup) else mup
    if rule == "gradient" and not all(map(is_info, jax.tree.leaves(own))):
      raise ValueError(
        "scale_by_mup: rule='gradient' needs each parameter's kind and sizes: "
        "pass mup_info(params, ...), not numbers."
      )
    read = lambda x: getattr(x, field) if is_info(x) else x
    tree = jax.tree.map(read, own)
    return matching.match("scale_by_mup: mup", tree, params)

  def init(params):
    multipliers(params)  # refuses now what would fail in a step
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scale = lambda u, m: (m * u).astype(u.dtype)
    return jax.tree.map(scale, updates, multipliers(updates)), state

  return optax.GradientTransformation(init, update)


def mup_adamw(
  learning_rate: optax.ScalarOrSchedule,
  mup: Any,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW under muP.

  Weight decay is not multiplied: learning_rate * weight_decay a step at every
  width.

  Args:
    learning_rate: a number or a schedule.
    mup: as for `scale_by_mup`.
    b1: rate of the first moment's average.
    b2: rate of the second moment's average.
    eps: added to the root of the second moment.
    weight_decay: see above.
    mask: of what decays, as for `optax.adamw`.
  """
  return optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    scale_by_mup(mup),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def mup_sgd(
  learning_rate: optax.ScalarOrSchedule,
  mup: Any,
  *,
  momentum: float | None = None,
  nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """SGD under muP: first and last layers' steps grow with the width.

  Args:
    learning_rate: a number or a schedule.
    mup: a tree of `MuInfo`.
    momentum: as for `optax.sgd`.
    nesterov: as for `optax.sgd`.
  """
  parts = [scale_by_mup(mup, "gradient")]
  if momentum is not None:
    parts.append(optax.trace(momentum, nesterov))
  parts.append(optax.scale_by_learning_rate(learning_rate))
  return optax.chain(*parts)
