"""A population's method: every member trains alone, then phases differ.

Letters in shapes: N members.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from distrain_jax import gradients, local_steps, spmd, variables
from distrain_jax.method import (
  LossFn,
  Method,
  Params,
  StatefulLoss,
  all_workers,
)
from distrain_jax.population import adopting
from distrain_jax.whole import is_whole

# The scope of all that is exchanged, by which a compiled program tells it.
SCOPE = "population_exchange"
# What the exchange's key is folded with: no member has this number.
_EXCHANGE = 0xFFFFFFFF


class PopulationState(NamedTuple):
  """One member's; `Method.specs` says which fields differ by member."""

  step: jax.Array  # (), int32, the same on every member
  number: jax.Array  # (), int32: stays a member's own when others leave
  params: Params  # this member's
  model_state: Any  # this member's; () for a loss without it
  opt_state: optax.OptState  # this member's


class Member(NamedTuple):
  """What an exchange may change."""

  params: Params
  model_state: Any
  opt_state: optax.OptState


class Rows(NamedTuple):
  """What a member saw in a step."""

  batch: Any  # its rows
  key: jax.Array  # its own: its loss's; micro-batch i's is fold_in(key, i)


class Phase(NamedTuple):
  """What a step does beside a member's own gradient and update."""

  # (gradients) -> gradients, before the update; None: a member's own.
  reduce: Callable[[Params], Params] | None = None
  # (member, step, key, rows) -> member, after the update; the key is the
  # step's, shared by all members. None: nothing.
  exchange: Callable[[Member, jax.Array, jax.Array, Rows], Member] | None = None


class Options(NamedTuple):
  """What every population takes; checked by `check_options`."""

  axis: str
  accumulate: int = 1
  clip_norm: float | None = None
  learning_rates: Sequence[float] | None = None
  leave: Sequence[int] = ()
  inner: str | None = None

  @property
  def axes(self) -> str | tuple[str, str]:
    """The name, or names, that all members are on."""
    return all_workers(self.axis, self.inner)


ALONE = Phase()


def check_options(name: str, options: Options) -> None:
  """Raises ValueError, in the name of the factory, for what cannot be."""
  gradients.check_accumulate(name, options.accumulate)
  gradients.check_clip_norm(name, options.clip_norm)
  for field in ("learning_rates", "leave"):
    value = getattr(options, field)
    if value is not None and not isinstance(value, Sequence):
      raise ValueError(
        f"{name}: `{field}` is a tuple of numbers, such as (1,); got {value!r}."
      )
  rates = options.learning_rates
  if rates is not None and not all(_is_factor(x) for x in rates):
    raise ValueError(
      f"{name}: `learning_rates` are factors of the members' updates, one a "
      f"member, each finite and above 0; got {rates!r}."
    )
  leave = list(options.leave)
  if not all(map(is_whole, leave)) or len(set(leave)) < len(leave):
    raise ValueError(
      f"{name}: `leave` are numbers of members, from 0, each once; got {options.leave!r}."
    )
  if options.inner is not None and options.inner == options.axis:
    raise ValueError(
      f"{name}: `inner` is a name of its own for the members that share a "
      f"device; got {options.inner!r}, which is `axis`."
    )


