"""VeLO: a learned optimizer that knows how long training will be.

Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
https://arxiv.org/abs/2211.09760. Its form under muP: Thérien et al., 2024,
https://arxiv.org/abs/2406.00153.

An LSTM follows every tensor, the loss, and how much of the training is over,
and makes for each tensor the small network that moves its elements. The methods
of this package do not pass on the loss: it is for training loops of one's own.
"""

import functools
import numbers
from typing import Any

import jax.numpy as jnp
import optax

from distrain_jax.learned import matching
from distrain_jax.learned.theta import Theta
from distrain_jax.learned.velo.step import VeloRule, velo_init, velo_step
from distrain_jax.learned.velo.theta import check_velo_theta

ABOVE_ZERO = ("step_mult", "exp_mult", "interp_mult", "feature_eps", "tile")


def check_rule(name: str, rule: VeloRule) -> None:
  """Refuses constants out of range.

  Args:
    name: of the caller, for the message.
    rule: whose values may be tracers, which pass.

  Raises:
    ValueError: naming the field.
  """
  steps = rule.num_steps
  known = isinstance(steps, (numbers.Number, str)) or steps is None
  if known and (not isinstance(steps, numbers.Integral) or steps < 1):
    raise ValueError(
      f"{name}: `num_steps` is how many updates the whole training makes, a "
      f"whole number of 1 or more; got {steps!r}."
    )
  for field in ABOVE_ZERO:
    value = getattr(rule, field)
    if isinstance(value, numbers.Number) and not value > 0:
      raise ValueError(f"{name}: `{field}` is above 0; got {value!r}.")
  if rule.precision not in ("default", "high", "highest"):
    raise ValueError(
      f"{name}: `precision`, of the matrix products, is default, high or "
      f"highest; got {rule.precision!r}."
    )
  dtype = rule.accumulator_dtype
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f"{name}: `accumulator_dtype` is a floating dtype; got {dtype!r}."
    )


