"""Rounds whose communication hides: options, a worker's share, one half.

What ACCO has in common with the delayed updates that it is judged against.

Letters in shapes: N workers, h halves of a round (or 1), k micro-batches each.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax import gradients, layout, overlap, variables
from distrain_jax.gradients import Gradient
from distrain_jax.method import Batch, Metrics, Params, StatefulLoss
from distrain_jax.sharded_update import Shard, Sums
from distrain_jax.whole import is_whole


class Counted(NamedTuple):
  """A batch to which the workers contribute different amounts.

  A step takes the first `counts[w, j]` micro-batches of each half j from worker
  w's share, none at 0, and at most the k that every share is cut into. Means
  are over the micro-batches that were taken; without any no update is made.
  """

  batch: Batch  # leaves (global_batch, ...), as without counts
  counts: jax.Array  # (N, h), whole numbers


class Plan(NamedTuple):
  """The options of a factory, checked by `make_plan`."""

  name: str
  axis: str
  halves: int  # h
  accumulate: int  # k
  clip_norm: float | None
  wire_dtype: Any
  param_dtype: Any
  slices: int
  reduction: str | None


class Share(NamedTuple):
  """What one worker has to do in a step."""

  micro: Batch  # leaves (h k, rows, ...)
  mine: jax.Array | None  # (h,), int32: how many of each half; None: all k
  totals: jax.Array  # (h,), float32: the same of all workers together


def make_plan(
  name: str,
  halves: int,
  *,
  axis: str,
  accumulate: int,
  clip_norm: float | None,
  wire_dtype: Any,
  param_dtype: Any,
  slices: int | None,
  reduction: str | None,
) -> Plan:
  """Raises ValueError, in the name of the factory, for what cannot be."""
  gradients.check_accumulate(name, accumulate)
  gradients.check_clip_norm(name, clip_norm)
  gradients.check_dtype(name, "wire_dtype", wire_dtype)
  gradients.check_dtype(name, "param_dtype", param_dtype)
  most = accumulate // 2
  whole = is_whole(slices)
  if slices is not None and not (whole and slices <= most):
    raise ValueError(
      f"{name}: `slices` are the parts of each collective; every part of the "
      "reduce-scatter and of the all-gather goes beside a micro-batch of its "
      f"own, so accumulate={accumulate} allows 0 to {most}; got {slices!r}. "
      f"Pass accumulate={2 * slices} or more, or fewer slices."
      if whole and slices > most
      else f"{name}: `slices` is a whole number from 0, or None for "
      f"accumulate // 2; got {slices!r}."
    )
  if reduction not in (None, *overlap.REDUCTIONS):
    raise ValueError(
      f"{name}: `reduction` is {' or '.join(overlap.REDUCTIONS)}, or None for "
      f"the chip's; got {reduction!r}."
    )
  return Plan(
    name=name,
    axis=axis,
    halves=halves,
    accumulate=accumulate,
    clip_norm=clip_norm,
    wire_dtype=wire_dtype,
    param_dtype=param_dtype,
    slices=most if slices is None else slices,
    reduction=reduction,
  )


def check_warmup(name: str, warmup: int) -> None:
  if not is_whole(warmup):
    raise ValueError(
      f"{name}: `warmup` is the number of synchronous steps at the start, from "
      f"0; got {warmup!r}."
    )


def exchange(plan: Plan, params: Params) -> overlap.Exchange:
  """How the workers exchange a tree like `params`."""
  workers = jax.lax.axis_size(plan.axis)
  return overlap.Exchange(
    layout=layout.make_layout(params, workers),
    axis=plan.axis,
    slices=plan.slices,
    wire_dtype=plan.wire_dtype,
    reduction=plan.reduction,
  )


def share(plan: Plan, loss_fn, batch: Batch | Counted) -> Share:
  """This worker's micro-batches of a step.

  Raises:
    ValueError: if they do not divide, or if counts are not (N, h) integers.
  """
  halves, k = plan.halves, plan.accumulate
  counts = None
  if isinstance(batch, Counted):
    batch, counts = batch
  micro = gradients.microbatches(batch, halves * k)
  if counts is None:
    workers = jax.lax.axis_size(plan.axis)
    return Share(micro, None, jnp.full(halves, k * workers, jnp.float32))
  if counts.shape != (1, halves) or not jnp.issubdtype(
    counts.dtype, jnp.integer
  ):
    raise ValueError(
      f"{plan.name}: Counted.counts are whole numbers of shape (workers, "
      f"{halves}), one for each half of a worker's share; got {counts.dtype} "
      f"and, for one worker, the shape {counts.shape} instead of (1, {halves})."
    )
  if isinstance(loss_fn, StatefulLoss) and loss_fn.stats == "synchronised":
    raise ValueError(
      f"{plan.name}: with Counted batches a worker skips micro-batches, but "
      "stats='synchronised' makes all workers meet inside each. Use "
      "stateful(..., stats='averaged') or 'local'."
    )
  mine = jnp.clip(counts[0], 0, k).astype(jnp.int32)
  totals = jax.lax.psum(mine.astype(jnp.float32), plan.axis)
  return Share(micro, mine, totals)


def half(
  plan: Plan,
  one,
  todo: Share,
  key: jax.Array,
  number: int,
  where: Params,
  model_state: Any,
  sums: Params,
  turn,
  wire,
  after: jax.Array | None = None,
) -> tuple[Gradient, Params, Any]:
  """Sums up a half's gradients at `where` with an exchange beside them.

  Args:
    plan: the method's options.
    one: `gradients.microbatch_fn(loss_fn)`.
    todo: this worker's micro-batches.
    key: this worker's, of this step.
    number: which half.
    where: the whole parameters that the loss sees.
    model_state: the loss's own.
    sums: this worker's of the half before, to be summed over the workers.
    turn, wire: see `overlap.beside`.
    after: a scalar of the half before, for `gradients.late_zeros`.

  Returns:
    `(this worker's sums, the gathered tree, what turn returned besides)`.
  """
  k = plan.accumulate

  def work(carry: Gradient, i) -> Gradient:
    i = number * k + i
    return gradients.add_microbatch(one, carry, where, todo.micro, i, key)

  trips = k
  if todo.mine is not None:
    count, every = todo.mine[number], work
    work = lambda carry, i: jax.lax.cond(
      i < count, lambda c: every(c, i), lambda c: c, carry
    )
    trips = jnp.maximum(count, 2 * plan.slices)
  talk = exchange(plan, where)
  sent = overlap.packed(talk, sums)
  if after is not None:
    # Sums that were copied to be sent have left their memory to the new ones.
    sent, after = jax.lax.optimization_barrier((sent, after))
  start = gradients.zeros(one, where, model_state, todo.micro, key, after)
  return overlap.beside(talk, work, start, trips, sent, turn, wire)


def waiting(plan: Plan, sums: Params) -> Params:
  """Gradient sums in the dtype that they wait and travel in."""
  return jax.tree.map(lambda x: x.astype(plan.wire_dtype or x.dtype), sums)


def commit_now(
  plan: Plan, advance, shard: Shard, like: Params, pending: Sums, *others: Sums
) -> tuple[Params, Shard, jax.Array]:
  """An update with nothing beside its communication.

  Args:
    plan: the method's options.
    advance: `(shard, *sums of all workers) -> (shard, norm)`.
    shard: to be updated.
    like: a tree like the whole parameters.
    pending: this worker's sums; their count is of all workers.
    *others: pieces that are sums of all workers already.

  Returns:
    `(the whole parameters, the shard, the mean gradient's norm)`.
  """
  talk = exchange(plan, like)
  sums = pending._replace(grads=overlap.scatter_sums(talk, pending.grads))
  shard, norm = advance(shard, sums, *others)
  return overlap.gather_pieces(talk, shard.masters), shard, norm


def conclude(
  plan: Plan, loss_fn, new, norm, sums: Gradient, todo: Share, warmup, commit
) -> tuple[Any, Metrics]:
  """The end of a step: what else the workers say, and what warm-up changes.

  Args:
    plan: the method's options.
    loss_fn: the method's.
    new: the state after the step, with fields `step` and `model_state`.
    norm: of the gradient that was committed.
    sums: of all of the step's micro-batches.
    todo: this worker's micro-batches.
    warmup: how many steps commit at once, at the start.
    commit: `(state) -> (state, norm)`, the pending update.

  Returns:
    `(state, metrics)`.
  """

  def tell(new, norm):
    stats = variables.after_step(loss_fn, new.model_state, plan.axis)
    metrics = means(plan, sums, todo)
    return new._replace(model_state=stats), {**metrics, "grad_norm": norm}

  if not warmup:
    return tell(new, norm)
  # Nothing was pending before it, so all of it was taken at theta. What is said
  # besides goes from the same branch: see `local_steps`.
  at_once = lambda new, norm: tell(*commit(new))
  return jax.lax.cond(new.step <= warmup, at_once, tell, new, norm)


def means(plan: Plan, sums: Gradient, todo: Share) -> Metrics:
  """Loss and aux over all workers' micro-batches; 0 where there were none."""
  loss, aux = jax.lax.psum((sums.loss, sums.aux), plan.axis)
  total = jnp.maximum(todo.totals.sum(), 1)
  return jax.tree.map(lambda x: x / total, {**aux, "loss": loss})
