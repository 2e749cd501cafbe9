"""What each stage of a pipeline holds, keeps and sends: all of it static.

Letters: J stages, numbered from 0; tau(s) = 2 (J - 1 - s), the ticks between a
micro-batch's forward and its backward pass on stage s.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax import stages
from distrain_jax.pipelining.packing import Packing, packing
from distrain_jax.stages import Block


class Mode(NamedTuple):
  """What a stage keeps between a micro-batch's two passes."""

  graph: bool = False  # everything that its backward pass reads
  inputs: bool = False  # what went into all of its blocks, not only the plain
  old_inverse: bool = False  # inverts with the parameters of the forward pass
  old_gradient: bool = False  # takes the gradient at those parameters

  @property
  def params(self) -> bool:
    """Whether the parameters of the forward pass are kept."""
    return self.old_inverse or self.old_gradient


BUFFERS = {
  "graph": Mode(graph=True),
  "input_params": Mode(inputs=True, old_gradient=True),
  "input": Mode(inputs=True),
  "params": Mode(old_inverse=True, old_gradient=True),
  "params_gradient": Mode(old_gradient=True),
  "none": Mode(),
}


class Plan(NamedTuple):
  """Of one network on J stages; see `make_plan`."""

  stages: tuple[tuple[Block, ...], ...]
  mode: Mode
  inputs: tuple[tuple[Any, ...], ...]  # [stage][block]: shapes of what goes in
  targets: Any
  aux: Any  # shapes of the loss's aux
  params: Packing
  model_state: Packing
  boundaries: Packing  # [s]: (streams, targets) from stage s to s + 1
  returns: Packing  # [s]: (streams, their gradient) from stage s + 1 to s
  entries: Packing  # [s]: what stage s keeps of a micro-batch
  keeps_last: bool  # whether the last stage's entries have its input

  @property
  def count(self) -> int:
    return len(self.stages)

  def delay(self, stage: int) -> int:
    """tau: ticks from a micro-batch's forward pass to its backward pass."""
    return 2 * (self.count - 1 - stage)

  def starts(self) -> list[int]:
    """Each stage's first block's place in the network."""
    sizes = [len(stage) for stage in self.stages]
    return [sum(sizes[:s]) for s in range(len(sizes))]

  def own(self, params: Any, model_state: Any, stage: int):
    """(params, model_state) of a stage's blocks: lists, from the network's."""
    pairs = [
      stages.of_block(b.name, params, model_state) for b in self.stages[stage]
    ]
    return [p for p, _ in pairs], [s for _, s in pairs]

  def network(self, params: Sequence[Any], model_states: Sequence[Any]):
    """Undoes `own`, for all stages' lists: (params, model_state)."""
    out, states = {}, {}
    for blocks, mine, kept in zip(self.stages, params, model_states):
      for block, tree, state in zip(blocks, mine, kept):
        if jax.tree.leaves(tree):
          out[block.name] = tree
        states[block.name] = state
    return out, stages.joined(states)

  def kind(self, stage: int) -> tuple[Any, ...]:
    """Stages with equal ones run the same code."""
    s, end = stage, self.count - 1
    kinds = [
      ("block", b.name) if b.kind is None else b.kind for b in self.stages[s]
    ]
    lie = [x.parts[s] for x in (self.params, self.model_state, self.entries)]
    ways = [
      x.parts[b]
      for x in (self.boundaries, self.returns)
      for b in (s - 1, s)
      if 0 <= b < end
    ]
    return (s == 0, s == end, *kinds, *lie, *ways)


def check_buffer(name: str, buffer: str) -> Mode:
  if buffer not in BUFFERS:
    raise ValueError(
      f"{name}: `buffer` is one of {', '.join(BUFFERS)}; got {buffer!r}."
    )
  return BUFFERS[buffer]


def as_stages(network: Sequence[Any]) -> tuple[tuple[Block, ...], ...]:
  """A network as stages: each a block, or a sequence of neighbouring ones."""
  found = tuple((s,) if isinstance(s, Block) else tuple(s) for s in network)
  if not found or any(len(s) == 0 for s in found):
    raise ValueError("stages: every stage needs at least one block.")
  stages.check_blocks([b for s in found for b in s])
  return found


