"""Which values of a scheduled program live at the same time.

A value's buffer lives from the instruction that makes it to the last one that
reads it, or reads anything that lies in its memory: elements of tuples, loops,
and updates in place.
"""

from typing import NamedTuple

from distrain_jax.inspect.hlo import Computation, Instruction, Module, Shape

_THROUGH = ("bitcast", "optimization-barrier", "while")

# (instruction, element of its result)
Buffer = tuple[str, int]


class Array(NamedTuple):
  dtype: str  # XLA's name
  dims: tuple[int, ...]
  bytes: int


def at_peak(module: Module) -> list[Array]:
  """Temporary arrays in main memory that live when most bytes do.

  The program's arguments and results are left out.
  """
  return _peak(module, module.entry)[1]


def _peak(module: Module, computation: Computation) -> tuple[int, list[Array]]:
  places = _places(module, computation)
  ends = _ends(computation, places)
  live: dict[Buffer, list[Array]] = {}
  held, best = 0, (0, [])
  for at, x in enumerate(computation.instructions.values()):
    for buffer in _made(x, places[x.name]) & ends.keys():
      live[buffer] = _arrays(x, buffer[1])
      held += sum(a.bytes for a in live[buffer])
    inner, arrays = _inside(module, x)
    if held + inner > best[0]:
      now = [a for group in live.values() for a in group]
      best = held + inner, now + arrays
    for buffer in [b for b, end in ends.items() if end == at]:
      held -= sum(a.bytes for a in live.pop(buffer, []))
  return best


def _ends(computation: Computation, places) -> dict[Buffer, int]:
  """Buffer -> the last instruction that reads it; not those of the result."""
  ends: dict[Buffer, int] = {}
  for at, x in enumerate(computation.instructions.values()):
    for name in (*x.operands, x.name):
      for element in places[name]:
        ends.update(dict.fromkeys(element, at))
  for element in places[computation.root.name]:
    for buffer in element:
      ends.pop(buffer, None)  # one buffer may be several elements
  return ends


def _made(x: Instruction, elements: list[set[Buffer]]) -> set[Buffer]:
  if x.opcode in ("parameter", "constant"):
    return set()
  return {b for element in elements for b in element if b[0] == x.name}


def _arrays(x: Instruction, element: int) -> list[Array]:
  shape: Shape = x.shape.elements[element] if x.shape.elements else x.shape
  return [
    Array(a.dtype, a.dims, a.bytes)
    for a in shape.arrays()
    if a.memory_space == 0
  ]


def _inside(module: Module, x: Instruction) -> tuple[int, list[Array]]:
  """The peak of what an instruction runs, beside what is outside."""
  names = x.called("body") if x.opcode == "while" else ()
  if x.opcode in ("call", "conditional"):
    keys = ("to_apply", "branch_computations")
    names = x.called(*keys, "true_computation", "false_computation")
  peaks = [_peak(module, module.computations[name]) for name in names]
  return max(peaks, key=lambda p: p[0], default=(0, []))


def _places(
  module: Module, computation: Computation
) -> dict[str, list[set[Buffer]]]:
  """Instruction -> for each element of its result, the buffers it lies in."""
  places: dict[str, list[set[Buffer]]] = {}
  for x in computation.instructions.values():
    operands = [places[name] for name in x.operands]
    own = [{(x.name, i)} for i in range(len(x.shape.elements) or 1)]
    if x.opcode == "tuple":
      own = [set().union(*element) for element in operands]
    elif x.opcode == "get-tuple-element":
      index = int(x.attributes["index"])
      within = operands[0]
      own = [within[index] if index < len(within) else set().union(*within)]
      if x.shape.elements:  # a tuple in a tuple: all of it
        own *= len(x.shape.elements)
    elif x.opcode in _THROUGH and operands:
      own = operands[0]
    elif x.opcode.endswith(("-done", "-update")) and operands:
      own = [set().union(*operands[0])] * len(own)
    elif _updated(module, computation, x) is not None:
      own = places[x.operands[_updated(module, computation, x)]]
    places[x.name] = own
  return places


def _updated(
  module: Module, computation: Computation, x: Instruction
) -> int | None:
  """Which operand an instruction updates in place."""
  if x.opcode == "dynamic-update-slice":
    return 0
  if x.opcode != "fusion" or x.shape.elements:
    return None
  body = module.computations[x.called("calls")[0]]
  y = body.root
  while y.opcode == "bitcast":
    y = body.instructions[y.operands[0]]
  if y.opcode != "dynamic-update-slice":
    return None
  target = body.instructions[y.operands[0]]
  while target.opcode == "bitcast":
    target = body.instructions[target.operands[0]]
  return int(target.arguments) if target.opcode == "parameter" else None
