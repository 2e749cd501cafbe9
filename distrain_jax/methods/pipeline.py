"""Synchronous pipelines: exact gradients, on the stages that PETRA trains.

Huang et al., "GPipe", 2018, https://arxiv.org/abs/1811.06965; Narayanan et al.,
"PipeDream", 2018, https://arxiv.org/abs/1806.03377, and its 1F1B schedule with a
flush, 2021, https://arxiv.org/abs/2104.04473.

All micro-batches of a step pass through the stages with the same parameters,
which then change once: a step equals one of back-propagation with as many
micro-batches.

Letters: J stages, numbered from 0; M micro-batches a step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import gradients
from distrain_jax.method import Method, Variables
from distrain_jax.pipelining import plan as plans
from distrain_jax.pipelining.engine import Engine, Passes
from distrain_jax.pipelining.fifo import Fifo
from distrain_jax.pipelining.optimizer import Optimizer, Transforms
from distrain_jax.pipelining.packing import Packed
from distrain_jax.pipelining.reading import Reading
from distrain_jax.stages import Block

SCHEDULES = ("1f1b", "gpipe")
BUFFERS = ("input", "none", "graph")


class PipelineState(NamedTuple):
  """One stage's. Nothing is in flight between steps."""

  step: jax.Array  # (), int32
  params: Packed
  model_state: Packed
  opt_state: Packed


