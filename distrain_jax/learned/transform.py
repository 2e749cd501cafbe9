"""muLO: a learned optimizer as an optax transform.

Thérien, Joseph, Knyazev, Oyallon, Rish and Belilovsky, "μLO: Compute-Efficient
Meta-Generalization of Learned Optimizers", 2024,
https://arxiv.org/abs/2406.00153.

A small network, the same for all elements of all parameters, reads 39 numbers
an element and says how far it moves. Under muP its step on a hidden kernel is
divided by the fan in, and what was learned on narrow networks holds on wide
ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from distrain_jax.learned import matching, storage
from distrain_jax.learned.step import STEP_MULT, Rule, mulo_init, mulo_step
from distrain_jax.learned.theta import Theta, check_theta

IMPLEMENTATIONS = ("tiled", "reference", "pallas")


def _check(name: str, rule: Rule) -> None:
  for field in ("step_mult", "exp_mult", "feature_eps", "tile"):
    value = getattr(rule, field)
    if isinstance(value, (int, float)) and not value > 0:
      raise ValueError(f"{name}: `{field}` is above 0; got {value!r}.")
  if rule.implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{name}: `implementation` is one of {', '.join(IMPLEMENTATIONS)}; got "
      f"{rule.implementation!r}."
    )
  if rule.precision not in ("default", "high", "highest"):
    raise ValueError(
      f"{name}: `precision`, of the matrix products, is default, high or "
      f"highest; got {rule.precision!r}."
    )
  if rule.update_norm not in (None, "rms"):
    raise ValueError(
      f"{name}: `update_norm` is None or rms; got {rule.update_norm!r}."
    )
  if rule.eps_scaling not in (None, "fan_in"):
    raise ValueError(
      f"{name}: `eps_scaling` is None or fan_in; got {rule.eps_scaling!r}."
    )
  dtype = rule.accumulator_dtype
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f"{name}: `accumulator_dtype` is a floating dtype; got {dtype!r}."
    )


def scale_by_mulo(
  theta: Theta | None = None,
  *,
  mup: Any = None,
  step_mult: float | None = None,
  exp_mult: float = 0.001,
  feature_eps: float = 1e-5,
  nan_to_num: bool = True,
  accumulator_dtype: Any = None,
  stacked: Any = None,
  implementation: str = "tiled",
  precision: str = "highest",
  tile: int | None = None,
  update_norm: str | None = None,
  eps_scaling: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  """The learned rule without sign, learning rate and weight decay.

  multiplier * step_mult * d * exp(exp_mult * mag), where (d, mag) are what the
  network says of an element.

  Args:
    theta: as for `mulo`.
    mup: as for `mulo`.
    step_mult: as for `mulo`.
    exp_mult: as for `mulo`.
    feature_eps: as for `mulo`.
    nan_to_num: as for `mulo`.
    accumulator_dtype: as for `mulo`.
    stacked: as for `mulo`.
    implementation: as for `mulo`.
    precision: as for `mulo`.
    tile: as for `mulo`.
    update_norm: as for `mulo`.
    eps_scaling: as for `mulo`.

  Returns:
    A transform whose `update` needs `params` and ignores extra arguments.

  Raises:
    ValueError: as for `mulo`.
  """
  return _transform("scale_by_mulo", theta, mup, stacked, step_mult)(
    exp_mult=exp_mult,
    feature_eps=feature_eps,
    nan_to_num=nan_to_num,
    accumulator_dtype=accumulator_dtype,
    implementation=implementation,
    precision=precision,
    tile=tile,
    update_norm=update_norm,
    eps_scaling=eps_scaling,
  )


def _transform(name, theta, mup, stacked, step_mult) -> Callable:
  if theta is None:
    theta, made_with = storage.shipped(name, mup is not None)
    if step_mult is None:
      step_mult = made_with.options["step_mult"]
  check_theta(name, theta)
  step_mult = STEP_MULT if step_mult is None else step_mult

  def build(**options) -> optax.GradientTransformationExtraArgs:
    rule = Rule(step_mult=step_mult, **options)
    _check(name, rule)

    given = functools.partial(matching.read_options, name, mup, stacked)

    def init(params):
      found = given(params)
      matching.check_stacked(name, found["stacked"], params)
      if rule.eps_scaling:
        matching.check_positive(name, found["multipliers"])
      return mulo_init(params, rule, found["stacked"])

    def update(updates, state, params=None, **extra):
      del extra  # loss values and the like, which the rule does not read
      if params is None:
        raise ValueError(
          f"{name}: the learned rule reads the parameters. Call "
          "tx.update(grads, state, params)."
        )
      return mulo_step(
        theta, updates, state, params, rule=rule, **given(params)
      )

    return optax.GradientTransformationExtraArgs(init, update)

  return build


def mulo(
  theta: Theta | None = None,
  *,
  mup: Any = None,
  learning_rate: optax.ScalarOrSchedule = 1.0,
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """muLO, a learned optimizer that holds at other widths than it was made at.

  It sees whole parameters, one at a time: so inside ddp, local_sgd, populations
  and zero1(..., shard="leaves"); pipelines show each block its own ({block:
  mulo(mup=mup[block])}); what cuts parameters into pieces refuses it.

  Args:
    theta: the learned numbers, a dict as `init_theta` and `load_theta` give;
      None: those shipped in the package, muP's or, where mup is None, their
      twin that was made without muP.
    mup: muP's multiplier of each parameter's step: a tree of numbers or of
      `MuInfo` like the parameters (`mup_multipliers`, `mup_info`), or one
      number for all; or a function `params -> tree`, for parameters that are
      not there yet. None: 1 everywhere, the standard parametrisation.
    learning_rate: of the whole step; a number or a schedule.
    weight_decay: parameters shrink by learning_rate * weight_decay a step.
    **options: of `scale_by_mulo`. step_mult, the scale of a step (None: what
      shipped weights were made with, 0.01 for others); exp_mult, of the
      network's second output (0.001); feature_eps, under the root that
      normalises features (1e-5); nan_to_num, whether elements of a gradient
      that are not finite count as 0 (True); accumulator_dtype of the averages
      (None: float32); stacked, leading axes of each parameter that hold layers,
      each of which is a parameter of its own to the rule (a number or a tree;
      None: what mup says, or 0); implementation, "tiled", "reference" or
      "pallas", the same to rounding (tiled: far less memory and time; pallas:
      tiled, with a kernel for matrices where it is compiled for a TPU, or for
      a GPU from Hopper on); precision of the matrix products ("highest"); tile,
      elements computed at once (None: 4096 on a CPU, 2**20 on accelerators);
      update_norm, "rms"
      for a step that is divided by its own root mean square, layer by layer, so
      that step_mult is its size (None: it is not; for weights that were
      meta-trained so);
      eps_scaling, "fan_in" for epsilons that follow a hidden matrix's fan in,
      1 / its multiplier, which keeps features alive on wide networks (see
      `step.seen`; None: the paper's, the same at every width; for weights that
      were meta-trained so, and multipliers above 0).

  Returns:
    A transform: `update(grads, state, params)` gives what to add to params.

  Raises:
    ValueError: a theta of another schema, an option out of its range; from
      `init` and `update`, a tree that is not like the parameters; from
      `update`, params that are None.
  """
  parts = [scale_by_mulo(theta, mup=mup, **options)]
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay))
  parts.append(optax.scale_by_learning_rate(learning_rate))
  return optax.chain(*parts)
