"""Bytes that each stage of a pipeline holds: PETRA's formula, and our buffers.

The formula is that of Rivaud et al., "PETRA", 2024,
https://arxiv.org/abs/2406.02052, as their code has it: a block's parameters,
running statistics and one input; where they are kept, the inputs and parameters
of the micro-batches in flight. Of an input of two streams it counts both only
where a block changes the shape. There are no gradients, no optimizer and no
activations inside a block in it.

Our buffers are those in the state of `distrain_jax.petra` without prediction.
One program runs on all devices, so each has room for what the largest stage
holds; the rest of that is padding. What a pass needs while it runs is in
neither.

Letters: J stages, numbered from 0; tau(s) = 2 (J - 1 - s), the ticks between a
micro-batch's two passes on stage s; k micro-batches accumulated.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distrain_jax import stages
from distrain_jax.inspect import table
from distrain_jax.pipelining import plan as plans
from distrain_jax.pipelining.engine import Engine
from distrain_jax.pipelining.optimizer import Optimizer, Transforms
from distrain_jax.pipelining.packing import Packing
from distrain_jax.pipelining.plan import Plan
from distrain_jax.stages import Block

# The paper's rows: `buffer` of petra -> whether all inputs are kept, and
# parameters.
ROWS = {
  "input_params": (True, True),
  "input": (True, False),
  "params": (False, True),
  "none": (False, False),
}


class Formula(NamedTuple):
  """Bytes of one stage, summed over its blocks."""

  model: int  # parameters and running statistics
  input: int  # of one micro-batch
  plain: int  # tau inputs of blocks that are not reversible
  reversible: int  # tau inputs of those that are
  params: int  # ceil(tau / k) times


class Buffers(NamedTuple):
  """Bytes on one stage's device, by field of the state."""

  used: dict[str, int]
  padding: dict[str, int]


class StageMemory(NamedTuple):
  """What `stage_memory` returns; prints as tables, in GB of 1e9 bytes."""

  names: tuple[str, ...]  # of each stage's blocks
  formula: tuple[Formula, ...]
  buffers: dict[str, tuple[Buffers, ...]]  # by key of ROWS

  def total(self, buffer: str, *, first: bool | None = None) -> int:
    """Bytes of all stages, by the formula.

    Args:
      buffer: a key of ROWS.
      first: whether the first stage's inputs are kept. None: as the paper
        counts, only where all are; but it cannot do without them.
    """
    inputs, params = ROWS[buffer]
    size = 0
    for s, f in enumerate(self.formula):
      plain = True if s else inputs if first is None else first
      size += f.model + f.input + f.plain * plain
      size += f.reversible * inputs + f.params * params
    return size

  def saving(self, buffer: str = "none", *, first: bool | None = None) -> float:
    """The fraction of `total` of keeping everything that is not held."""
    most = self.total("input_params", first=first)
    return 1 - self.total(buffer, first=first) / most

  def __str__(self) -> str:
    paper, without, always = (
      f"{100 * self.saving(first=first):.1f} %" for first in (None, False, True)
    )
    return (
      "PETRA by stage, GB: the formula's model, input and kept inputs; of our "
      f"buffers, what is used and what is padding.\n\n{self._stages()}\n\n"
      f"All stages, by what is kept, GB.\n\n{self._rows()}\n"
      f"The formula's saving of {paper} has the first stage's inputs in the "
      f"upper two rows only. It is {without} with them in none, and {always} "
      "with them in all, as our buffers have them."
    )

  def _stages(self) -> str:
    headers = ["stage", "tau", "model", "input", "kept", "used", "padding"]
    cells, last = [], len(self.formula) - 1
    for s, (f, b) in enumerate(zip(self.formula, self.buffers["none"])):
      held = (sum(sizes.values()) for sizes in b)
      sizes = (f.model, f.input, f.plain, *held)
      cells.append([self.names[s], str(2 * (last - s)), *map(_gb, sizes)])
    return table.render(headers, cells, "l" + "r" * 6)

  def _rows(self) -> str:
    headers = ["buffer", "formula", "saved, %"]
    headers += ["used", "saved, %", "padding", "fullest device"]
    cells, most = [], self._held("input_params")[0]
    for buffer in ROWS:
      used, padding = self._held(buffer)
      each = (used + padding) // len(self.formula)
      of_formula = f"{100 * self.saving(buffer):.1f}"
      of_used = f"{100 * (1 - used / most):.1f}"
      sizes = (_gb(x, 2) for x in (self.total(buffer), used, padding, each))
      formula, *rest = sizes
      cells.append([buffer, formula, of_formula, rest[0], of_used, *rest[1:]])
    return table.render(headers, cells, "l" + "r" * 6)

  def _held(self, buffer: str) -> tuple[int, int]:
    """(used, padding) of all devices."""
    of_all = zip(*self.buffers[buffer])
    return tuple(sum(sum(x.values()) for x in sizes) for sizes in of_all)