def pipeline(
  network: Sequence[Block | Sequence[Block]],
  tx: Transforms,
  *,
  shapes: Any,
  example: Any,
  inputs: str | None = None,
  axis: str = "stage",
  replicas: str | None = None,
  accumulate: int = 1,
  schedule: str = "1f1b",
  buffer: str = "input",
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = None,
) -> Method:
  """Pipelined back-propagation of any network that is cut into stages.

  Args:
    network, tx, shapes, example, inputs, axis, replicas, wire_dtype: as for
      `petra`.
    accumulate: M; where all stages are equal, the pipeline is idle for
      (J - 1) / (M + J - 1) of the time, in either schedule.
    schedule: the order of the passes.
      "1f1b": a stage takes one micro-batch forward and one back in every tick,
        as soon as there is one. At most 2 (J - 1 - s) are kept on stage s,
        however many M are. (The usual 1F1B, whose ticks are half as long, keeps
        J - s of them; in one program for all stages it would make a stage that
        goes forward wait for its neighbours, which go back.)
      "gpipe": all go forward, then all back; M are kept.
    buffer: what a stage keeps of a micro-batch between its passes.
      "input": the inputs of its blocks, which are computed again.
      "none": what goes into reversible blocks is reconstructed instead, with
        the very parameters of the forward pass: the exact gradient, to
        rounding, and nothing kept.
      "graph": all that the backward pass reads; nothing is computed again.
    clip_norm: largest global norm of the gradient; None: no clipping.

  Returns:
    A `Method`. Metrics: loss, aux, grad_norm (before clipping) and busy, the
    fraction of all stages' passes, forward and back, that had a micro-batch:
    M / (M + J - 1) of gpipe's. Of 1f1b's M / (M + 2 (J - 1)), by ticks: the
    first J - 1 have no pass back and the last J - 1 none forward, so that
    together they take the time of J - 1 others.

  Raises:
    ValueError: for stages that do not fit together, or options out of range.
  """
  gradients.check_accumulate("pipeline", accumulate)
  gradients.check_clip_norm("pipeline", clip_norm)
  gradients.check_dtype("pipeline", "wire_dtype", wire_dtype)
  for name, value, known in (
    ("schedule", schedule, SCHEDULES),
    ("buffer", buffer, BUFFERS),
  ):
    if value not in known:
      raise ValueError(
        f"pipeline: `{name}` is one of {', '.join(known)}; got {value!r}."
      )
  gpipe, m = schedule == "gpipe", accumulate
  plan = plans.make_plan(
    network,
    shapes=shapes,
    example=example,
    inputs=inputs,
    mode=plans.BUFFERS[buffer],
    keep_last=gpipe,
  )
  engine = Engine(plan, axis, replicas, wire_dtype)
  optimizer = Optimizer("pipeline", engine, tx)
  stateful = isinstance(shapes, Variables)
  reading = Reading("pipeline", engine, optimizer, inputs, stateful)

  def init(key, model):
    del key  # nothing random here
    return PipelineState(jnp.zeros((), jnp.int32), *reading.start(model))

  def at(micro, i):
    """Micro-batch i; any other one where there is none."""
    i = jnp.clip(i, 0, m - 1)
    pick = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return jax.tree.map(pick, micro)

  def one_by_one(state, micro, key):
    """1F1B: (grads, model_state, passes, loss, aux)."""

    def body(carry, i):
      grads, model_state, flight = carry
      number = jnp.where(i < m, state.step * m + i, -1)
      flight, back, passes = engine.tick(
        state.params, model_state, flight, at(micro, i), number, key, m
      )
      grads = jax.tree.map(jnp.add, grads, back.grads)
      return (grads, back.model_state, flight), (passes, back.loss, back.aux)

    ticks = jnp.arange(m + plan.delay(0))
    start = plan.params.zeros(), state.model_state, engine.nothing_in_flight(m)
    (grads, model_state, _), found = jax.lax.scan(body, start, ticks)
    return grads, model_state, *found

  def all_at_once(state, micro, key):
    """GPipe: as `one_by_one`."""
    first = state.step * m

    def number(i):
      """Of the i-th micro-batch; -1: there is none."""
      return jnp.where((i >= 0) & (i < m), first + i, -1)

    def forward(carry, i):
      model_state, up, fifo = carry
      mine = i - engine.stage()
      sent, entry, stats = engine.forward(
        state.params, model_state, at(micro, i), up, number(mine), key
      )
      fifo = queue.push(fifo, entry, mine, engine.stage(), number(mine) >= 0)
      model_state = stats if plan.mode.graph else model_state
      return (model_state, engine.send_up(sent), fifo), number(mine)

    def backward(carry, i):
      grads, model_state, down, fifo = carry
      down = engine.send_down(down)
      mine = i - (plan.count - 1 - engine.stage())
      fifo, entry = queue.pop(fifo, mine, engine.stage())
      back = engine.backward(
        state.params,
        model_state,
        entry,
        at(micro, i),
        empty.up,
        down,
        number(mine),
        key,
      )
      grads = jax.tree.map(jnp.add, grads, back.grads)
      out = number(mine), back.loss, back.aux
      return (grads, back.model_state, back.down, fifo), out

    empty = engine.nothing_in_flight(1)
    queue = Fifo(plan.entries, (m,) * plan.count)
    ticks = jnp.arange(m + plan.count - 1)
    start = state.model_state, empty.up, queue.empty()
    (model_state, _, fifo), up = jax.lax.scan(forward, start, ticks)
    start = plan.params.zeros(), model_state, empty.down, fifo
    out = jax.lax.scan(backward, start, ticks)
    (grads, model_state, *_), (down, *found) = out
    return grads, model_state, Passes(up, down), *found

  def passed(state, batch, key):
    """All micro-batches both ways; gpipe's passes back come after the others."""
    engine.check_axis("pipeline")
    micro = reading.micro_batches(batch, m)
    way = all_at_once if gpipe else one_by_one
    return way(state, micro, key)

  def trace(state: PipelineState, batch, key):
    forward, backward = passed(state, batch, key)[2]
    if not gpipe:
      return forward, backward
    none = jnp.full_like(forward, -1)
    return jnp.append(forward, none), jnp.append(none, backward)

  def step(state: PipelineState, batch, key):
    grads, model_state, passes, loss, aux = passed(state, batch, key)
    grads = jax.tree.map(lambda x: (x / m).astype(x.dtype), grads)
    if replicas is not None:
      grads, model_state = jax.lax.pmean((grads, model_state), replicas)
    squared = gradients.squared_norm(grads)
    norm = jnp.sqrt(jax.lax.psum(squared, axis))
    if clip_norm is not None:
      scale = gradients.clip_scale(norm, clip_norm)
      grads = gradients.scale_tree(grads, scale)
    params, opt_state, _ = optimizer.update(
      grads, state.params, state.opt_state
    )
    none = reading.no_metrics()
    metrics = reading.metrics(passes, loss, aux, squared, none)
    new = PipelineState(state.step + 1, params, model_state, opt_state)
    return new, metrics

  stats = P(axis)  # equal on the replicas after every step
  specs = PipelineState(P(), P(axis), stats, P(axis))
  return Method(
    "pipeline",
    axis,
    init,
    step,
    lambda state: reading.model(state.params, state.model_state),
    specs,
    layout=reading.layout(),
    replicas=replicas,
    rows=P() if replicas is None else P(replicas),
    trace=trace,
  )
