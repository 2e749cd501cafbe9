"""DiLoCo: workers train alone, and an outer optimizer follows their mean.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language
Models", 2023, https://arxiv.org/abs/2311.08105. Fragments, delay and mix are
those of Douillard et al., "Streaming DiLoCo with overlapping communication:
Towards a Distributed Free Lunch", 2025, https://arxiv.org/abs/2501.18512.

Fragments are rows of leaves (see `fragments`) and not whole layers, and what
travels is summed in its own dtype: the paper sends 4 bits and sums in float32.
"""

import functools
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import fragments as pieces
from distrain_jax import gradients, local_steps, variables
from distrain_jax.gradients import at_least_float32
from distrain_jax.method import LossFn, Method, Params, StatefulLoss
from distrain_jax.whole import is_whole


class Outer(NamedTuple):
  """The global model, in float32 or wider; equal on all workers."""

  params: Params
  momentum: Params
  # The last mean outer gradients, in wire_dtype, applied or in flight; None
  # without delay.
  arrived: Params | None


class DiLoCoState(NamedTuple):
  """One worker's; `Method.specs` says which fields differ by worker."""

  step: jax.Array  # (), int32
  params: Params  # this worker's
  model_state: Any  # () for a loss without it
  opt_state: optax.OptState  # this worker's; never travels
  outer: Outer


class Both(NamedTuple):
  """What an outer step changes."""

  params: Params  # this worker's
  outer: Params
  momentum: Params


class Rule(NamedTuple):
  """The outer step of one fragment, on one worker."""

  axis: str
  learning_rate: float
  momentum: float
  mix: float
  wire_dtype: DTypeLike | None

  def start(self, params: Params, keep: bool) -> Outer:
    whole = jax.tree.map(at_least_float32, params)
    zeros = lambda x: jnp.zeros(x.shape, self.wire_dtype or x.dtype)
    return Outer(
      params=whole,
      momentum=jax.tree.map(jnp.zeros_like, whole),
      arrived=jax.tree.map(zeros, whole) if keep else None,
    )

  def exchange(self, fragment, both: Both) -> Both:
    return self._apply(fragment, both, self._mean(fragment, both))

  def send(self, fragment, arrived: Params, both: Both) -> Params:
    return pieces.put(arrived, fragment, self._mean(fragment, both))

  def receive(self, fragment, both: Both, arrived: Params) -> Both:
    grads = pieces.take(arrived, fragment)
    return self._apply(fragment, both, map(at_least_float32, grads))

  def _mean(self, fragment, both: Both) -> list[jax.Array]:
    """The outer gradient, in float32 or wider."""

    def difference(outer, here):
      # From where it put the workers, whose dtype may be narrower: where
      # they did not move it is 0.
      start = outer.astype(here.dtype).astype(outer.dtype)
      moved = start - here.astype(outer.dtype)
      return moved.astype(self.wire_dtype or moved.dtype)

    at = pieces.take(both.outer, fragment)
    here = pieces.take(both.params, fragment)
    sums = jax.lax.psum(list(map(difference, at, here)), self.axis)
    n = jax.lax.axis_size(self.axis)
    return [at_least_float32(x) / n for x in sums]

  def _apply(self, fragment, both: Both, grads) -> Both:
    """Nesterov's step, and what the worker goes on from."""
    grads = list(grads)
    momentum = pieces.take(both.momentum, fragment)
    momentum = [self.momentum * m + g for m, g in zip(momentum, grads)]
    ahead = [g + self.momentum * m for m, g in zip(momentum, grads)]
    outer = pieces.take(both.outer, fragment)
    outer = [x - self.learning_rate * d for x, d in zip(outer, ahead)]
    params = outer
    if self.mix:
      own = pieces.take(both.params, fragment)
      blend = lambda x, y: self.mix * x.astype(y.dtype) + (1 - self.mix) * y
      params = list(map(blend, own, outer))
    return Both(
      params=pieces.put(both.params, fragment, params),
      outer=pieces.put(both.outer, fragment, outer),
      momentum=pieces.put(both.momentum, fragment, momentum),
    )


