"""XLA's text of a compiled program, parsed: no more of it than a report needs.

A module holds computations, a computation holds instructions in the order in
which the device runs them (`is_scheduled=true`), and an instruction has a
shape, an opcode, operands and attributes, kept as text. The grammar is that of
`HloModule::ToString` (openxla.org/xla/hlo_dump): one instruction a line,
brackets that nest, strings that may hold anything.
"""

import functools
import json
import math
import re
from typing import Any, NamedTuple

# Bits of an element; what has no bytes of its own (token, opaque) is absent.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
BITS |= {f"{kind}{n}": n for kind in "su" for n in (1, 2, 4, 8, 16, 32, 64)}
BITS |= {f"f{n}": n for n in (16, 32, 64)}

# Strings are skipped whole, so that brackets inside them do not count.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/|[()\[\]{},]')
_OPEN, _CLOSE = "([{", ")]}"


class Shape(NamedTuple):
  """An array, or a tuple of shapes."""

  dtype: str  # as XLA writes it: f32, bf16, s32, ...; "tuple"
  dims: tuple[int, ...] = ()
  layout: str = ""  # e.g. "{1,0:T(8,128)S(1)}"
  elements: tuple["Shape", ...] = ()  # of a tuple

  @property
  def size(self) -> int:
    """Elements of an array."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Of an array or of all arrays of a tuple, without padding."""
    if self.dtype == "tuple":
      return sum(x.bytes for x in self.elements)
    return self.size * _bits(self.dtype) // 8

  @property
  def memory_space(self) -> int:
    """0 for the device's main memory; TPU: 1 is on the chip (VMEM)."""
    _, found, rest = self.layout.rpartition("S(")
    return int(rest.split(")")[0]) if found else 0

  def arrays(self) -> list["Shape"]:
    """The leaves: itself, or those of its elements."""
    if self.dtype != "tuple":
      return [self]
    return [leaf for x in self.elements for leaf in x.arrays()]


def _bits(dtype: str) -> int:
  if dtype in BITS:
    return BITS[dtype]
  small = re.match(r"f(\d+)e\d", dtype)  # f8e4m3fn, f4e2m1fn, ...
  return int(small[1]) if small else 0


class Instruction(NamedTuple):
  name: str
  shape: Shape
  opcode: str
  arguments: str  # what is between the brackets, e.g. a constant's value
  operands: tuple[str, ...]  # names
  attributes: dict[str, str]  # as text, e.g. {"calls": "%fused_computation"}
  root: bool

  def called(self, *keys: str) -> tuple[str, ...]:
    """Names of the computations that these attributes name, in order."""
    found = []
    for key in keys:
      text = self.attributes.get(key, "")
      inside = text[1:-1] if text.startswith("{") else text
      found += [x.strip().lstrip("%") for x in inside.split(",") if x.strip()]
    return tuple(found)

  @property
  def target(self) -> str:
    """Of a custom call: whose code it is."""
    return self.attributes.get("custom_call_target", "").strip('"')

  @property
  def op_name(self) -> str:
    """Where it comes from: JAX's path of scopes, or ""."""
    found = re.search(r'op_name="([^"]*)"', self.attributes.get("metadata", ""))
    return found[1] if found else ""

  def config(self) -> dict[str, Any]:
    """`backend_config`, {} where it is missing or is no JSON."""
    text = self.attributes.get("backend_config", "")
    try:
      value = json.loads(text)
      return json.loads(value) if isinstance(value, str) else value
    except ValueError:
      return {}


class Computation(NamedTuple):
  name: str
  instructions: dict[str, Instruction]  # by name, in the order they run
  thread: str  # "sparsecore" for what runs beside the main one, else ""

  @property
  def root(self) -> Instruction:
    for instruction in self.instructions.values():
      if instruction.root:
        return instruction
    raise ValueError(f"computation {self.name} has no ROOT instruction.")

  def parameters(self) -> list[Instruction]:
    """In the order of their numbers."""
    found = [x for x in self.instructions.values() if x.opcode == "parameter"]
    return sorted(found, key=lambda x: int(x.arguments))

  def users(self) -> dict[str, list[Instruction]]:
    """Instruction's name -> those that read it."""
    found: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        found.setdefault(operand, []).append(instruction)
    return found


class Module(NamedTuple):
  name: str
  attributes: dict[str, str]
  computations: dict[str, Computation]
  entry: Computation

  @property
  def devices(self) -> int:
    """That run the program together."""
    count = lambda key: int(self.attributes.get(key, "1"))
    return count("num_partitions") * count("replica_count")


