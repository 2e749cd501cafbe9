"""What an instruction costs on a chip: a roofline, not a simulation.

The seconds of an instruction are the larger of its operations over the chip's
peak and its bytes over the bandwidth of the main memory (Williams et al., 2009,
https://doi.org/10.1145/1498765.1498785). Bytes are what crosses the border of a
fusion; what a program keeps on the chip (TPU: memory space 1) is free, and of
what is only sliced, or updated in place, only the slice counts. A collective
that is fused with compute is not counted here: it has its own seconds.
"""

from typing import NamedTuple

from distrain_jax.inspect.collectives import KINDS, base_kind
from distrain_jax.inspect.flops import flops
from distrain_jax.inspect.hardware import Chip
from distrain_jax.inspect.hlo import Computation, Instruction, Module, Shape

# Names for a value, or for a part of one: nothing moves.
FREE = {
  "add-dependency",
  "after-all",
  "bitcast",
  "constant",
  "get-tuple-element",
  "optimization-barrier",
  "parameter",
  "partition-id",
  "replica-id",
  "tuple",
}
_SLICES = ("dynamic-slice", "slice", "gather")


class Cost(NamedTuple):
  flops: dict[str, float]  # by dtype of the operands
  bytes: float  # from and to main memory
  seconds: float
  unknown: tuple[str, ...] = ()


def cost(
  module: Module, computation: Computation, x: Instruction, chip: Chip
) -> Cost:
  """Of one instruction that calls nothing but what is fused into it."""
  if x.opcode in FREE or x.target == "AllocateBuffer":
    return Cost({}, 0.0, 0.0)
  operations, unknown = flops(module, computation, x)
  moved = _bytes(module, computation, x)
  busy = sum(n / chip.peak(dtype) for dtype, n in operations.items())
  seconds = max(busy, moved / chip.memory_bandwidth)
  return Cost(operations, moved, seconds, tuple(unknown))


def _bytes(module: Module, computation: Computation, x: Instruction) -> float:
  operands = [computation.instructions[name] for name in x.operands]
  if x.opcode in ("fusion", "fusion-start") and x.called("calls"):
    return _of_fusion(module.computations[x.called("calls")[0]], operands)
  if x.opcode in _SLICES:
    return 2 * _outside(x.shape)
  if x.opcode == "dynamic-update-slice":
    return 2 * _outside(operands[1].shape)
  return _outside(x.shape) + sum(_outside(y.shape) for y in operands)


def _of_fusion(body: Computation, operands: list[Instruction]) -> float:
  users = body.users()
  total = 0.0
  for parameter, operand in zip(body.parameters(), operands):
    total += min(_outside(operand.shape), _read(body, users, parameter))
  root = body.root
  outputs = [root]
  if root.opcode == "tuple":
    outputs = [body.instructions[name] for name in root.operands]
  return total + sum(_written(body, x) for x in outputs)


def _read(body: Computation, users, x: Instruction) -> float:
  """Bytes of a fusion's parameter that are read."""
  total = 0.0
  for y in users.get(x.name, []):
    if y.opcode in _SLICES and y.operands[0] == x.name:
      total += y.shape.bytes
    elif y.opcode == "dynamic-update-slice" and y.operands[0] == x.name:
      continue  # what is not written stays where it is
    elif y.opcode == "bitcast":
      total += _read(body, users, y)
    elif base_kind(y.opcode) in KINDS or y.opcode == "tuple":
      continue  # travels beside this compute, or is only handed on
    else:
      return float(x.shape.bytes)
  return min(total, float(x.shape.bytes))


def _written(body: Computation, x: Instruction) -> float:
  if x.opcode == "bitcast":
    return min(_outside(x.shape), _written(body, _operand(body, x, 0)))
  if x.opcode == "dynamic-update-slice":
    return min(_outside(x.shape), float(_operand(body, x, 1).shape.bytes))
  if x.opcode == "parameter" or base_kind(x.opcode) in KINDS:
    return 0.0
  return _outside(x.shape)


def _operand(body: Computation, x: Instruction, i: int) -> Instruction:
  return body.instructions[x.operands[i]]


def _outside(shape: Shape) -> float:
  """Bytes of a shape that lie in the device's main memory."""
  return float(
    sum(leaf.bytes for leaf in shape.arrays() if leaf.memory_space == 0)
  )