def diloco(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  sync_every: int = 30,
  outer_learning_rate: float = 0.7,
  outer_momentum: float = 0.9,
  fragments: int = 1,
  delay: int = 0,
  mix: float = 0.0,
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = None,
) -> Method:
  """Local steps; every so many, an outer Nesterov step on the global model.

  The outer gradient is the global model minus the workers' mean, and workers
  go on from the new global model with their own optimizer's state. In the
  other steps only the metrics travel, and non-trained state unless it is
  `stateful(..., stats="local")`.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: each worker's own (inner) optimizer; the papers take AdamW.
    axis: the mesh (or vmap) axis of the workers.
    sync_every: steps from one exchange of a parameter to its next. The papers
      take 500, and 30 to 100 with fragments.
    outer_learning_rate: of the outer step.
    outer_momentum: Nesterov's, of the outer step; in [0, 1).
    fragments: parts of about equal bytes that the model is cut into, at most
      sync_every. Each is exchanged at a step of its own, evenly spread: the
      first ones after less than sync_every steps, the last after sync_every.
    delay: steps from when a fragment is sent until it is applied, below
      sync_every. What lateness does to learning; it saves no time here, as
      XLA computes nothing beside the branch that holds an exchange.
    mix: how much of the worker's own parameters stays where the global ones
      come in, in [0, 1); 0: nothing.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of a worker's own gradient; None: no
      clipping.
    wire_dtype: dtype in which outer gradients travel and are summed; None:
      float32, or the parameters' own if that is wider.

  Returns:
    A `Method`; its `params` is the global model, in the parameters' dtype: as
    after the last outer step, whatever the workers have done since. Metrics:
    loss, grad_norm (mean of the workers', before clipping) and loss_fn's aux.

  Raises:
    ValueError: if an option is out of range.
  """
  local_steps.check_sync_every("diloco", sync_every)
  _check_outer(outer_learning_rate, outer_momentum, mix)
  _check_stream(fragments, delay, sync_every)
  gradients.check_accumulate("diloco", accumulate)
  gradients.check_clip_norm("diloco", clip_norm)
  gradients.check_dtype("diloco", "wire_dtype", wire_dtype)
  one_step = local_steps.step_fn(
    loss_fn, tx, axis=axis, accumulate=accumulate, clip_norm=clip_norm
  )
  rule = Rule(axis, outer_learning_rate, outer_momentum, mix, wire_dtype)
  due = schedule(sync_every, fragments)

  def where_due(action, nothing, done, params, *args):
    """The action on the one fragment, if any, that is due after a step."""
    # One branch a fragment; the index is the same on all workers.
    branches = [
      functools.partial(action, fragment)
      for fragment in pieces.split(params, fragments)
    ]
    which = jnp.asarray(due)[(done - 1) % sync_every]
    which = jnp.where(done > 0, which, fragments)
    return jax.lax.switch(which, [*branches, nothing], *args)

  def telling(action, own):
    """Also what travels in every step; see `local_steps`."""
    return lambda *args: (action(*args), local_steps.tell(loss_fn, own, axis))

  def init(key, model):
    del key  # nothing random here
    local, model_state = local_steps.start(loss_fn, tx, model)
    outer = rule.start(local.params, keep=delay > 0)
    step = jnp.zeros((), jnp.int32)
    return DiLoCoState(step, local.params, model_state, local.opt_state, outer)

  def step(state: DiLoCoState, batch, key):
    local = local_steps.Local(state.params, state.opt_state)
    local, own = one_step(local, state.model_state, state.step, batch, key)
    done, params, outer = state.step + 1, local.params, state.outer
    both = Both(params, outer.params, outer.momentum)
    arrived, first = outer.arrived, lambda x, *_: x
    if delay:
      # Never the same fragment. In this order XLA for TPU copies no tree.
      send, keep = telling(rule.send, own), telling(first, own)
      arrived, told = where_due(send, keep, done, params, arrived, both)
      both = where_due(rule.receive, first, done - delay, params, both, arrived)
    else:
      exchange, keep = telling(rule.exchange, own), telling(first, own)
      both, told = where_due(exchange, keep, done, params, both)
    metrics, stats = told
    outer = Outer(both.outer, both.momentum, arrived)
    new = DiLoCoState(done, both.params, stats, local.opt_state, outer)
    return new, metrics

  def params(state: DiLoCoState):
    like = lambda x, y: x.astype(y.dtype)
    whole = jax.tree.map(like, state.outer.params, state.params)
    return variables.join(loss_fn, whole, state.model_state, axis)

  def reshard(state: DiLoCoState, workers: int) -> DiLoCoState:
    return state._replace(
      params=local_steps.restack(state.params, workers),
      model_state=variables.reshard(loss_fn, state.model_state, workers),
      opt_state=local_steps.restack(state.opt_state, workers),
    )

  stats = variables.spec(loss_fn, axis)
  specs = DiLoCoState(P(), P(axis), stats, P(axis), outer=P())
  member = lambda fn, state: fn(
    variables.own(loss_fn, state.params, state.model_state)
  )
  return Method(
    "diloco", axis, init, step, params, specs, reshard, member=member
  )


def schedule(sync_every: int, fragments: int) -> np.ndarray:
  """(sync_every,), int32: which fragment is sent after which step.

  Entry i is that of the steps i + 1, i + 1 + sync_every, ...; `fragments`
  stands for none.

  >>> schedule(5, 2).tolist()
  [2, 0, 2, 2, 1]
  """
  due = np.full(sync_every, fragments, np.int32)
  for p in range(fragments):
    due[(p + 1) * sync_every // fragments - 1] = p
  return due


def _check_outer(outer_learning_rate, outer_momentum, mix) -> None:
  rate = outer_learning_rate
  if not isinstance(rate, Real) or not rate > 0:
    raise ValueError(
      "diloco: `outer_learning_rate` multiplies the outer gradient, so it is "
      f"above 0 (the paper's is 0.7); got {rate!r}."
    )
  momentum = outer_momentum
  if not isinstance(momentum, Real) or not 0 <= momentum < 1:
    raise ValueError(
      "diloco: `outer_momentum` is in [0, 1) (the paper's is 0.9); got "
      f"{momentum!r}."
    )
  if not isinstance(mix, Real) or not 0 <= mix < 1:
    raise ValueError(
      "diloco: `mix` is the part of a worker's own parameters that stays in an "
      f"exchange, in [0, 1); got {mix!r}. With 1 the workers would never meet."
    )


def _check_stream(fragments, delay, sync_every) -> None:
  if not is_whole(fragments, 1) or fragments > sync_every:
    raise ValueError(
      "diloco: `fragments` is the number of parts that are exchanged one after "
      f"the other, from 1 to sync_every={sync_every}; got {fragments!r}."
    )
  if not is_whole(delay) or delay >= sync_every:
    raise ValueError(
      "diloco: `delay` is the number of steps until what was sent is applied, "
      f"from 0 to sync_every - 1 = {sync_every - 1}, so that it is applied "
      f"before the next is sent; got {delay!r}."
    )
