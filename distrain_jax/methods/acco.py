"""ACCO: accumulate while you communicate.

Nabli et al., "ACCO: Accumulate While You Communicate for Communication-
Overlapped Sharded LLM Training", 2024, https://arxiv.org/abs/2406.02613.

The optimizer is sharded as in ZeRO-1, and its communication runs beside the
micro-batches. A gradient that is on its way when the parameters change would
be late; ACCO takes the first half of the next one at an estimate of these
parameters. With g~_t and g_t the workers' gradients of half a batch:

  estimate half: theta~_{t+1} = Opt(theta_t, g~_t), of which only the
    parameters are kept; meanwhile g_t is taken at theta_t.
  commit half: theta_{t+1} = Opt(theta_t, mean of g~_t and g_t); meanwhile
    g~_{t+1} is taken at theta~_{t+1}.

A step is a commit half, of what the step before left, and an estimate half, so
that its two gradients belong to one update. `params` commits what is pending:
after t steps it returns what t updates have made. Where both halves give the
same gradient, theta~ = theta and all of this is DDP, to rounding.

Our additions: a cheaper wire for the estimate, and workers that contribute
different numbers of micro-batches, which the paper's loop decides by itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import (
  gradients,
  rounds,
  sharded_update,
  spmd,
  variables,
  wires,
)
from distrain_jax import layout as layouts
from distrain_jax.method import LossFn, Method, Params, StatefulLoss
from distrain_jax.sharded_update import Shard, Sums


class ACCOState(NamedTuple):
  """Bytes a parameter with Adam, param_dtype and wire_dtype bfloat16: 4 + 14/N,
  and 2 more within a step, where a second gradient is being summed.
  """

  step: jax.Array  # (), int32
  estimate: Params  # theta~, whole, equal on all workers
  model_state: Any  # () for a loss without it
  shard: Shard  # of theta and the optimizer; this worker's pieces
  grads: Params  # this worker's sum of g_t, taken at theta, on its way
  count: jax.Array  # (), float32: micro-batches of all workers in `grads`
  reduced: Params  # pieces of the workers' sum of g~_t, in the wire's dtype
  reduced_count: jax.Array  # (), float32: micro-batches in `reduced`


class _Carry(NamedTuple):
  """Between the halves: a state in which `point` is theta after the first."""

  point: Params  # where the next gradient is taken
  model_state: Any
  shard: Shard
  grads: Params
  count: jax.Array
  reduced: Params
  reduced_count: jax.Array
  norm: jax.Array  # of the gradient that was committed


def acco(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "data",
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = "bfloat16",
  param_dtype: DTypeLike | None = None,
  estimate_dtype: DTypeLike | None = None,
  warmup: int = 0,
  slices: int | None = None,
  reduction: str | None = None,
) -> Method:
  """Data parallelism whose communication hides behind gradient accumulation.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. Its key
      is this worker's own for this step.
    tx: an elementwise optimizer, as for `zero1`. Its state, a schedule's step
      count included, advances on commits only.
    axis: the mesh (or vmap) axis of the workers.
    accumulate: micro-batches in each half: a worker's share of a batch is cut
      into 2 accumulate, as many as ddp(accumulate=2 * accumulate) has.
    clip_norm: largest global norm of an update's mean gradient; None: none.
    wire_dtype: dtype in which gradients travel, and wait to; None: their own.
    param_dtype: dtype of the parameters that the loss sees and that are
      gathered; None: their own. The masters are float32.
    estimate_dtype: dtype in which the estimate travels: only the points where
      gradients are taken depend on it. "int8": its difference from theta, with
      a scale a row. None: the parameters'.
    warmup: synchronous steps at the start, which equal DDP's.
    slices: into how many parts each collective is cut, to run beside as many
      micro-batches: at most accumulate // 2, the default.
    reduction: `overlap.REDUCTIONS`; None: reduce_scatter, or all_to_all on
      chips that cannot run that beside compute.

  Returns:
    A `Method`. Metrics: loss (at theta~ and theta), grad_norm (of what the step
    committed, before clipping) and loss_fn's aux. A batch may be a `Counted`.

  Raises:
    ValueError: for an option out of range; from `init`, if tx is not
      elementwise.
  """
  plan = rounds.make_plan(
    "acco",
    halves=2,
    axis=axis,
    accumulate=accumulate,
    clip_norm=clip_norm,
    wire_dtype=wire_dtype,
    param_dtype=param_dtype,
    slices=slices,
    reduction=reduction,
  )
  rounds.check_warmup("acco", warmup)
  if estimate_dtype != "int8":
    gradients.check_dtype("acco", "estimate_dtype", estimate_dtype)
  one = gradients.microbatch_fn(loss_fn)

  def advance(shard: Shard, *sums: Sums):
    grads = jax.tree.map(
      lambda *x: sum(map(gradients.at_least_float32, x)),
      *(x.grads for x in sums),
    )
    total = Sums(grads, sum(x.count for x in sums))
    return sharded_update.advance(tx, shard, total, axis, clip_norm)

  def init(key, model):
    del key  # nothing random here
    whole, model_state = variables.split(loss_fn, model)
    shard = sharded_update.start("acco", tx, whole, axis)
    if param_dtype is not None:
      whole = gradients.cast(whole, param_dtype)
    blank = lambda tree: rounds.waiting(
      plan, jax.tree.map(jnp.zeros_like, tree)
    )
    like = rounds.exchange(plan, whole).layout.pieces(whole, 0)
    none = jnp.zeros((), jnp.float32)
    return ACCOState(
      step=jnp.zeros((), jnp.int32),
      estimate=whole,
      model_state=model_state,
      shard=shard,
      grads=blank(whole),
      count=none,
      reduced=blank(like),
      reduced_count=none,
    )

  def half(todo, key, c: _Carry, number) -> tuple[_Carry, gradients.Gradient]:
    """The commit half is number 0, the estimate half 1; number may be traced."""
    commits = number == 0

    def turn(sums):
      # Now, or XLA would keep the sums in float32 until the half is over.
      sums, low = jax.lax.optimization_barrier((sums, _like(sums, c.reduced)))
      given = Sums(c.reduced, c.reduced_count), Sums(sums, c.count)
      new, norm = advance(c.shard, *given)
      keep = functools.partial(_choose, commits)
      none = jax.tree.map(jnp.zeros_like, c.reduced)
      kept = c._replace(
        shard=keep(new, c.shard),  # an estimate leaves theta and tx's state
        norm=keep(norm, c.norm),
        reduced=keep(none, low),
        reduced_count=keep(0.0, c.count),
      )
      return new.masters, kept

    wire = wires.Plain()
    if estimate_dtype is not None and not commits:
      wire = _estimate_wire(estimate_dtype, c.point, axis)
    sums, point, kept = rounds.half(
      plan,
      one,
      todo,
      key,
      number,
      c.point,
      c.model_state,
      c.grads,
      turn,
      wire,
      after=c.norm,
    )
    new = kept._replace(
      point=point,
      model_state=sums.model_state,
      grads=rounds.waiting(plan, sums.grads),
      count=todo.totals[number],
    )
    return new, sums._replace(grads=(), model_state=())

  def step(state: ACCOState, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    todo = rounds.share(plan, loss_fn, batch)
    one_half = functools.partial(half, todo, key)
    c = _Carry(*state[1:], norm=jnp.zeros((), jnp.float32))
    if estimate_dtype is None:
      c, sums = jax.lax.scan(one_half, c, jnp.arange(2))
      sums = jax.tree.map(lambda x: x.sum(0), sums)
    else:  # the halves are two programs
      c, first = one_half(c, 0)
      c, second = one_half(c, 1)
      sums = jax.tree.map(jnp.add, first, second)
    new = ACCOState(state.step + 1, *c[:-1])
    return rounds.conclude(
      plan, loss_fn, new, c.norm, sums, todo, warmup, commit_now
    )

  def commit_now(state: ACCOState) -> tuple[ACCOState, jax.Array]:
    """The pending update with nothing beside it, and its gradient's norm."""
    pending = Sums(state.grads, state.count)
    reduced = Sums(state.reduced, state.reduced_count)
    theta, shard, norm = rounds.commit_now(
      plan, advance, state.shard, state.estimate, pending, reduced
    )
    new = state._replace(
      estimate=theta,
      shard=shard,
      grads=jax.tree.map(jnp.zeros_like, state.grads),
      count=jnp.zeros_like(state.count),
      reduced=jax.tree.map(jnp.zeros_like, state.reduced),
      reduced_count=jnp.zeros_like(state.count),
    )
    return new, norm

  def params(state: ACCOState):
    theta = commit_now(state)[0].estimate
    return variables.join(loss_fn, theta, state.model_state, axis)

  def reshard(state: ACCOState, workers: int) -> ACCOState:
    whole = state.estimate
    like = jax.eval_shape(
      lambda x: layouts.make_layout(x, workers).pieces(x, 0), whole
    )
    return state._replace(
      model_state=variables.reshard(loss_fn, state.model_state, workers),
      shard=sharded_update.restack(state.shard, tx, whole, workers),
      grads=sharded_update.merge(state.grads, workers),
      reduced=layouts.restack(state.reduced, like, workers),
    )

  specs = ACCOState(
    step=P(),
    estimate=P(),
    model_state=variables.spec(loss_fn, axis),
    shard=P(axis),
    grads=P(axis),
    count=P(),
    reduced=P(axis),
    reduced_count=P(),
  )
  return Method("acco", axis, init, step, params, specs, reshard)


def _choose(first, a: Any, b: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def _estimate_wire(dtype: DTypeLike, theta: Params, axis: str):
  if dtype == "int8":
    return wires.Quantised(theta, axis)
  return wires.Plain(dtype)


def _like(tree: Params, other: Params) -> Params:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)