def stage_memory(
  network: Sequence[Block | Sequence[Block]],
  *,
  shapes: Any,
  example: Any,
  inputs: str | None = None,
  accumulate: int = 1,
  tx: Transforms | None = None,
) -> StageMemory:
  """What each stage would hold; nothing is computed.

  Args:
    network, shapes, example, inputs, accumulate: as for `petra`.
    tx: its optimizer, whose state is then among our buffers.
  """
  options = {"shapes": shapes, "example": example, "inputs": inputs}
  made = {
    name: plans.make_plan(network, mode=plans.BUFFERS[name], **options)
    for name in ROWS
  }
  plan = made["none"]
  params, model_state = stages.parts(shapes)
  formula = []
  for s in range(plan.count):
    own = zip(*plan.own(params, model_state, s), plan.inputs[s])
    terms = [
      _formula(block, *of, plan.delay(s), accumulate)
      for block, of in zip(plan.stages[s], own)
    ]
    formula.append(Formula(*map(sum, zip(*terms))))
  return StageMemory(
    tuple(" ".join(b.name for b in blocks) for blocks in plan.stages),
    tuple(formula),
    {name: _buffers(p, accumulate, tx) for name, p in made.items()},
  )


def _formula(block: Block, params, model_state, x, tau: int, k: int) -> Formula:
  """Of one block."""
  reversible = block.inverse is not None
  if (reversible or block.loss is not None) and isinstance(x, tuple):
    x = x[0]  # one stream
  own, one = _bytes(params), _bytes(x)
  return Formula(
    model=own + _bytes(model_state),
    input=one,
    plain=0 if reversible else tau * one,
    reversible=tau * one if reversible else 0,
    params=own * math.ceil(tau / k),
  )


def _buffers(plan: Plan, k: int, tx: Transforms | None) -> tuple[Buffers, ...]:
  """Of all stages, in the mode of the plan."""
  engine = Engine(plan, "stage")
  flight = jax.eval_shape(engine.nothing_in_flight)
  own: dict[str, Packing] = {
    "params": plan.params,
    "model_state": plan.model_state,
  }
  if tx is not None:
    own["opt_state"] = Optimizer("stage_memory", engine, tx, None).packing
  if k > 1:
    own["grads"] = plan.params
  messages = _bytes((flight.up, flight.down))
  found = []
  for s in range(plan.count):
    total = {n: _bytes(jax.eval_shape(p.zeros)) for n, p in own.items()}
    total |= {"messages": messages, "fifo": _bytes(flight.fifo)}
    used = {name: _used(p, s) for name, p in own.items()}
    ways = (plan.boundaries, plan.returns) if s else ()
    used["messages"] = sum(_used(way, s - 1) for way in ways)
    used["fifo"] = plan.delay(s) * _used(plan.entries, s)
    padding = {name: size - used[name] for name, size in total.items()}
    found.append(Buffers(used, padding))
  return tuple(found)


def _used(packing: Packing, worker: int) -> int:
  return packing.used[worker] + _bytes(packing.alike)


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def _gb(size: int, digits: int = 3) -> str:
  return f"{size / 1e9:.{digits}f}"
