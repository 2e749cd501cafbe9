"""PETRA: pipelined stages that train with forward and backward decoupled.

Rivaud et al., "PETRA: Parallel End-to-end Training with Reversible
Architectures", 2024, https://arxiv.org/abs/2406.02052, Algorithm 1.

In every tick a micro-batch enters, and every stage takes one forward and an
older one back, with the parameters that it has now: nothing waits, and no old
parameters are kept. A reversible stage reconstructs its input from its output,
which comes back with the gradient; another keeps its inputs.

Letters: J stages, numbered from 0; k micro-batches accumulated.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import gradients
from distrain_jax.method import Method, Variables
from distrain_jax.pipelining import plan as plans
from distrain_jax.pipelining.engine import Engine, Flight
from distrain_jax.pipelining.optimizer import Optimizer, Transforms
from distrain_jax.pipelining.packing import Packed
from distrain_jax.pipelining.reading import Reading
from distrain_jax.stages import Block


class PetraState(NamedTuple):
  """One stage's; of several pipelines side by side, one of them's."""

  step: jax.Array  # (), int32
  entered: jax.Array  # (), int32: micro-batches that have entered
  params: Packed
  model_state: Packed
  opt_state: Packed
  grads: Packed | tuple[()]  # summed since the last update; () for k = 1
  moved: Packed | tuple[()]  # by the last update; () without prediction
  counted: jax.Array  # (), int32: gradients that this stage has seen
  norm: jax.Array  # (), float32: squared, of the last update's gradient
  flight: Flight
  metrics: dict[str, jax.Array]  # the last ones known, equal on all


def petra(
  network: Sequence[Block | Sequence[Block]],
  tx: Transforms,
  *,
  shapes: Any,
  example: Any,
  inputs: str | None = None,
  axis: str = "stage",
  replicas: str | None = None,
  accumulate: int = 1,
  buffer: str = "none",
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = None,
  delay_exponent: float = 0.0,
  predict: float = 0.0,
) -> Method:
  """PETRA around any network that is cut into stages.

  A step is k ticks: the batch is cut into k micro-batches, one enters a tick.
  Stage s has a micro-batch's gradient 2 (J - 1) - s ticks after that entered,
  and updates its parameters with the mean of every k of them; ticks without a
  gradient change nothing. `run.drain` finishes what is in flight.

  Running statistics follow the backward passes, so that every micro-batch
  counts once (but with buffer="graph" the forward ones); batches are
  normalised by their own statistics in either pass.

  Args:
    network: J stages in order, each a block (see `stages`) or neighbouring
      ones; the last block has the loss.
    tx: the optimizer, or {block: its own}. It sees one block at a time, and
      its schedule advances with the block's updates.
    shapes: the params that `run.init` will get, {block: tree}, or `Variables`
      with model_state {collection: {block: tree}}; as arrays or shapes.
    example: one micro-batch of one pipeline, as arrays or shapes.
    inputs: None: batches are pairs (inputs, targets). Else the key of the
      inputs in a mapping; all other keys are targets.
    axis: of the stages, on a mesh or under vmap; its size is J.
    replicas: the axis of pipelines side by side, among which a batch's rows
      are divided; gradients and statistics are averaged at each update.
    accumulate: k.
    buffer: what a stage keeps between a micro-batch's two passes. Blocks that
      are not reversible keep their inputs whatever it is.
      "none": nothing more: PETRA.
      "input": the inputs of all blocks.
      "input_params": those, and the parameters of the forward pass, at which
        the gradient is taken: PipeDream's weight stashing.
      "params": those parameters alone, which also invert: the same gradient.
      "params_gradient": those, but inverts with the present ones.
      "graph": all that the forward pass computed and the backward pass reads.
    clip_norm: largest norm of one stage's gradient; None: no clipping.
    wire_dtype: of messages between stages; None: their own. An estimate of
      the input that travelled in fewer bits is a worse one.
    delay_exponent: p: updates of stage s are multiplied by (1 + d)^-p, where
      d = 2 (J - 1 - s) / k updates lie between its passes. 0, as in the paper:
      by 1. A remedy of our own, after the first of PipeMare's (Yang et al.,
      2021, https://arxiv.org/abs/1910.05124), which fades out.
    predict: p: a forward pass adds p times the stage's last update to the
      parameters for every update that comes before the micro-batch is back,
      which then meets about the parameters that it was predicted. 0, as in the
      paper: nothing. The linear prediction from differences of weights of
      Kosson et al., "Pipelined Backpropagation at Scale", 2021,
      https://arxiv.org/abs/2003.11666. It keeps the last update, and makes
      the predicted parameters anew in every tick.

  Returns:
    A `Method`. Metrics: loss and aux of the micro-batches that reached the
    last stage in this step (those of the step before where none did, 0 until
    the first); grad_norm, of all stages' last updates together; and busy, the
    fraction of all stages' passes, forward and back, that had a micro-batch: 1
    from tick 2 (J - 1) on.

  Raises:
    ValueError: for stages that do not fit together, or options out of range.
  """
  gradients.check_accumulate("petra", accumulate)
  gradients.check_dtype("petra", "wire_dtype", wire_dtype)
  mode = plans.check_buffer("petra", buffer)
  plan = plans.make_plan(
    network, shapes=shapes, example=example, inputs=inputs, mode=mode
  )
  engine = Engine(plan, axis, replicas, wire_dtype)
  if not 0 <= delay_exponent <= 1:
    raise ValueError(
      "petra: `delay_exponent` is from 0, for updates as they are, to 1, for "
      f"updates divided by their delay; got {delay_exponent!r}."
    )
  if not 0 <= predict <= 1:
    raise ValueError(
      "petra: `predict` is from 0, for forward passes with the parameters as "
      f"they are, to 1, for all updates that will come; got {predict!r}."
    )
  scales = None
  if delay_exponent:
    delays = [plan.delay(s) / accumulate for s in range(plan.count)]
    scales = [(1 + d) ** -delay_exponent for d in delays]
  optimizer = Optimizer("petra", engine, tx, clip_norm, scales)
  stateful = isinstance(shapes, Variables)
  reading = Reading("petra", engine, optimizer, inputs, stateful)
  k = accumulate

  def init(key, model):
    del key  # nothing random here
    params, model_state, opt_state = reading.start(model)
    zero = jnp.zeros((), jnp.int32)
    return PetraState(
      step=zero,
      entered=zero,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      grads=() if k == 1 else plan.params.zeros(),
      moved=plan.params.zeros() if predict else (),
      counted=zero,
      norm=jnp.zeros((), jnp.float32),
      flight=engine.nothing_in_flight(),
      metrics=reading.no_metrics(),
    )

  def tick(state: PetraState, batch, valid, key):
    """One of every stage; batch is (inputs, targets) of a micro-batch."""
    number = jnp.where(valid, state.entered, -1)
    flight, back, passes = engine.tick(
      state.params,
      state.model_state,
      state.flight,
      batch,
      number,
      key,
      ahead=functools.partial(ahead, state) if predict else None,
    )
    state = state._replace(
      entered=state.entered + valid,
      model_state=back.model_state,
      flight=flight,
    )
    state = learn(state, back.grads, passes.backward >= 0)
    return state, (passes, back.loss, back.aux)

  def ahead(state: PetraState, number):
    """What the parameters should be when this micro-batch is back."""
    # Gradients come in the order of their micro-batches, from number 0.
    updates = jnp.maximum(number, 0) // k - state.counted // k
    add = lambda p, m: p + (predict * updates * m).astype(p.dtype)
    return jax.tree.map(add, state.params, state.moved)

  def learn(state: PetraState, grads, arrived):
    """Takes a gradient in, and updates after every k of them."""
    if k > 1:
      grads = jax.tree.map(jnp.add, state.grads, grads)
    counted = state.counted + arrived
    due = arrived & (counted % k == 0)
    # What is in flight stays out of the conditional, which would copy it.
    learning = (
      state.params,
      state.model_state,
      state.opt_state,
      () if k == 1 else grads,
      state.moved,
      state.norm,
    )

    def update(learning, grads):
      old, stats, opt_state, _, moved, _ = learning
      grads = jax.tree.map(lambda x: x / k, grads) if k > 1 else grads
      if replicas is not None:
        grads, stats = jax.lax.pmean((grads, stats), replicas)
      params, opt_state, norm = optimizer.update(grads, old, opt_state)
      empty = () if k == 1 else plan.params.zeros()
      if predict:
        moved = jax.tree.map(jnp.subtract, params, old)
      return params, stats, opt_state, empty, moved, norm

    def keep(learning, grads):
      del grads
      return learning

    if replicas is not None:
      # Messages between stages are over before those between pipelines start:
      # XLA for CPU would otherwise let devices wait for each other crosswise.
      flight, grads = jax.lax.optimization_barrier((state.flight, grads))
      state = state._replace(flight=flight)
    params, stats, opt_state, left, moved, norm = jax.lax.cond(
      due, update, keep, learning, grads
    )
    return state._replace(
      params=params,
      model_state=stats,
      opt_state=opt_state,
      grads=left,
      moved=moved,
      norm=norm,
      counted=counted,
    )

  def ticks(state, micro, valid, key):
    """A tick for each of the micro-batches (leaves (ticks, rows, ...))."""
    engine.check_axis("petra")
    body = lambda state, x: tick(state, x, valid, key)
    state, (passes, loss, aux) = jax.lax.scan(body, state, micro)
    metrics = reading.metrics(passes, loss, aux, state.norm, state.metrics)
    return state._replace(metrics=metrics), passes

  def one_step(state: PetraState, batch, key):
    micro = reading.micro_batches(batch, k)
    return ticks(state, micro, jnp.ones((), bool), key)

  def step(state: PetraState, batch, key):
    state, _ = one_step(state, batch, key)
    state = state._replace(step=state.step + 1)
    return state, state.metrics

  def trace(state: PetraState, batch, key):
    return tuple(one_step(state, batch, key)[1])

  def drain(state: PetraState, key):
    nothing = jax.tree.map(
      lambda x: jnp.zeros((plan.delay(0), *x.shape), x.dtype),
      (plan.inputs[0][0], plan.targets),
    )
    if not plan.delay(0):
      return state
    return ticks(state, nothing, jnp.zeros((), bool), key)[0]

  each = P(axis) if replicas is None else P(axis, replicas)
  specs = PetraState(
    step=P(),
    entered=P(),
    params=P(axis),
    model_state=each,
    opt_state=P(axis),
    grads=each,
    moved=P(axis),
    counted=P(axis),
    norm=P(axis),
    flight=Flight(up=each, down=each, fifo=each, entered=P()),
    metrics=P(),
  )
  return Method(
    "petra",
    axis,
    init,
    step,
    lambda state: reading.model(state.params, state.model_state),
    specs,
    layout=reading.layout(buffer, *["predicting"] * bool(predict)),
    replicas=replicas,
    rows=P() if replicas is None else P(replicas),
    drain=drain,
    trace=trace,
  )
