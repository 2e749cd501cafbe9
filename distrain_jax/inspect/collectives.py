"""Collectives of a compiled program: kind, groups, bytes on the wire.

A device sends, by the formulas of ring algorithms (Patarasuk and Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002) among n devices: 2 x (n-1)/n of an
all-reduce's x bytes, x (n-1)/n of a reduce-scatter's operand, of an
all-gather's result and of an all-to-all, and all of what it permutes.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distrain_jax.inspect.hlo import Computation, Instruction, Module, Shape

KINDS = (
  "all-reduce",
  "reduce-scatter",
  "all-gather",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_VIEWS = ("bitcast", "copy", "reshape")
# Speak between devices too, but what they send is not known from the text.
UNCOUNTED = ("ragged-all-to-all", "send", "recv")


class Collective(NamedTuple):
  """One collective instruction, run once."""

  name: str
  kind: str  # of KINDS
  dtype: str  # of most of its bytes
  bytes: int  # of the whole: an all-gather's result, others' operand
  groups: tuple[tuple[int, ...], ...] | None  # positions in the mesh; or pairs
  group_size: int
  wire_bytes: float  # that a device sends
  op_name: str  # JAX's path of scopes, or ""
  # An all-reduce of which each device then keeps its part: what was meant as a
  # reduce-scatter, at twice the bytes.
  sliced: bool = False
  shapes: tuple[tuple[int, ...], ...] = ()  # dims of the arrays in `bytes`


def base_kind(opcode: str) -> str:
  """all-reduce for all-reduce, all-reduce-start and all-reduce-done."""
  return re.sub("-(start|update|done)$", "", opcode)


def inside(
  module: Module, x: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """The collectives in the computations that an instruction calls."""
  for name in x.called("calls", "called_computations", "to_apply"):
    computation = module.computations[name]
    for y in computation.instructions.values():
      kind = base_kind(y.opcode)
      if kind in KINDS + UNCOUNTED and not y.opcode.endswith("-done"):
        yield computation, y
      elif y.opcode in ("fusion", "call", "async-start", "custom-call"):
        yield from inside(module, y)


def describe(
  module: Module, computation: Computation, x: Instruction
) -> Collective:
  """What an instruction of one of the KINDS (or its -start) does.

  Raises:
    ValueError: if its replica groups are written in a form not known here.
  """
  kind = base_kind(x.opcode)
  operands = [computation.instructions[name].shape for name in x.operands]
  whole = _result(x) if kind == "all-gather" else operands
  size = sum(shape.bytes for shape in whole)
  if kind == "collective-permute":
    pairs = _pairs(x.attributes["source_target_pairs"])
    groups = tuple(pair for pair in pairs if pair[0] != pair[1])
    n, sent = 2, float(size if groups else 0)
  else:
    groups = replica_groups(module, x.attributes.get("replica_groups", "{}"))
    n = max(map(len, groups), default=1)
    sent = size * (n - 1) / n
    if kind == "all-reduce":
      sent *= 2
    if kind == "collective-broadcast":
      sent = float(size if n > 1 else 0)
  biggest = max(
    (leaf for shape in whole for leaf in shape.arrays()),
    key=lambda leaf: leaf.bytes,
    default=Shape("f32"),
  )
  return Collective(
    name=x.name,
    kind=kind,
    dtype=biggest.dtype,
    bytes=size,
    groups=groups,
    group_size=n,
    wire_bytes=sent,
    op_name=x.op_name,
    shapes=tuple(leaf.dims for shape in whole for leaf in shape.arrays()),
  )


def as_reduce_scatter(collective: Collective) -> Collective:
  """Of an all-reduce that a fusion turns into a reduce-scatter."""
  return collective._replace(
    kind="reduce-scatter", wire_bytes=collective.wire_bytes / 2
  )


def _result(x: Instruction) -> list[Shape]:
  """The arrays that an all-gather makes: of -start, the second half."""
  if not x.opcode.endswith("-start") or x.shape.dtype != "tuple":
    return x.shape.arrays()
  return x.shape.elements[1].arrays()


def replica_groups(module: Module, text: str) -> tuple[tuple[int, ...], ...]:
  """Groups in any of XLA's notations; {} is one group of all devices.

  {{0,1},{2,3}}, [2,4]<=[8], [2,4]<=[4,2]T(1,0), mesh['a'=2,'b'=4] {'b'}.

  Raises:
    ValueError: for another notation.
  """
  text = text.strip()
  if text in ("", "{}"):
    return (tuple(range(module.devices)),)
  if text.startswith("{{"):
    return _pairs(text)
  if text.startswith("["):
    return _iota_groups(text)
  if text.startswith("mesh["):
    return _mesh_groups(text)
  raise ValueError(f"replica groups in an unknown notation: {text[:80]}")


def _pairs(text: str) -> tuple[tuple[int, ...], ...]:
  rows = re.findall(r"\{([\d, ]*)\}", text.strip()[1:-1])
  return tuple(
    tuple(int(i) for i in row.split(",") if i.strip()) for row in rows
  )


def _iota(text: str) -> np.ndarray:
  """[2,4]<=[4,2]T(1,0): the numbers 0 to 7 in that order, (2, 4)."""
  found = re.fullmatch(
    r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text.strip()
  )
  if not found:
    raise ValueError(f"replica groups in an unknown notation: {text[:80]}")
  sizes, reshape, order = (
    [int(i) for i in part.split(",")] if part else None
    for part in found.groups()
  )
  numbers = np.arange(np.prod(sizes)).reshape(reshape or sizes)
  return (numbers.transpose(order) if order else numbers).reshape(sizes)


def _iota_groups(text: str) -> tuple[tuple[int, ...], ...]:
  table = _iota(text)
  return tuple(
    tuple(map(int, row)) for row in table.reshape(-1, table.shape[-1])
  )


def _mesh_groups(text: str) -> tuple[tuple[int, ...], ...]:
  """mesh['a'=2,'b'=4, device_ids=([8]<=[...])] {'b'}: along b."""
  found = re.fullmatch(
    r"mesh\[((?:'[^']+'=\d+,? ?)+)(?:,? ?device_ids=\((.*?)\))?\] ?"
    r"\{((?:'[^']+',? ?)*)\}",
    text.rstrip(","),
  )
  if not found:
    raise ValueError(f"replica groups in an unknown notation: {text[:80]}")
  axes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", found[1])}
  along = re.findall(r"'([^']+)'", found[3])
  sizes = list(axes.values())
  numbers = _iota(found[2]) if found[2] else np.arange(np.prod(sizes))
  numbers = numbers.reshape(sizes)
  names = list(axes)
  last = [names.index(axis) for axis in along]
  order = [i for i in range(len(names)) if i not in last] + last
  groups = numbers.transpose(order).reshape(
    -1, int(np.prod([sizes[i] for i in last], dtype=int))
  )
  return tuple(tuple(map(int, row)) for row in groups)


def keeps_a_part(
  module: Module, computation: Computation, x: Instruction, n: int
) -> bool:
  """Whether each device keeps about 1/n of most of a collective's result.

  Its readers then take slices of that size and nothing else.

  Args:
    module, computation: where x is.
    x: the collective, or the start of an asynchronous one.
    n: devices in a group.
  """
  users = computation.users()
  parts: list[tuple[int, bool]] = []  # bytes of a result, whether it is sliced

  def follow(y: Instruction) -> None:
    readers = users.get(y.name, [])
    on = [z for z in readers if _hands_on(z)]
    if on:
      for z in on:
        follow(z)
    else:
      limit = 0.9 * y.shape.bytes / n
      parts.append((y.shape.bytes, _sliced(module, users, y, limit)))

  follow(x)
  sliced = sum(size for size, of in parts if of)
  return sliced > 0.5 * sum(size for size, _ in parts)


def _hands_on(x: Instruction) -> bool:
  """A later name of a collective's result, or of an element of it."""
  return x.opcode == "get-tuple-element" or (
    x.opcode.endswith(("-done", "-update"))
  )


def _sliced(module, users, x: Instruction, limit: float) -> bool:
  readers = users.get(x.name, [])

  def one(y: Instruction) -> bool:
    if y.opcode != "fusion" or y.operands.count(x.name) != 1:
      return only_sliced(users, x.name, limit, {y.name})
    body = module.computations[y.called("calls")[0]]
    parameter = body.parameters()[y.operands.index(x.name)]
    return only_sliced(body.users(), parameter.name, limit)

  return bool(readers) and all(map(one, readers))


def only_sliced(users, name: str, limit: float, among=None) -> bool:
  """Whether a value's readers take slices where the device says, no others.

  Args:
    users: `Computation.users()`.
    name: of the value.
    limit: bytes that a slice has at least.
    among: names of the readers to look at; None: all.
  """
  readers = [y for y in users.get(name, []) if not among or y.name in among]
  return bool(readers) and all(
    (
      y.opcode == "dynamic-slice"
      and y.operands[0] == name
      and y.shape.bytes >= limit
    )
    or (y.opcode in _VIEWS and only_sliced(users, y.name, limit))
    for y in readers
  )
