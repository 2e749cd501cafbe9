"""How often a while loop of a compiled program runs.

XLA for GPU and CPU writes it down (`known_trip_count`). XLA for TPU does not,
and passes constants into the loop as values that it carries: there the bound,
the start and the stride are followed back to the constants that they are.
"""

from typing import NamedTuple, Optional

from distrain_jax.inspect.hlo import Computation, Instruction, Module

# What hands its first operand on, as far as a scalar's value is concerned.
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")
_SAME += ("broadcast", "optimization-barrier")


class Scope(NamedTuple):
  """A computation, and who called it: values may come from outside."""

  module: Module
  computation: Computation
  call: Instruction | None = None  # that runs it; None: the entry
  caller: Optional["Scope"] = None  # where that instruction is

  def into(self, name: str, call: Instruction) -> "Scope":
    """The scope of a computation that an instruction of this one calls."""
    return Scope(self.module, self.module.computations[name], call, self)


class _Carried(NamedTuple):
  """A value that the loop passes from one iteration to the next."""

  scope: Scope  # of the loop's body or condition
  index: int  # in the loop's tuple


def trip_count(scope: Scope, loop: Instruction) -> int | None:
  """How often a `while` instruction of the scope runs; None: unknown."""
  known = loop.config().get("known_trip_count", {}).get("n")
  if known is not None:
    return int(known)
  (condition,), (body,) = loop.called("condition"), loop.called("body")
  inside = scope.into(condition, loop)
  test = inside.computation.root
  if test.opcode != "compare":
    return None
  left, right = (_follow(inside, x) for x in test.operands)
  direction = test.attributes.get("direction")
  if isinstance(right, _Carried):  # bound > counter
    left, right = right, left
    direction = {"GT": "LT", "GE": "LE"}.get(direction)
  if not isinstance(left, _Carried) or not isinstance(right, int):
    return None
  start = _initial(left)
  stride = _stride(scope.into(body, loop), left.index)
  extra = {"LT": 0, "LE": 1, "NE": 0}.get(direction)
  if start is None or not stride or stride < 0 or extra is None:
    return None
  return max(0, -(-(right + extra - start) // stride))


def _follow(scope: Scope, name: str) -> int | _Carried | None:
  """A scalar's value, if it is a constant wherever it comes from."""
  x = scope.computation.instructions[name]
  if x.opcode == "constant":
    text = x.arguments.strip("{} ")
    return int(text) if text.lstrip("-").isdigit() else None
  if x.opcode in _SAME:
    return _follow(scope, x.operands[0])
  if x.opcode == "parameter" and _is_call(scope):
    return _follow(scope.caller, scope.call.operands[int(x.arguments)])
  if x.opcode == "get-tuple-element":
    return _element(scope, x.operands[0], int(x.attributes["index"]))
  return None


def _is_call(scope: Scope) -> bool:
  return scope.call is not None and scope.call.opcode in ("fusion", "call")


def _element(scope: Scope, name: str, index: int) -> int | _Carried | None:
  """Element of a tuple: as `_follow`."""
  x = scope.computation.instructions[name]
  if x.opcode == "tuple":
    return _follow(scope, x.operands[index])
  if x.opcode == "optimization-barrier":
    return _element(scope, x.operands[0], index)
  if x.opcode == "parameter" and scope.call is not None:
    if scope.call.opcode != "while":
      return None
    here = _Carried(scope, index)
    return _initial(here) if _unchanged(scope, index) else here
  if x.opcode == "while":
    inside = scope.into(x.called("body")[0], x)
    return (
      _initial(_Carried(inside, index)) if _unchanged(inside, index) else None
    )
  return None


def _initial(carried: _Carried) -> int | None:
  """Its value before the first iteration."""
  scope = carried.scope
  value = _element(scope.caller, scope.call.operands[0], carried.index)
  return value if isinstance(value, int) else None


def _body_root(scope: Scope) -> Instruction:
  """The tuple that the loop's body ends with."""
  return scope.module.computations[scope.call.called("body")[0]].root


def _unchanged(scope: Scope, index: int) -> bool:
  """Whether the loop's body hands that element on as it came."""
  root = _body_root(scope)
  if root.opcode != "tuple":
    return False
  body = scope.module.computations[scope.call.called("body")[0]]
  x = body.instructions[root.operands[index]]
  while x.opcode in _SAME:
    x = body.instructions[x.operands[0]]
  return (
    x.opcode == "get-tuple-element"
    and int(x.attributes["index"]) == index
    and body.instructions[x.operands[0]].opcode == "parameter"
  )


def _stride(body: Scope, index: int) -> int | None:
  """What the loop's body adds to an element that it counts with."""
  root = body.computation.root
  if root.opcode != "tuple":
    return None
  return _added(body, root.operands[index], index)


def _added(scope: Scope, name: str, index: int) -> int | None:
  x = scope.computation.instructions[name]
  if x.opcode in _SAME:
    return _added(scope, x.operands[0], index)
  if x.opcode == "fusion":
    return _added(
      scope.into(x.called("calls")[0], x), _root_of(scope, x), index
    )
  if x.opcode != "add":
    return None
  values = [_follow(scope, operand) for operand in x.operands]
  steps = [v for v in values if isinstance(v, int)]
  counters = [v for v in values if isinstance(v, _Carried)]
  if len(steps) == 1 and [v.index for v in counters] == [index]:
    return steps[0]
  return None


def _root_of(scope: Scope, fusion: Instruction) -> str:
  return scope.module.computations[fusion.called("calls")[0]].root.name