def population(
  name: str,
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  options: Options,
  phases: Sequence[Phase] = (ALONE,),
  which: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  check: Callable[[Params], Any] | None = None,
) -> Method:
  """A method whose members train alone but for what the phases add.

  Running statistics belong to a member, whatever `stateful(stats=...)` says
  of workers; `params` averages them with the weights.

  Args:
    name: the method's.
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`.
    tx: each member's own optimizer.
    options: checked here.
    phases: what steps do.
    which: (step, from 0, key) -> index of the step's phase; the key is the
      step's, shared by all members. None: the first, always.
    check: (params of one member) -> ignored; raises ValueError, before there is
      a step, for what the options cannot be of this model.

  Returns:
    A `Method` with `population`; its `params` is the uniform average.

  Raises:
    ValueError: if an option is out of range, or batch statistics are to be
      synchronised between members.
  """
  check_options(name, options)
  if isinstance(loss_fn, StatefulLoss):
    if loss_fn.stats == "synchronised":
      raise ValueError(
        f"{name}: stats='synchronised' would normalise a member by the others' "
        "rows. Use stateful(..., stats='local'); in a config, "
        "--config.stats=local."
      )
    loss_fn = loss_fn._replace(stats="local")
  axes = options.axes
  gradient = gradients.gradient_fn(loss_fn, options.accumulate)

  def init(key, model):
    del key  # nothing random: the caller draws each member's model
    check_size(name, options, jax.lax.axis_size(axes))
    local, model_state = local_steps.start(loss_fn, tx, model)
    if check is not None:
      check(local.params)
    here = numbers(jax.lax.axis_size(axes), options.leave)
    return PopulationState(
      step=jnp.zeros((), jnp.int32),
      number=jnp.asarray(here, jnp.int32)[jax.lax.axis_index(axes)],
      params=local.params,
      model_state=model_state,
      opt_state=local.opt_state,
    )

  def step(state: PopulationState, batch, key):
    check_size(name, options, jax.lax.axis_size(axes))
    of_step = spmd.shared_key(key, state.step)
    own_key = jax.random.fold_in(of_step, state.number)
    shared = jax.random.fold_in(of_step, _EXCHANGE)
    g = gradient(state.params, state.model_state, batch, own_key)
    here = numbers(jax.lax.axis_size(axes), options.leave)

    def finish(phase: Phase):
      def run():
        # All that travels goes from one branch; see `local_steps`.
        grads = g.grads if phase.reduce is None else phase.reduce(g.grads)
        member, norm = _update(tx, options, state, grads, g.model_state)
        if phase.exchange is not None:
          rows = Rows(batch, own_key)
          with jax.named_scope(SCOPE):
            member = phase.exchange(member, state.step, shared, rows)
        return member, _metrics(g, norm, axes, here)

      return run

    branches = [finish(phase) for phase in phases]
    if which is None:
      member, metrics = branches[0]()
    else:
      member, metrics = jax.lax.switch(which(state.step, shared), branches)
    return PopulationState(state.step + 1, state.number, *member), metrics

  def params(state: PopulationState):
    whole = local_steps.mean(state.params, axes)
    return variables.join(loss_fn, whole, state.model_state, axes)

  def member(fn, state: PopulationState):
    return fn(variables.own(loss_fn, state.params, state.model_state))

  def reshard(state: PopulationState, members: int) -> PopulationState:
    adopting.check_count(name, state.number.shape[0], members, options.leave)
    here = jnp.asarray(numbers(members, options.leave), jnp.int32)
    model = state.params, state.model_state
    found = adopting.continued(model, state.opt_state, state.number, here)
    parts = adopting.restack(state[2:], found)
    return PopulationState(state.step, here, *parts)

  def who(members: int, before: Sequence[int] = ()):
    here = numbers(members, options.leave)
    adopting.check_numbers(name, before, here, options.leave)
    return here

  each = P(options.axis)
  return Method(
    name,
    options.axis,
    init,
    step,
    params,
    PopulationState(P(), each, each, each, each),
    reshard,
    population=True,
    member=member,
    inner=options.inner,
    numbers=who,
  )


def _update(tx, options: Options, state, grads, model_state):
  """A member's own step: `(member, its gradient's norm before clipping)`."""
  norm = jnp.sqrt(gradients.squared_norm(grads))
  if options.clip_norm is not None:
    scale = gradients.clip_scale(norm, options.clip_norm)
    grads = gradients.scale_tree(grads, scale)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  if options.learning_rates is not None:
    rates = jnp.asarray(options.learning_rates, jnp.float32)
    rate = rates[state.number]
    updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
  params = optax.apply_updates(state.params, updates)
  return Member(params, model_state, opt_state), norm


def _metrics(g: gradients.Gradient, norm, axes, here: Sequence[int]):
  """Means over the members, and who has the largest loss; NaN is larger."""
  # One message; a loss that is not finite stays its member's own.
  losses = spmd.in_own_place(g.loss, axes)
  # Who has a gradient that is not finite is to blame, whatever its loss.
  blame = jnp.where(jnp.isfinite(norm), g.loss, jnp.nan)
  blame = spmd.in_own_place(blame, axes)
  losses, blame, (aux, norm) = jax.lax.psum(
    (losses, blame, (g.aux, norm)), axes
  )
  aux, norm = jax.tree.map(lambda x: x / len(losses), (aux, norm))
  return {
    **aux,
    "loss": losses.mean(),
    "grad_norm": norm,
    "worst_loss": losses.max(),
    "worst_member": jnp.asarray(here, jnp.int32)[blame.argmax()],
  }


def numbers(members: int, leave: Sequence[int]) -> list[int]:
  """The numbers of a population's members: those that left are left out.

  >>> numbers(3, (1,))
  [0, 2, 3]
  """
  return [n for n in range(members + len(leave)) if n not in leave][:members]


def check_size(name: str, options: Options, members: int) -> None:
  """As `check_options`, of a population of so many."""
  rates, last = options.learning_rates, numbers(members, options.leave)[-1]
  if rates is not None and len(rates) <= last:
    raise ValueError(
      f"{name}: `learning_rates` has {len(rates)} factors, but the population "
      f"has {members} members, the last of which is number {last}. Give "
      f"{last + 1}, one for each number, or None."
    )
  ever = members + len(options.leave)
  unknown = [n for n in options.leave if n >= ever]
  if unknown:
    raise ValueError(
      f"{name}: leave={tuple(options.leave)!r}, but with {members} members "
      f"there, numbers go to {ever - 1}: {unknown} cannot have left. Name all "
      "who did, and only them."
    )


def _is_factor(x) -> bool:
  number = isinstance(x, Real) and not isinstance(x, bool)
  return number and 0 < x <= float(jnp.finfo(jnp.float32).max)
