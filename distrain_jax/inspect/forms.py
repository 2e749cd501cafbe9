"""The forms in which compiled programs write asynchronous collectives.

- `all-reduce-start` and `-done`, and the generic `async-start`, which names a
  computation; on GPUs a start may be marked `is_sync`.
- TPU's SparseCore: `call-start` or `custom-call-start`, `-update` and `-done`.
- TPU's collective fusions: a fusion that ends in the custom call
  `AsyncCollectiveStart`, others that carry it on beside their own work, and one
  with `AsyncCollectiveDone`, with loops in between. Each repeats the collective.
- A synchronous fusion that scatters what it reduces.
"""

from collections.abc import Mapping

from distrain_jax.inspect import collectives
from distrain_jax.inspect.collectives import base_kind
from distrain_jax.inspect.hlo import Computation, Instruction, Module


def fused_role(module: Module, x: Instruction) -> str:
  """TPU: whether a fusion starts, carries on or ends a collective."""
  if x.opcode != "fusion":
    return ""
  targets, carried = set(), False
  for name in x.called("calls"):
    for y in module.computations[name].instructions.values():
      if y.opcode == "custom-call":
        targets.add(y.target)
      elif y.opcode in collectives.KINDS:
        carried |= "async_collective_fusion_config" in y.config()
  for role in ("Start", "Done"):
    if f"AsyncCollective{role}" in targets:
      return role.lower()
  return "middle" if carried else ""


def start_of(
  computation: Computation, x: Instruction, starts: Mapping[str, Instruction]
) -> str | None:
  """Which of the starts a done ends, in the same computation; None: of none."""
  name = x.operands[0]
  while name not in starts:
    y = computation.instructions[name]
    through = y.opcode.endswith("-update") or y.opcode in ("bitcast", "copy")
    if not y.operands or not (through or y.opcode == "get-tuple-element"):
      break
    name = y.operands[0]
  if name in starts:
    return name
  if x.opcode != "fusion":
    return None
  # A fused done comes by way of the loops in between: the oldest of its form.
  fused = [n for n, y in starts.items() if y.opcode == "fusion"]
  return fused[0] if fused else None


def prepares(x: Instruction) -> bool:
  """SparseCore: a start without operands only makes ready."""
  return x.opcode.endswith("-start") and not x.operands


def begun_by(computation: Computation, x: Instruction) -> Instruction | None:
  """The prepared start that an update begins, by bringing its operands."""
  if not x.opcode.endswith("-update"):
    return None
  start = computation.instructions[x.operands[0]]
  return start if prepares(start) else None


def is_over(computation: Computation, x: Instruction) -> bool:
  """Whether what a done ends is over: it was synchronous, or plain compute."""
  start = computation.instructions.get(x.operands[0])
  started = start is not None and start.opcode.endswith("-start")
  return started and not prepares(start)


def is_asynchronous(module: Module, x: Instruction) -> bool:
  """Whether the device goes on while this collective runs."""
  if x.opcode == "fusion":
    return fused_role(module, x) == "start"
  if not x.opcode.endswith("-start"):
    return False
  return not x.config().get("collective_backend_config", {}).get("is_sync")


def is_scatter(computation: Computation, y: Instruction, n: int) -> bool:
  """Whether of an all-reduce in a fusion only the device's part is left."""
  limit = 0.9 * y.shape.bytes / n
  return base_kind(y.opcode) == "all-reduce" and collectives.only_sliced(
    computation.users(), y.name, limit
  )
