"""Which of a program's temporaries live together, by XLA's buffer assignment.

What `memory_analysis` tells is the size of one heap, in which the compiler has
packed all temporaries: a value that is added can make it grow by much more, or
less, than itself, since everything else is packed anew. What lives while a part
of the program runs is in the texts that XLA writes of its buffer assignment
(openxla.org/xla/hlo_dumps), in the same form for all kinds of devices.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distrain_jax.inspect import hlo

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")
_VALUE = re.compile(
  r" value: <\d+ ([^ {]+)(?:\{([^}]*)\})?.*\(size=(\d+),offset=(\d+)\)"
)
_PLACE = re.compile(r"\s+(\d+):(\S+)$")
_RANGE = re.compile(r"\s+(\S+?)\{([^}]*)\}:(\d+)-(\d+)$")
# What only names other values, and may stand far from where they are used.
_IDLE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")


class Temporary(NamedTuple):
  """A temporary in main memory."""

  name: str  # the instruction that makes it
  offset: int  # in the heap, bytes
  bytes: int
  first: int  # the instructions, in the order in which they run, from and to
  last: int  # which it lives


class Buffers(NamedTuple):
  """The heap of a program's temporaries on one device."""

  bytes: int
  values: tuple[Temporary, ...]
  # JAX's path of scopes of each instruction, in the order in which they run;
  # "" where XLA tells none, or nothing is computed.
  op_names: tuple[str, ...]

  def most(self) -> int:
    """Most bytes of temporaries that live at the same time."""
    starts = {x.first for x in self.values}
    return max(map(self._live, starts), default=0)

  def during(self, scope: str) -> int | None:
    """Most bytes of temporaries that live while a `jax.named_scope` runs.

    What lives through it, for others to read, is counted as well: an upper
    bound of what the scope needs for itself. None: nothing runs in it.

    Args:
      scope: the name as it was given; transformed ones, `vmap(name)`, count.
    """
    runs = [i for i, x in enumerate(self.op_names) if scope in _scopes(x)]
    return max(map(self._live, runs), default=None)

  def _live(self, at: int) -> int:
    """Bytes that some value covers: views lie in one another's memory."""
    live = (x for x in self.values if x.first <= at <= x.last)
    total = end = 0
    for start, stop in sorted((x.offset, x.offset + x.bytes) for x in live):
      total += max(0, stop - max(start, end))
      end = max(end, stop)
    return total


def _scopes(op_name: str) -> list[str]:
  """Without the transformations that JAX writes around names."""
  return [re.sub(r"^(\w+\()+|\)+$", "", x) for x in op_name.split("/")]


def dumping(folder: Path) -> dict[str, str | bool]:
  """XLA's options that make a compilation write what `read` reads."""
  return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def read(folder: Path) -> Buffers:
  """What one compilation with `dumping(folder)` has written.

  Raises:
    ValueError: if it wrote nothing, more than one program, or several heaps.
    KeyError: for a temporary of which XLA does not tell when it lives.
  """
  end = "after_optimizations"
  module = hlo.parse(_text(folder, f"*{end}.txt"))
  order, ranges = _times(_text(folder, f"*{end}-live-range.txt"))
  heaps, found = [], []
  assigned = _assigned(_text(folder, f"*{end}-buffer-assignment.txt"))
  for name, index, offset, count in assigned:
    if name is None:
      heaps.append(count)
    else:
      found.append(Temporary(name, offset, count, *ranges[name, index]))
  names = {
    x.name: x.op_name
    for computation in module.computations.values()
    for x in computation.instructions.values()
    if x.opcode not in _IDLE
  }
  if len(heaps) > 1:
    raise ValueError(
      f"inspect: {len(heaps)} heaps of temporaries in main memory, where XLA has "
      "made one so far: their offsets would have to be told apart."
    )
  return Buffers(
    sum(heaps), tuple(found), tuple(names.get(x, "") for x in order)
  )


def _text(folder: Path, pattern: str) -> str:
  found = sorted(folder.glob(pattern))
  if len(found) != 1:
    raise ValueError(
      f"inspect: {len(found)} files {pattern} of XLA's buffer assignment, "
      "where one program writes one. A program that comes out of JAX's "
      "compilation cache writes none: "
      "jax.config.update('jax_enable_compilation_cache', False)."
    )
  return found[0].read_text()


def _assigned(text: str) -> Iterator[tuple[str | None, str, int, int]]:
  """The heaps in main memory, (None, "", 0, bytes), and what lies in them.

  A value: (instruction, element of its result, offset, bytes).
  """
  inside = False
  for line in text.splitlines():
    if heading := _ALLOCATION.match(line):
      kind = heading[2]
      # A colour is another memory, such as a TPU's VMEM.
      inside = "preallocated-temp" in kind and "color" not in kind
      if inside:
        yield None, "", 0, int(heading[1])
    elif not line.startswith(" "):
      inside = False
    elif inside and (value := _VALUE.match(line)):
      yield value[1], value[2] or "", int(value[4]), int(value[3])


def _times(text: str) -> tuple[list[str], dict[tuple[str, str], tuple]]:
  """Instructions as they run; (instruction, element) -> from when to when."""
  order, _, lives = text.partition("BufferLiveRange:")
  places = filter(None, map(_PLACE.match, order.splitlines()))
  ranges = filter(None, map(_RANGE.match, lives.splitlines()))
  return (
    [x[2] for x in places],
    {(x[1], x[2]): (int(x[3]), int(x[4])) for x in ranges},
  )
