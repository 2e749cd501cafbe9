"""A config's optimizer as an optax transform; all but mulo are elementwise."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from distrain_jax.train import mup as parametrisation

DROP = 0.1  # what a step of the schedule "step" multiplies the rate by
# Logical axes that make no matrix of a vector: along the first, parameters of
# different layers are stacked; the second cuts a vector into heads.
NOT_COUNTED = {"layers", "head_dim"}


def schedule(c: ConfigDict, steps: int) -> optax.Schedule:
  """Linear warm-up from 0, then constant, step, linear or cosine decay.

  Args:
    c: `config.optimizer`.
    steps: of the whole run, warm-up included.
  """
  peak, warmup = c.learning_rate, c.warmup_steps
  decay_steps = max(1, steps - warmup)
  final = peak * c.final_fraction
  if c.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif c.schedule == "step":
    # Fractions of the whole run; the schedule starts after the warm-up.
    drops = {round(x * steps) - warmup: DROP for x in c.drops}
    after = optax.piecewise_constant_schedule(peak, drops)
  elif c.schedule == "linear":
    after = optax.linear_schedule(peak, final, decay_steps)
  else:
    after = optax.cosine_decay_schedule(peak, decay_steps, c.final_fraction)
  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def relative(c: ConfigDict, steps: int) -> optax.Schedule:
  """`schedule` over its peak: in [0, 1], for what follows the learning rate."""
  one = c.copy_and_resolve_references()
  one.learning_rate = 1.0
  return schedule(one, steps)


def decay_mask(names: Any) -> Any:
  """Weight decay on what has two axes or more: no norms, no biases.

  Args:
    names: the parameters' logical axis names, as `models.logical_names` gives
      them. A layer's bias has one axis, also where layers are stacked or it is
      cut into heads.

  Returns:
    A pytree of bools of the parameters' structure. It is made of the whole
    model's names, because a method may show the optimizer pieces of leaves.

  >>> decay_mask({"scale": ("layers", "embed"), "up": ("embed", "mlp")})
  {'scale': False, 'up': True}
  """
  decays = lambda axes: len(set(axes) - NOT_COUNTED) > 1
  is_names = lambda x: isinstance(x, tuple)
  return jax.tree.map(decays, names, is_leaf=is_names)


def build(
  c: ConfigDict, steps: int, names: Any = None, mup: Any = None
) -> optax.GradientTransformation:
  """The transform of `config.optimizer` for a run of that many steps.

  Args:
    c: `config.optimizer`.
    steps: of the whole run.
    names: the parameters' logical axis names, see `decay_mask`; None for a
      model without them, whose axes are counted.
    mup: what muP knows of the parameters, for optimizers that use it: see
      `mup.info`.

  Raises:
    ValueError, FileNotFoundError: as `mup.build`.
  """
  rate = schedule(c, steps)
  mask = _has_two_axes if names is None else decay_mask(names)
  decay = optax.add_decayed_weights(c.weight_decay, mask=mask)
  if c.name in parametrisation.NAMES:
    return parametrisation.build(c, rate, decay, mup)
  if c.name == "adamw":
    return optax.adamw(
      rate,
      b1=c.b1,
      b2=c.b2,
      eps=c.eps,
      weight_decay=c.weight_decay,
      mask=mask,
    )
  if c.name == "adam":
    core = optax.adam(rate, b1=c.b1, b2=c.b2, eps=c.eps)
  elif c.name == "momentum":
    core = optax.sgd(rate, momentum=c.momentum, nesterov=c.nesterov)
  else:
    core = optax.sgd(rate)
  return optax.chain(decay, core) if c.weight_decay else core


def _has_two_axes(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)
