"""DART: one model, then branches that part, meet in their average, and part.

Jain, Addepalli, Sahu, Dey and Babu, "DART: Diversify-Aggregate-Repeat Training
Improves Generalization of Neural Networks", 2023,
https://arxiv.org/abs/2302.14685.

The branches differ in augmentation or domain: see `data.mixing`.
"""

from numbers import Real

import jax
import jax.numpy as jnp
import optax

from distrain_jax import local_steps
from distrain_jax.method import LossFn, Method, StatefulLoss
from distrain_jax.population import averages, members
from distrain_jax.whole import is_whole

OPT_STATE = ("kept", "averaged", "reset")


def dart(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "population",
  joint_steps: int = 0,
  every: int = 600,
  weight: float = 1.0,
  opt_state: str = "kept",
  accumulate: int = 1,
  clip_norm: float | None = None,
  learning_rates: tuple[float, ...] | None = None,
  leave: tuple[int, ...] = (),
  inner: str | None = None,
) -> Method:
  """DART around any loss, optimizer and pytree.

  First the members are one model on all their rows (gradients are averaged);
  then each trains alone, and every so many steps they take their average.

  Args:
    loss_fn, tx, axis, accumulate, clip_norm, learning_rates, leave, inner: as
      of `wash`. In the joint phase clipping is of the averaged gradient.
    joint_steps: of the first phase; the paper's is half of the run. With
      different initial models it does not make them one.
    every: steps that members train apart before an average; the authors' code
      has 600 to 1000, the paper about 40 epochs.
    weight: of the average, in what a member goes on from; 1: it is the average
      (https://arxiv.org/abs/2302.14685, step 3), below 1 it keeps 1 - weight
      of itself.
    opt_state: at an average, "kept" by each member as in the authors' code,
      "averaged", or "reset" to what it was at the start; of the last two its
      floating leaves, since counts go on.

  Returns:
    A `Method`; its `params` is the members' average. Metrics as of `wash`.

  Raises:
    ValueError: if an option is out of range.
  """
  options = members.Options(
    axis, accumulate, clip_norm, learning_rates, leave, inner
  )
  _check(joint_steps, every, weight, opt_state)
  axes = options.axes

  def aggregate(member: members.Member, step, key, rows):
    del step, key, rows
    mine = (member.params, member.model_state)
    more = (member.opt_state,) if opt_state == "averaged" else ()
    means = local_steps.mean((*mine, *more), axes)
    blend = lambda w, m: averages.mix(w, m, weight)
    member = averages.with_model(member, jax.tree.map(blend, mine, means[:2]))
    if opt_state == "averaged":
      member = member._replace(opt_state=means[2])
    if opt_state == "reset":
      fresh = tx.init(member.params)
      member = member._replace(
        opt_state=jax.tree.map(_reset, member.opt_state, fresh)
      )
    return member

  def which(step, key):
    del key
    apart = step + 1 - joint_steps
    due = (apart % every == 0) & (apart > 0)
    return jnp.where(apart <= 0, 2, jnp.where(due, 1, 0))

  joint = members.Phase(reduce=lambda grads: local_steps.mean(grads, axes))
  phases = [members.ALONE, members.Phase(exchange=aggregate)]
  if joint_steps:
    phases.append(joint)
  return members.population("dart", loss_fn, tx, options, phases, which)


def _reset(old, new):
  """What is counted goes on, as the schedule of a learning rate must."""
  return new if jnp.issubdtype(new.dtype, jnp.floating) else old


def _check(joint_steps, every, weight, opt_state) -> None:
  for option, value, least in (
    ("joint_steps", joint_steps, 0),
    ("every", every, 1),
  ):
    if not is_whole(value, least):
      raise ValueError(
        f"dart: `{option}` is a number of steps, at least {least}; got "
        f"{value!r}."
      )
  if not isinstance(weight, Real) or not 0 < weight <= 1:
    raise ValueError(
      "dart: `weight` is that of the average, above 0 and at most 1; got "
      f"{weight!r}."
    )
  if opt_state not in OPT_STATE:
    raise ValueError(
      f"dart: `opt_state` is one of {', '.join(OPT_STATE)}; got {opt_state!r}."
    )
