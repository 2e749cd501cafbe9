"""PAPA: members that are pulled towards their average, or replaced by it.

Jolicoeur-Martineau, Gervais, Fatras, Zhang and Lacoste-Julien, "PopulAtion
Parameter Averaging (PAPA)", 2023, https://arxiv.org/abs/2304.03094.

Pulled are the weights and the running statistics; optimizers' states stay. An
average that members become can be corrected at once, as the paper does by
REPAIR (https://arxiv.org/abs/2211.08403), so that its units vary as much as the
members' did.
"""

from numbers import Real

import jax
import jax.numpy as jnp
import optax

from distrain_jax import local_steps, variables
from distrain_jax.method import LossFn, Method, StatefulLoss
from distrain_jax.population import averages, members, sparse, swapping
from distrain_jax.whole import is_whole

VARIANTS = ("pull", "all", "pair")
PULL_EVERY = 10  # steps, the paper's


def papa(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "population",
  variant: str = "pull",
  every: int | None = None,
  alpha: float = 0.99,
  tied: bool = True,
  relative_rate: sparse.Schedule | None = None,
  epoch_steps: int | None = None,
  stop_after: int | None = None,
  repair: averages.Repair | None = None,
  accumulate: int = 1,
  clip_norm: float | None = None,
  learning_rates: tuple[float, ...] | None = None,
  leave: tuple[int, ...] = (),
  inner: str | None = None,
) -> Method:
  """PAPA, PAPA-all or PAPA-2 around any loss, optimizer and pytree.

  Args:
    loss_fn, tx, axis, accumulate, clip_norm, learning_rates, leave, inner: as
      of `wash`.
    variant: "pull": every member w becomes (1 - a) w + a m, with the average
      m. "all" (PAPA-all): it becomes m. "pair" (PAPA-2): it becomes the mean
      of two random members, different pairs for different members as far as
      there are so many; all members are gathered on each for it.
    every: steps from one exchange to the next. None: the paper's 10 for "pull";
      the others need a number, the paper's 5 epochs (1 of ImageNet): so often
      the data's rows over those that a member sees in a step. In a config None
      is these 5 epochs for them.
    alpha: a is 1 - alpha at the peak of the learning rate; for "pull". So small
      a pull is lost on bfloat16 parameters; see `averages.mix`.
    tied: a follows the learning rate, a = (1 - alpha) relative_rate(step + 1):
      that of the step after, as the authors' code has it. For "pull".
    relative_rate: (step) -> learning rate relative to its peak, in [0, 1].
    epoch_steps: the first step, and every `every`-th after it, of each epoch of
      so many steps ends with an exchange, as in the authors' code. None: those
      whose number, from 1, `every` divides.
    stop_after: exchanges end with this many steps, so that members of "all" and
      "pair" can train apart at the end; None: never.
    repair: what corrects an average that a member becomes, right after it did:
      `soups.repairer(module, ...)`, or see `averages.Repair` to write one. Of
      "pair" the statistics that count are those of the two parents. None:
      nothing, an average as it is.

  Returns:
    A `Method`; its `params` is the members' average. Metrics as of `wash`.

  Raises:
    ValueError: if an option is out of range or missing, tied without a
      relative_rate, or there is something to `repair` and no average to become.
  """
  options = members.Options(
    axis, accumulate, clip_norm, learning_rates, leave, inner
  )
  _check(variant, every, alpha, epoch_steps, stop_after, repair)
  if variant == "pull":
    sparse.check_tied("papa", tied, relative_rate)
  every = PULL_EVERY if every is None else every
  axes = options.axes

  def pull(member: members.Member, step, key, rows):
    del key, rows
    weight = 1 - alpha
    if tied:
      weight = weight * relative_rate(step + 1)
    mine = (member.params, member.model_state)
    mean = local_steps.mean(mine, axes)
    return averages.with_model(
      member, jax.tree.map(lambda w, m: averages.mix(w, m, weight), mine, mean)
    )

  def replaced(member: members.Member, rows, mean, sharing):
    mine = (member.params, member.model_state)
    new = mean(mine)
    if repair is not None:
      own, average = (variables.own(loss_fn, *x) for x in (mine, new))
      new = variables.split(loss_fn, repair(own, average, rows, mean, sharing))
    return averages.with_model(member, new)

  def everything(member: members.Member, step, key, rows):
    del step, key
    return replaced(member, rows, lambda x: local_steps.mean(x, axes), axes)

  def pair(member: members.Member, step, key, rows):
    del step
    first, second = _pair(key, axes)

    def one(x):
      every = swapping.gather(x, axes)
      return averages.mix(every[first], every[second], 0.5)

    return replaced(member, rows, lambda x: jax.tree.map(one, x), None)

  exchange = {"pull": pull, "all": everything, "pair": pair}[variant]

  def which(step, key):
    del key
    due = (step + 1) % every == 0
    if epoch_steps is not None:
      due = step % epoch_steps % every == 0
    if stop_after is not None:
      due &= step < stop_after
    return jnp.asarray(due, jnp.int32)

  if variant == "pull" and alpha == 1:  # to the bit, not to rounding
    return members.population("papa", loss_fn, tx, options)
  phases = (members.ALONE, members.Phase(exchange=exchange))
  return members.population("papa", loss_fn, tx, options, phases, which)


def _pair(key: jax.Array, axes) -> tuple[jax.Array, jax.Array]:
  """This member's parents: random pairs of members, each once if they last."""
  n, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  if n == 1:
    return me, me
  first, second = jnp.triu_indices(n, 1)  # all pairs
  order = swapping.permutation(key, len(first))
  mine = order[me % len(first)]
  return first[mine], second[mine]


def _check(variant, every, alpha, epoch_steps, stop_after, repair) -> None:
  if variant not in VARIANTS:
    raise ValueError(
      f"papa: `variant` is one of {', '.join(VARIANTS)}; got {variant!r}."
    )
  if every is None and variant != "pull":
    raise ValueError(
      f"papa: variant={variant!r} needs `every`, the number of steps from one "
      "exchange to the next; the paper's is that of five epochs: 5 * rows of "
      "the data // rows that a member sees in a step."
    )
  if every is not None and not is_whole(every, 1):
    raise ValueError(
      "papa: `every` is the number of steps from one exchange to the next, at "
      f"least 1; got {every!r}."
    )
  if repair is not None and variant == "pull":
    raise ValueError(
      "papa: `repair` corrects an average that a member becomes, but with "
      "variant='pull' it stays near itself. Use variant='all' or 'pair', or "
      "repair=None."
    )
  if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
    raise ValueError(
      "papa: `alpha` is what a member keeps of itself in a pull, in [0, 1] "
      f"(the paper's is 0.99); got {alpha!r}."
    )
  for option, value in (
    ("epoch_steps", epoch_steps),
    ("stop_after", stop_after),
  ):
    if value is not None and not is_whole(value, 1):
      raise ValueError(
        f"papa: `{option}` is a number of steps, at least 1, or None; got "
        f"{value!r}."
      )
