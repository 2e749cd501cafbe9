"""A config's optimizer as an optax transform; all of them elementwise."""

import jax
import optax
from ml_collections import ConfigDict


def schedule(c: ConfigDict, steps: int) -> optax.Schedule:
  """Linear warm-up from 0, then constant, linear or cosine decay.

  Args:
    c: `config.optimizer`.
    steps: of the whole run, warm-up included.
  """
  peak, warmup = c.learning_rate, c.warmup_steps
  decay_steps = max(1, steps - warmup)
  final = peak * c.final_fraction
  if c.schedule == "constant":
    after = optax.constant_schedule(peak)
  elif c.schedule == "linear":
    after = optax.linear_schedule(peak, final, decay_steps)
  else:
    after = optax.cosine_decay_schedule(peak, decay_steps, c.final_fraction)
  if not warmup:
    return after
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def decay_mask(params):
  """Weight decay on what has two axes or more: no norms, no biases."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def build(c: ConfigDict, steps: int) -> optax.GradientTransformation:
  """The transform of `config.optimizer` for a run of that many steps."""
  rate = schedule(c, steps)
  decay = optax.add_decayed_weights(c.weight_decay, mask=decay_mask)
  if c.name == "adamw":
    return optax.adamw(
      rate,
      b1=c.b1,
      b2=c.b2,
      eps=c.eps,
      weight_decay=c.weight_decay,
      mask=decay_mask,
    )
  if c.name == "adam":
    core = optax.adam(rate, b1=c.b1, b2=c.b2, eps=c.eps)
  elif c.name == "momentum":
    core = optax.sgd(rate, momentum=c.momentum, nesterov=c.nesterov)
  else:
    core = optax.sgd(rate)
  return optax.chain(decay, core) if c.weight_decay else core