def parse(text: str) -> Module:
  """Parses `compiled.as_text()`.

  Raises:
    ValueError: if it is not the text of a scheduled module, or a line of it
      cannot be read; the line is in the message.
  """
  if not text.startswith("HloModule "):
    raise ValueError(
      "hlo.parse: expected the text of a compiled program, which begins with "
      f"'HloModule'; got {text[:40]!r}. Pass compiled.as_text()."
    )
  lines = text.splitlines()
  name, *rest = _split(lines[0].removeprefix("HloModule "))
  attributes = dict(_pair(x) for x in rest)
  computations, entry, current = {}, None, None
  for line in lines[1:]:
    if current is None and _is_header(line):
      is_entry = line.startswith("ENTRY ")
      title = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
      current, body = title, {}
    elif current is not None and line.startswith("}"):
      thread = re.search(r'execution_thread="([^"]*)"', line)
      made = Computation(current, body, thread[1] if thread else "")
      computations[current] = made
      entry, current = made if is_entry else entry, None
    elif current is not None and line.strip():
      instruction = parse_instruction(line)
      body[instruction.name] = instruction
  if entry is None:
    raise ValueError("hlo.parse: the module has no ENTRY computation.")
  return Module(name.strip(), attributes, computations, entry)


def _is_header(line: str) -> bool:
  return line.endswith("{") and "->" in line and not line.startswith(" ")


def parse_instruction(line: str) -> Instruction:
  """Parses one line: `[ROOT] %name = shape opcode(operands), attribute=...`."""
  text = line.strip()
  root = text.startswith("ROOT ")
  name, found, rest = text.removeprefix("ROOT ").partition(" = ")
  if not found:
    raise ValueError(f"hlo.parse: not an instruction: {line[:120]!r}")
  shape, at = _shape_at(rest, 0)
  opening = rest.index("(", at)
  closing = _closing(rest, opening)
  arguments = rest[opening + 1 : closing]
  opcode = rest[at:opening].strip()
  operands = ()
  if opcode not in ("constant", "parameter", "iota"):
    operands = tuple(x.split()[-1].lstrip("%") for x in _split(arguments))
  attributes = dict(_pair(x) for x in _split(rest[closing + 1 :].lstrip(", ")))
  return Instruction(
    name.lstrip("%"), shape, opcode, arguments, operands, attributes, root
  )


def parse_shape(text: str) -> Shape:
  """Parses a shape alone, e.g. "(f32[8,128]{1,0}, token[])"."""
  return _shape_at(text, 0)[0]


@functools.lru_cache(maxsize=4096)
def _array(text: str, layout: str) -> Shape:
  dtype, _, dims = text.rstrip("]").partition("[")
  sizes = tuple(int(x.lstrip("<=")) for x in dims.split(",") if x)
  return Shape(dtype, sizes, layout)


def _shape_at(text: str, at: int) -> tuple[Shape, int]:
  """The shape that starts there, and where it ends."""
  while text[at] in " ,":
    at += 1
  if text.startswith("/*", at):  # /*index=5*/ in long tuples
    return _shape_at(text, text.index("*/", at) + 2)
  if text[at] != "(":
    end = text.index("]", at) + 1
    array, layout = text[at:end], ""
    if text.startswith("{", end):
      close = _closing(text, end)
      layout, end = text[end : close + 1], close + 1
    return _array(array, layout), end
  close, at, elements = _closing(text, at), at + 1, []
  while text[at:close].strip(" ,"):
    element, at = _shape_at(text, at)
    elements.append(element)
  return Shape("tuple", elements=tuple(elements)), close + 1


def _closing(text: str, opening: int) -> int:
  """Where the bracket that opens there is closed."""
  depth = 0
  for token in _TOKENS.finditer(text, opening):
    if token[0] in _OPEN:
      depth += 1
    elif token[0] in _CLOSE:
      depth -= 1
      if depth == 0:
        return token.start()
  raise ValueError(f"hlo.parse: a bracket is not closed: {text[:120]!r}")


def _split(text: str) -> list[str]:
  """At the commas that are in no bracket; comments are dropped."""
  parts, start, depth, comments = [], 0, 0, []
  for token in _TOKENS.finditer(text):
    kind = token[0]
    if kind in _OPEN:
      depth += 1
    elif kind in _CLOSE:
      depth -= 1
    elif kind.startswith("/*"):
      comments.append(kind)
    elif kind == "," and depth == 0:
      parts.append(text[start : token.start()])
      start = token.end()
  parts.append(text[start:])
  for comment in comments:
    parts = [x.replace(comment, "") for x in parts]
  return [x.strip() for x in parts if x.strip()]


def _pair(text: str) -> tuple[str, str]:
  key, _, value = text.partition("=")
  return key.strip(), value.strip()