def make_plan(
  network: Sequence[Any],
  *,
  shapes: Any,
  example: Any,
  inputs: str | None,
  mode: Mode,
  keep_last: bool = False,
) -> Plan:
  """Finds out everything that is static.

  Args:
    network: see `as_stages`.
    shapes: the model's params, or `Variables`, as arrays or shapes.
    example: a micro-batch of one replica, as arrays or shapes.
    inputs: see `stages.inputs_and_targets`.
    mode: what is kept between the two passes.
    keep_last: whether the last stage keeps its input too, as it must where
      its backward pass does not follow at once.

  Raises:
    ValueError: where blocks do not fit together; see `stages`.
  """
  cut = as_stages(network)
  blocks = [b for s in cut for b in s]
  x, targets = stages.inputs_and_targets(example, inputs)
  flows = stages.abstract_streams(blocks, shapes, x, targets)
  struct = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
  targets = jax.tree.map(struct, targets)
  params, model_state = jax.tree.map(struct, stages.parts(shapes))
  _check_names(blocks, params)
  by_stage, at = [], 0
  for blocks_of in cut:
    by_stage.append(tuple(flows[at : at + len(blocks_of)]))
    at += len(blocks_of)
  passed = [(ins[0], targets) for ins in by_stage[1:]]
  back = [(ins[0], ins[0]) for ins in by_stage[1:]]
  plan = Plan(
    stages=cut,
    mode=mode,
    inputs=tuple(by_stage),
    targets=targets,
    aux=None,
    params=None,
    model_state=None,
    boundaries=packing([[x] for x in passed]),
    returns=packing([[x] for x in back]),
    entries=None,
    keeps_last=keep_last,
  )
  own = [plan.own(params, model_state, s) for s in range(plan.count)]
  end = own[-1][0][-1], own[-1][1][-1]
  key = jax.eval_shape(lambda: jax.random.key(0))
  loss, (aux, _) = jax.eval_shape(
    blocks[-1].loss, *end, flows[-1], targets, key
  )
  _check_loss(blocks[-1], loss, aux)
  plan = plan._replace(
    aux=aux,
    params=packing([p for p, _ in own]),
    model_state=packing([s for _, s in own]),
  )
  entries = []
  for s in range(plan.count):
    if s == plan.count - 1:
      entries.append([(by_stage[s][0], targets)] if keep_last else [()])
    else:
      entries.append([_entry(plan, s, *own[s], key)])
  return plan._replace(entries=packing(entries))


def _check_names(blocks, params) -> None:
  known = [b.name for b in blocks]
  for name in params:
    if name not in known:
      raise ValueError(
        f"stages: the parameters have {name!r}, but no block has that name; "
        f"the blocks are {known}."
      )


def _check_loss(block, loss, aux) -> None:
  if loss.shape != () or any(x.shape != () for x in jax.tree.leaves(aux)):
    raise ValueError(
      f"stages: block {block.name!r} must return a scalar loss and a dict of "
      f"scalars, means over the rows; got {stages.described(loss)} and "
      f"{stages.described(aux)}."
    )


def _entry(plan: Plan, stage: int, params, states, key):
  """Shapes of what a stage keeps of a micro-batch."""
  fn = lambda params, states, x, key: forward(
    plan, stage, params, states, x, [key] * len(plan.stages[stage])
  )[1]
  return jax.eval_shape(fn, params, states, plan.inputs[stage][0], key)


def forward(plan: Plan, stage: int, params, states, x, keys):
  """A stage's pass forward, not the last one's.

  Args:
    plan: the pipeline's.
    stage: which.
    params, states, keys: lists, one a block.
    x: what goes in.

  Returns:
    (y, entry, states): what comes out, what is to be kept of the micro-batch,
    the blocks' new model_state.
  """
  blocks, mode = plan.stages[stage], plan.mode
  if mode.graph:
    fn = through(blocks, states, keys)
    y, pull, new = differentiate(fn, params, x, stage > 0)
    return y, tuple(jax.tree.leaves(pull)), new
  kept, new = [], []
  for block, p, state, key in zip(blocks, params, states, keys):
    kept.append(x if mode.inputs or block.inverse is None else ())
    x, state = block.forward(p, state, x, key)
    new.append(state)
  return x, (tuple(kept), tuple(params) if mode.params else ()), new


def through(blocks, states, keys) -> Callable[..., Any]:
  """(params, x) -> (y, model_states) of neighbouring blocks."""

  def fn(params, x):
    new = []
    for block, p, state, key in zip(blocks, params, states, keys):
      x, state = block.forward(p, state, x, key)
      new.append(state)
    return x, new

  return fn


def differentiate(fn, params, x, with_x: bool):
  """`jax.vjp(fn, params[, x], has_aux=True)`: the input may be whole numbers."""
  if with_x:
    return jax.vjp(fn, params, x, has_aux=True)
  return jax.vjp(lambda params: fn(params, x), params, has_aux=True)