def scale_by_velo(
  theta: Theta | None = None,
  *,
  num_steps: int,
  mup: Any = None,
  step_mult: float = 0.001,
  exp_mult: float = 0.001,
  interp_mult: float = 100.0,
  param_scale_mult: bool | None = None,
  feature_eps: float = 1e-5,
  nan_to_num: bool = True,
  accumulator_dtype: Any = None,
  stacked: Any = None,
  precision: str = "highest",
  tile: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """VeLO's rule without sign, learning rate and weight decay.

  multiplier * step_mult * rate * d * exp(exp_mult * mag), by param_scale_mult
  times the root mean square of the tensor: what the LSTM says of a tensor is
  rate, what its network says of an element (d, mag).

  Args:
    theta: as for `velo`.
    num_steps: as for `velo`.
    mup: as for `velo`.
    step_mult: as for `velo`.
    exp_mult: as for `velo`.
    interp_mult: as for `velo`.
    param_scale_mult: as for `velo`.
    feature_eps: as for `velo`.
    nan_to_num: as for `velo`.
    accumulator_dtype: as for `velo`.
    stacked: as for `velo`.
    precision: as for `velo`.
    tile: as for `velo`.

  Returns:
    A transform whose `update` needs `params` and `value`, the loss, and ignores
    other extra arguments.

  Raises:
    ValueError: as for `velo`.
  """
  name = "scale_by_velo"
  if theta is None:
    raise ValueError(
      f"{name}: no weights of VeLO's are shipped. Pass theta=..., from "
      "load_theta(path), of a file that launch/meta_train.py with "
      "--config=configs/mulo/velo.py writes, or from init_velo_theta(key), "
      "which has learned nothing. The published weights come with the "
      "authors' learned_optimization; velo_theta_from_haiku reads their arrays."
    )
  lstm, _ = check_velo_theta(name, theta)
  rule = VeloRule(
    num_steps=num_steps,
    lstm=lstm,
    step_mult=step_mult,
    exp_mult=exp_mult,
    interp_mult=interp_mult,
    param_scale_mult=mup is None
    if param_scale_mult is None
    else param_scale_mult,
    feature_eps=feature_eps,
    nan_to_num=nan_to_num,
    accumulator_dtype=accumulator_dtype,
    precision=precision,
    tile=tile,
  )
  check_rule(name, rule)

  given = functools.partial(matching.read_options, name, mup, stacked)

  def init(params):
    found = given(params)
    matching.check_stacked(name, found["stacked"], params)
    return velo_init(params, rule, found["stacked"])

  def update(updates, state, params=None, *, value=None, **extra):
    del extra  # gradients by another name and the like
    if params is None or value is None:
      missing = [
        k for k, x in (("params", params), ("value", value)) if x is None
      ]
      raise ValueError(
        f"{name}: the learned rule reads the parameters and the loss; missing "
        f"is {' and '.join(missing)}. Call tx.update(grads, state, params, "
        "value=loss), in a training loop of your own: the methods of this "
        "package do not pass on the loss. A transform around this one must be "
        "built to pass on extra arguments, as optax.chain is."
      )
    more = given(params)
    return velo_step(
      theta, updates, state, params, value=value, rule=rule, **more
    )

  return optax.GradientTransformationExtraArgs(init, update)


def velo(
  theta: Theta | None = None,
  *,
  num_steps: int,
  mup: Any = None,
  learning_rate: optax.ScalarOrSchedule = 1.0,
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """VeLO, a learned optimizer with a schedule of its own.

  It is for training loops of one's own: its `update` needs the loss, which the
  methods of this package do not pass on.

  Args:
    theta: the learned numbers, a dict as `init_velo_theta`, `load_theta` and
      `velo_theta_from_haiku` give. None is refused: no weights are shipped.
    num_steps: updates of the whole training. VeLO reads how much of it is over;
      beyond its end it goes on as at 110 per cent.
    mup: muP's multiplier of each parameter's step: a tree of numbers or of
      `MuInfo` like the parameters (`mup_multipliers`, `mup_info`), or one
      number for all; or a function `params -> tree`. None: the standard
      parametrisation.
    learning_rate: of the whole step; a number or a schedule. VeLO is meant to
      be used with 1.
    weight_decay: parameters shrink by learning_rate * weight_decay a step.
    **options: of `scale_by_velo`; theta must be used with those that it was
      meta-trained with. step_mult, the scale of a step (0.001); exp_mult, of
      the network's second output (0.001); interp_mult, of the mixtures that the
      LSTM makes (100, the published weights'; the muP authors' small network
      has 1); param_scale_mult, whether a step is multiplied by the root mean
      square of its tensor (None: without mup, and not with it, where tensors
      that start at zero would stay there); feature_eps, under the root that
      normalises features (1e-5); nan_to_num, whether what is no number counts
      as 0 in a gradient, and a loss that is not finite as a large one (True);
      accumulator_dtype of the averages (None: float32); stacked, leading axes
      of each parameter that hold layers, each of which is a tensor of its own
      (a number or a tree; None: what mup says, or 0); precision of the matrix
      products ("highest"); tile, elements computed at once (None: 4096 on a
      CPU, 2**20 on accelerators).

  Returns:
    A transform: `update(grads, state, params, value=loss)` gives what to add to
    params. Its LSTM hears of all tensors at once: under `optax.masked`, of
    those that are not masked.

  Raises:
    ValueError: no theta or one of another schema, an option out of its range;
      from `init` and `update`, a tree that is not like the parameters; from
      `update`, params or value that are None, or a value that is not one
      number.
  """
  parts = [scale_by_velo(theta, num_steps=num_steps, mup=mup, **options)]
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay))
  parts.append(optax.scale_by_learning_rate(learning_rate))
  return optax.chain(*parts)
