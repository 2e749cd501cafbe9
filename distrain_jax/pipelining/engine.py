"""One worker's part in a tick: a stage's two passes, and its messages.

Stages that run the same code share a branch of one `lax.switch`, and a stage
that has nothing to do in a tick takes one that does nothing. Under `vmap` all
branches run for all stages.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from distrain_jax.pipelining import plan as plans
from distrain_jax.pipelining.fifo import Fifo
from distrain_jax.pipelining.packing import Packed
from distrain_jax.pipelining.plan import Plan


class Passes(NamedTuple):
  """The micro-batches that a stage works on in a tick; -1: none."""

  forward: jax.Array  # (), int32
  backward: jax.Array  # (), int32


class Flight(NamedTuple):
  """What is between the stages, and between the two passes of one."""

  up: Packed  # received from the stage before
  down: Packed  # to be sent to the stage before
  fifo: Packed  # rows of entries, by micro-batch
  # (2 J - 1,), int32: numbers of the micro-batches that entered, the latest
  # first; -1: none. All stages know it, so that no message has to say it.
  entered: jax.Array


class Backward(NamedTuple):
  """Of one micro-batch on one stage; zeros where there was none."""

  down: Packed  # (input, its gradient), for the stage before
  grads: Packed
  model_state: Packed
  loss: jax.Array  # (), of the last stage; 0 elsewhere
  aux: Any


class Engine(NamedTuple):
  """A plan on a named axis of as many workers as it has stages."""

  plan: Plan
  axis: str
  replicas: str | None = None  # the axis of the pipelines side by side
  wire_dtype: DTypeLike | None = None

  def stage(self) -> jax.Array:
    return jax.lax.axis_index(self.axis)

  def is_last(self) -> jax.Array:
    return self.stage() == self.plan.count - 1

  def check_axis(self, name: str) -> None:
    """Refuses an axis of another size than the number of stages."""
    size = jax.lax.axis_size(self.axis)
    if size != self.plan.count:
      raise ValueError(
        f"{name}: {self.plan.count} stages need an axis {self.axis!r} of as "
        f"many devices; it has {size}. Cut the network into {size} stages, or "
        "change the mesh (simulate: workers)."
      )

  def keys(self, key: jax.Array, number: jax.Array, stage: int) -> list[Any]:
    """Of the stage's blocks, the same in all passes of a micro-batch."""
    key = jax.random.fold_in(key, number)
    if self.replicas is not None:
      key = jax.random.fold_in(key, jax.lax.axis_index(self.replicas))
    start = jnp.asarray(self.plan.starts())[self.stage()]
    count = len(self.plan.stages[stage])
    return [jax.random.fold_in(key, start + i) for i in range(count)]

  def switch(
    self,
    branch: Callable[[int], Any],
    active: jax.Array | None = None,
    idle: Callable[[Any], Any] = lambda zeros: zeros,
    by_place: bool = False,
    also: Sequence[Any] = (),
  ) -> Any:
    """branch(a stage of this worker's kind), compiled once for each kind.

    Args:
      branch: traced with a stage's number; all return the same shapes.
      active: (), bool: whether it runs at all; None: it does.
      idle: from zeros of its result's shapes, what there is otherwise.
      by_place: every stage is of its own kind: the branches read what is not
        the worker's.
      also: what stages of one kind must have alike beside the plan's, by stage.
    """
    count = self.plan.count
    kinds = [s if by_place else self.plan.kind(s) for s in range(count)]
    if also:
      kinds = list(zip(kinds, also))
    order = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    table = [order.index(kinds.index(kind)) for kind in kinds]
    branches = [lambda s=s: branch(s) for s in order]
    index = jnp.asarray(table)[self.stage()]
    if active is not None:
      shapes = jax.eval_shape(branches[0])
      zeros = lambda: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), shapes
      )
      branches.append(lambda: idle(zeros()))
      index = jnp.where(active, index, len(order))
    return jax.lax.switch(index, branches)

  def forward(self, params, model_state, batch, up, number, key):
    """A micro-batch's pass through this stage.

    Args:
      params, model_state: packed, as the plan has them.
      batch: (inputs, targets) of the micro-batch, which the first stage reads.
      up: what the stage before sent, which the others read.
      number: () int32, of the micro-batch; -1: there is none.
      key: the run's.

    Returns:
      (what is for the next stage, packed entry, new model_state). The last
      stage's pass belongs to its backward pass: it returns zeros.
    """
    plan = self.plan

    def branch(s):
      received = self._received(s, batch, up)
      if s == plan.count - 1:
        kept = received if plan.keeps_last else ()
        nothing = plan.boundaries.zeros()
        return nothing, plan.entries.pack([kept], s), model_state
      x, targets = received
      own = self._own(params, model_state, s)
      keys = self.keys(key, number, s)
      y, entry, new = plans.forward(plan, s, *own, x, keys)
      return (
        plan.boundaries.pack([(y, targets)], s),
        plan.entries.pack([entry], s),
        plan.model_state.pack(new, s),
      )

    idle = lambda zeros: (*zeros[:2], model_state)
    return self.switch(branch, number >= 0, idle)

  def _received(self, s, batch, up):
    return batch if s == 0 else self.plan.boundaries.unpack(up, s - 1)[0]

  def _own(self, params, model_state, s):
    plan = self.plan
    return plan.params.unpack(params, s), plan.model_state.unpack(
      model_state, s
    )

  def backward(
    self, params, model_state, entry, batch, up, down, number, key
  ) -> Backward:
    """A micro-batch's way back through this stage; the last one's both ways.

    Args:
      params, model_state: packed, as they are now.
      entry: packed, what was kept of the micro-batch.
      batch: (inputs, targets), which a first stage that is the last reads.
      up: what the last stage works on.
      down: from the next stage, for the others.
      number: () int32, of the micro-batch; -1: there is none.
      key: the run's.
    """
    plan, end = self.plan, self.plan.count - 1

    def branch(s):
      own, keys = self._own(params, model_state, s), self.keys(key, number, s)
      if s == end:
        x, targets = self._received(s, batch, up)
        if plan.keeps_last:
          x, targets = plan.entries.unpack(entry, s)[0]
        out = self._back_from_loss(s, *own, x, targets, keys)
      else:
        kept = plan.entries.unpack(entry, s)[0]
        y, dy = plan.returns.unpack(down, s)[0]
        x, dx, grads, new = self._back(s, *own, kept, y, dy, keys)
        out = x, dx, grads, new, self._no_loss(), self._no_aux()
      x, dx, grads, new, loss, aux = out
      sent = plan.returns.zeros()
      if s > 0:
        sent = plan.returns.pack([(x, dx)], s - 1)
      return Backward(
        sent,
        plan.params.pack(grads, s),
        plan.model_state.pack(new, s),
        loss,
        aux,
      )

    idle = lambda zeros: zeros._replace(model_state=model_state)
    return self.switch(branch, number >= 0, idle)

  def _no_loss(self):
    return jnp.zeros((), jnp.float32)

  def _no_aux(self):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.plan.aux)

  def _back_from_loss(self, s, params, states, x, targets, keys):
    *blocks, end = self.plan.stages[s]

    def fn(params, x):
      x, new = plans.through(blocks, states, keys)(params[:-1], x)
      out = end.loss(params[-1], states[-1], x, targets, keys[-1])
      loss, (aux, state) = out
      return loss, (loss.astype(jnp.float32), aux, [*new, state])

    value, pull, (loss, aux, new) = plans.differentiate(fn, params, x, s > 0)
    grads, *dx = pull(jnp.ones_like(value))
    return x, dx[0] if dx else None, grads, new, loss, aux

  def _back(self, s, params, states, kept, y, dy, keys):
    """(input, its gradient, grads, model_states) of a stage but the last."""
    plan, mode, blocks = self.plan, self.plan.mode, self.plan.stages[s]
    if mode.graph:
      # Only the structure of this pullback is used: the forward pass that made
      # it is not computed, what was kept takes its place.
      zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), plan.inputs[s][0]
      )
      fn = plans.through(blocks, states, keys)
      _, pull, _ = plans.differentiate(fn, params, zeros, s > 0)
      grads, *dx = jax.tree.unflatten(jax.tree.structure(pull), kept)(dy)
      # y is no estimate of the input: nobody reads that in this mode.
      return zeros, dx[0] if dx else None, grads, states
    inputs, old = kept
    at_gradient = old if mode.old_gradient else params
    at_inverse = old if mode.old_inverse else params
    grads, new = [], []
    for i in reversed(range(len(blocks))):
      block, key, state = blocks[i], keys[i], states[i]
      known = mode.inputs or block.inverse is None
      if not known and mode.old_gradient == mode.old_inverse:
        back = block.reverse(at_gradient[i], state, y, dy, key)
        y, dy = back.x, back.dx
        grads.append(back.grads)
        new.append(back.model_state)
        continue
      x = inputs[i] if known else block.inverse(at_inverse[i], state, y, key)
      fn = lambda p, x, b=block, s=state, k=key: b.forward(p, s, x, k)
      first = s == 0 and i == 0
      _, pull, state = plans.differentiate(fn, at_gradient[i], x, not first)
      g, *dx = pull(dy)
      y, dy = x, dx[0] if dx else None
      grads.append(g)
      new.append(state)
    return y, dy, grads[::-1], new[::-1]

  def tick(
    self,
    params,
    model_state,
    flight: Flight,
    batch,
    number,
    key,
    most: int | None = None,
    ahead: Callable[[jax.Array], Packed] | None = None,
  ) -> tuple[Flight, Backward, Passes]:
    """One pass forward, and one back of an older micro-batch.

    The message down travels beside the forward pass, the one up beside the
    backward pass.

    Args:
      params, model_state: packed, as they are in this tick.
      flight: what is on its way.
      batch: (inputs, targets) of the micro-batch that enters.
      number: () int32, its number; -1: none enters.
      key: the run's.
      most: as for `fifo`.
      ahead: (the number of its micro-batch) -> the forward pass's parameters;
        None: params.

    Returns:
      (flight, what came back, of which micro-batches). The second's model_state
      is that after the backward pass, or after the forward pass where the whole
      graph is kept and there is no second one.
    """
    down = self.send_down(flight.down)
    entered = jnp.append(number, flight.entered[:-1])
    last = self.plan.count - 1
    passes = Passes(entered[self.stage()], entered[2 * last - self.stage()])
    queue, me = self.fifo(most), self.stage()
    fifo, entry = queue.pop(flight.fifo, passes.backward, me)
    sent, new_entry, stats = self.forward(
      params if ahead is None else ahead(passes.forward),
      model_state,
      batch,
      flight.up,
      passes.forward,
      key,
    )
    fifo = queue.push(fifo, new_entry, passes.forward, me, passes.forward >= 0)
    up = self.send_up(sent)
    if self.plan.mode.graph:
      model_state = stats
    back = self.backward(
      params, model_state, entry, batch, flight.up, down, passes.backward, key
    )
    # Else XLA for GPU may move the message up to the next tick's beginning,
    # where nothing is beside it.
    up, back = jax.lax.optimization_barrier((up, back))
    return Flight(up, back.down, fifo, entered), back, passes

  def nothing_in_flight(self, most: int | None = None) -> Flight:
    """As before the first tick; `most` as for `fifo`."""
    plan = self.plan
    return Flight(
      up=plan.boundaries.zeros(),
      down=plan.returns.zeros(),
      fifo=self.fifo(most).empty(),
      entered=jnp.full(2 * plan.count - 1, -1, jnp.int32),
    )

  def fifo(self, most: int | None = None) -> Fifo:
    """Where entries lie: as many as there are ticks between the two passes.

    Args:
      most: micro-batches that are in flight at most; None: that is no limit.
    """
    delays = map(self.plan.delay, range(self.plan.count))
    rows = (max(delay, 1) for delay in delays)  # taken out before put in
    return Fifo(
      self.plan.entries,
      tuple(n if most is None else min(n, most) for n in rows),
    )

  def send_up(self, content: Packed) -> Packed:
    return self._shift(content, 1)

  def send_down(self, content: Packed) -> Packed:
    return self._shift(content, -1)

  def _shift(self, content: Packed, by: int) -> Packed:
    """To the neighbour.

    The permutation is a whole one, as vmap asks for: what goes round the end
    is not read.
    """
    count, wire = self.plan.count, self.wire_dtype

    def cast(x, dtype):
      floating = jnp.issubdtype(x.dtype, jnp.floating)
      return x.astype(dtype) if wire is not None and floating else x

    sent = jax.tree.map(lambda x: cast(x, wire), content)
    pairs = [(s, (s + by) % count) for s in range(count)]
    got = jax.lax.ppermute(sent, self.axis, pairs)
    return jax.tree.map(lambda x, like: cast(x, like.dtype), got, content)
