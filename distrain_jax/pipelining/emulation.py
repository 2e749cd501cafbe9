"""PETRA on one device, tick by tick, with what PETRA does not keep.

One device takes the ticks of all stages, as `dj.petra` with buffer="none" on one
pipeline, and remembers the parameters of the last 2 J - 1 ticks, so that a
micro-batch's gradients can be compared with others: see `quality`.

Letters: J stages, numbered from 0; k micro-batches accumulated.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distrain_jax import gradients, stages
from distrain_jax.pipelining import plan as plans
from distrain_jax.pipelining.optimizer import Transforms
from distrain_jax.stages import Block, Reversed


class MicroBatch:
  """One on its way; x and dx are what goes into its next pass."""

  def __init__(self, number: int, batch: Any, keys: list[Any], watched: bool):
    self.number, self.batch, self.keys = number, batch, keys
    self.watched = watched
    self.x, self.dx = batch[0], None
    self.inputs: dict[str, Any] = {}  # of blocks, where they are kept
    self.grads: dict[str, Any] = {}  # of blocks, if it is watched
    # |x' - x| / |x| of reconstructed inputs, of blocks, if it is watched.
    self.errors: dict[str, jax.Array] = {}


class Ticked(NamedTuple):
  """What a tick has to tell."""

  loss: jax.Array | None  # of the micro-batch on the last stage, if any
  left: MicroBatch | None  # the one that the first stage is done with, if any


class Emulation:
  """PETRA on one device, tick by tick.

  Args:
    network, tx, accumulate, clip_norm: as for `dj.petra`.
    model: the params to start from, or `Variables`.
    key: the run's.
  """

  def __init__(
    self,
    network: Sequence[Block | Sequence[Block]],
    tx: Transforms,
    model: Any,
    key: jax.Array,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
  ):
    gradients.check_accumulate("emulation.Emulation", accumulate)
    gradients.check_clip_norm("emulation.Emulation", clip_norm)
    self.stages = plans.as_stages(network)
    self.blocks = [b for stage in self.stages for b in stage]
    self.key, self.k, self.clip_norm = key, accumulate, clip_norm
    names = [b.name for b in self.blocks]
    given = stages.parts(model)
    # {block: (params, model_state)}.
    self.own = {name: stages.of_block(name, *given) for name in names}
    self.tx = {n: tx[n] if isinstance(tx, Mapping) else tx for n in names}
    self.opt_state = {n: self.tx[n].init(self.own[n][0]) for n in names}
    self.sums: dict[str, Any] = {}
    self.counted = [0] * len(self.stages)
    self.entered = 0
    self.flying: collections.deque[MicroBatch] = collections.deque()
    # What `own` was in the last ticks, the latest last.
    self.history = collections.deque(maxlen=2 * len(self.stages) - 1)
    self._alike = alike(self.blocks)
    sizes = [len(stage) for stage in self.stages]
    self.starts = [sum(sizes[:s]) for s in range(len(sizes))]

  def tick(self, x: Any, targets: Any, *, watch: bool = False) -> Ticked:
    """A micro-batch enters, and every stage takes one each way.

    Args:
      x, targets: what the first block gets, and the loss.
      watch: whether to keep its inputs and gradients until it leaves, 2 (J - 1)
        ticks later.
    """
    now, last = dict(self.own), len(self.stages) - 1
    self.history.append(now)
    keys = _keys(self.key, self.entered, len(self.blocks))
    new = MicroBatch(self.entered, (x, targets), keys, watch)
    self.flying.append(new)
    loss, arrived = None, {}
    for m in self.flying:
      age = self.entered - m.number
      stage = min(age, 2 * last - age)
      if age < last:
        self._up(m, stage, now)
        continue
      value, arrived[stage] = self._down(m, stage, now)
      loss = value if age == last else loss
    self.entered += 1
    for stage, grads in arrived.items():
      self._learn(stage, grads)
    done = self.entered - 1 - self.flying[0].number == 2 * last
    return Ticked(loss, self.flying.popleft() if done else None)

  def model(self) -> tuple[Any, Any]:
    """(params, model_state) of the whole network."""
    params = {n: p for n, (p, _) in self.own.items() if jax.tree.leaves(p)}
    return params, stages.joined({n: s for n, (_, s) in self.own.items()})

  def _places(self, stage: int) -> range:
    start = self.starts[stage]
    return range(start, start + len(self.stages[stage]))

  def _up(self, m: MicroBatch, stage: int, now) -> None:
    for i in self._places(stage):
      block = self.blocks[i]
      if m.watched or block.inverse is None:
        m.inputs[block.name] = m.x
      code, own = self._alike[block.name], now[block.name]
      m.x, _ = forward(code, own, m.x, m.keys[i])

  def _down(self, m: MicroBatch, stage: int, now) -> tuple[Any, Any]:
    """(the loss, if it is taken here; {block: gradient}) of a stage."""
    loss, grads, places = None, {}, self._places(stage)
    if stage == len(self.stages) - 1:
      for i in places[:-1]:  # forth and back in the same tick, as autodiff
        m.inputs[self.blocks[i].name] = m.x
        code, own = self._alike[self.blocks[i].name], now[self.blocks[i].name]
        m.x, _ = forward(code, own, m.x, m.keys[i])
    for i in reversed(places):
      block, key = self.blocks[i], m.keys[i]
      name, code, own = block.name, self._alike[block.name], now[block.name]
      exact = block.inverse is None or stage == len(self.stages) - 1
      if block.loss is not None:
        loss, back = _from_loss(code, i > 0, own, m.x, m.batch[1], key)
      elif exact:
        back = _back(code, i > 0, own, m.inputs[name], m.dx, key)
      else:
        back = reverse(code, own, m.x, m.dx, key)
        if m.watched:
          m.errors[name] = relative_error(back.x, m.inputs[name])
      m.x, m.dx, grads[name] = back.x, back.dx, back.grads
      self.own[name] = own[0], back.model_state
    if m.watched:
      m.grads |= grads
    return loss, grads

  def _learn(self, stage: int, grads) -> None:
    """Takes a gradient in, and updates after every k of them."""
    for name, g in grads.items():
      self.sums[name] = _add(self.sums[name], g) if name in self.sums else g
    self.counted[stage] += 1
    if self.counted[stage] % self.k:
      return
    mean = _mean({n: self.sums.pop(n) for n in grads}, self.k, self.clip_norm)
    for name, g in mean.items():
      params, model_state = self.own[name]
      params, self.opt_state[name] = _update(
        self.tx[name], g, self.opt_state[name], params
      )
      self.own[name] = params, model_state

  def gradient(self, m: MicroBatch, at, first: int = 0) -> dict[str, Any]:
    """{block: gradient} by back-propagation, of the blocks from `first` on.

    Args:
      m: whose batch and keys are used.
      at: {block: (params, model_state)}.
      first: place of a block in the network.
    """
    x, inputs, grads = m.batch[0], [], {}
    for block, key in zip(self.blocks[:-1], m.keys):
      inputs.append(x)
      x, _ = forward(self._alike[block.name], at[block.name], x, key)
    for i in reversed(range(first, len(self.blocks))):
      name, key = self.blocks[i].name, m.keys[i]
      code = self._alike[name]
      if code.loss is not None:
        _, back = _from_loss(code, i > 0, at[name], x, m.batch[1], key)
      else:
        back = _back(code, i > 0, at[name], inputs[i], back.dx, key)
      grads[name] = back.grads
    return grads


def alike(blocks: Sequence[Block]) -> dict[str, Block]:
  """{block: the first one that runs the same code}: it is compiled once."""
  first: dict[Any, Block] = {}
  return {
    b.name: b if b.kind is None else first.setdefault(b.kind, b) for b in blocks
  }


@functools.partial(jax.jit, static_argnums=2)
def _keys(key, number, count: int) -> list[Any]:
  """Of all blocks, the same in all passes of a micro-batch."""
  key = jax.random.fold_in(key, number)
  return [jax.random.fold_in(key, i) for i in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def forward(block: Block, own, x, key):
  return block.forward(*own, x, key)


@functools.partial(jax.jit, static_argnums=0)
def reverse(block: Block, own, y, dy, key) -> Reversed:
  return block.reverse(*own, y, dy, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _back(block: Block, with_x: bool, own, x, dy, key) -> Reversed:
  """At the true input."""
  params, model_state = own
  fn = lambda params, x: block.forward(params, model_state, x, key)
  _, pull, model_state = plans.differentiate(fn, params, x, with_x)
  grads, *dx = pull(dy)
  return Reversed(x, dx[0] if dx else None, grads, model_state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _from_loss(block: Block, with_x: bool, own, x, targets, key):
  """(loss, Reversed) of the last block."""
  params, model_state = own

  def fn(params, x):
    loss, (_, new) = block.loss(params, model_state, x, targets, key)
    return loss, new

  loss, pull, new = plans.differentiate(fn, params, x, with_x)
  grads, *dx = pull(jnp.ones_like(loss))
  return loss, Reversed(x, dx[0] if dx else None, grads, new)


@jax.jit
def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mean(sums, k: int, clip_norm: float | None):
  """The mean of k gradients of one stage, no longer than clip_norm."""
  mean = jax.tree.map(lambda x: x / k, sums)
  if clip_norm is None:
    return mean
  norm = jnp.sqrt(gradients.squared_norm(mean))
  return gradients.scale_tree(mean, gradients.clip_scale(norm, clip_norm))


@functools.partial(jax.jit, static_argnums=0)
def _update(tx: optax.GradientTransformation, grads, opt_state, params):
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


relative_error = jax.jit(stages.relative_error)
