"""One step of a compiled program, walked through in the order it was scheduled.

A model, not a measurement. Instructions run one after the other, each for its
roofline's seconds (`cost`). A synchronous collective stops the device; an
asynchronous one runs from its start beside what is scheduled up to its done,
where the device waits for what is left: that is its exposed time. Collectives
share one link, copies another. Latencies, launch times and the sharing of
memory bandwidth are left out.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from distrain_jax.inspect import collectives, forms, timeline
from distrain_jax.inspect.collectives import Collective, base_kind
from distrain_jax.inspect.cost import FREE, cost
from distrain_jax.inspect.flops import flops
from distrain_jax.inspect.hardware import Chip
from distrain_jax.inspect.hlo import Instruction, Module
from distrain_jax.inspect.loops import Scope, trip_count
from distrain_jax.inspect.step import Communication as Communication
from distrain_jax.inspect.step import Event as Event
from distrain_jax.inspect.step import Step as Step
from distrain_jax.inspect.step import Window as Window

_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
_ASYNC = ("async", "call", "custom-call", "fusion")


@dataclasses.dataclass
class _Clock:
  """The state of the walk; all of it advances with the loops."""

  now: float = 0.0
  busy: float = 0.0  # seconds of compute so far
  work: dict[str, float] = dataclasses.field(default_factory=dict)
  waited: float = 0.0  # for copies
  free: dict[str, float] = dataclasses.field(default_factory=dict)

  def copy(self) -> "_Clock":
    return dataclasses.replace(self, work=dict(self.work), free=dict(self.free))

  def flops(self) -> float:
    return sum(self.work.values())

  def again(self, before: "_Clock", times: int) -> None:
    """What happened since `before` happens `times` more."""
    shift = (self.now - before.now) * times
    self.now += shift
    self.busy += (self.busy - before.busy) * times
    self.waited += (self.waited - before.waited) * times
    for dtype, n in self.work.items():
      self.work[dtype] = n + (n - before.work.get(dtype, 0.0)) * times
    for stream, end in self.free.items():
      if end != before.free.get(stream):  # used in the loop
        self.free[stream] = end + shift


class _Pending(NamedTuple):
  """An asynchronous operation that is not done yet."""

  stream: str
  start: Instruction
  seconds: float
  end: float
  busy: float  # the clock's, when it started
  flops: float
  found: tuple[Collective, ...]


def walk(
  module: Module, chip: Chip, bandwidth: Callable[[Collective], float]
) -> Step:
  """Walks through a module.

  Args:
    module: scheduled.
    chip: for the seconds of instructions.
    bandwidth: bytes/s at which a device sends in a collective.
  """
  walker = _Walker(module, chip, bandwidth)
  walker.block(Scope(module, module.entry), 1)
  clock = walker.clock
  return Step(
    seconds=clock.now,
    compute_seconds=clock.busy,
    flops=dict(clock.work),
    communication=tuple(walker.communication),
    copies_exposed=clock.waited,
    events=tuple(walker.events),
    unknown=tuple(sorted(walker.unknown)),
  )


class _Walker:
  def __init__(self, module, chip, bandwidth):
    self.module, self.chip, self.bandwidth = module, chip, bandwidth
    self.clock = _Clock()
    self.events: list[Event] = []
    self.communication: list[Communication] = []
    self.unknown: set[str] = set()

  def block(self, scope: Scope, runs: int) -> None:
    """The instructions of a computation; `runs`: its runs in the step."""
    pending: dict[str, _Pending] = {}
    early: list[tuple[Instruction, float]] = []  # done before any start
    began = self.clock.busy
    seen: list[tuple[str, float]] = []  # instruction, busy after it
    for x in scope.computation.instructions.values():
      before = self.clock.busy
      self._one(scope, x, runs, pending, early, began, seen)
      if self.clock.busy > before:
        seen.append((x.name, self.clock.busy))
    for x, busy in early:  # its start is in the iteration before
      self._finish_early(x, busy, pending, runs, seen)
    for start in list(pending.values()):
      self._finish(start, runs, seen)

  def _one(self, scope, x, runs, pending, early, began, seen) -> None:
    kind = base_kind(x.opcode)
    if x.opcode in FREE:
      return
    if forms.prepares(x) or x.opcode.endswith("-update"):
      start = forms.begun_by(scope.computation, x)
      if start is not None:
        self._collective(scope, start, runs, pending)
      return
    role = forms.fused_role(self.module, x)
    if role in ("start", "done"):
      self._beside(scope, x)
    if x.opcode.endswith("-done") or role == "done":
      starts = {name: p.start for name, p in pending.items()}
      start = forms.start_of(scope.computation, x, starts)
      if start is not None:
        self._finish(pending.pop(start), runs, seen)
      elif kind in (*collectives.KINDS, *_ASYNC) and not forms.is_over(
        scope.computation, x
      ):
        early.append((x, self.clock.busy - began))
    elif x.opcode == "while":
      self._loop(scope, x, runs)
    elif x.opcode == "conditional":
      self._branches(scope, x, runs)
    elif x.opcode == "call":
      self.block(scope.into(x.called("to_apply")[0], x), runs)
    elif kind in collectives.UNCOUNTED:
      self.unknown.add(f"the bytes of {x.opcode}")
    elif kind in collectives.KINDS or role == "start":
      self._collective(scope, x, runs, pending)
    elif x.opcode.endswith("-start") and kind in _COPIES:
      self._copy(scope, x, pending)
    elif role == "middle":
      self._compute(scope, x)
    elif any(True for _ in collectives.inside(self.module, x)):
      self._beside(scope, x)
      self._collective(scope, x, runs, pending)
    else:
      self._compute(scope, x)

  def _compute(self, scope, x) -> None:
    found = cost(self.module, scope.computation, x, self.chip)
    self.unknown.update(found.unknown)
    self._spend(found.flops, found.seconds)

  def _beside(self, scope, x) -> None:
    """Matrix products that are fused with a collective."""
    found, unknown = flops(self.module, scope.computation, x)
    self.unknown.update(unknown)
    peaks = ((n, self.chip.peak(dtype)) for dtype, n in found.items())
    self._spend(found, sum(n / peak for n, peak in peaks))

  def _spend(self, operations, seconds) -> None:
    for dtype, n in operations.items():
      self.clock.work[dtype] = self.clock.work.get(dtype, 0.0) + n
    kind = "matrix products" if operations else "other compute"
    self._bar("compute", kind, self.clock.now, seconds)
    self.clock.now += seconds
    self.clock.busy += seconds

  def _bar(self, stream, kind, start, seconds) -> None:
    timeline.add(self.events, Event(stream, kind, start, seconds))

  def _loop(self, scope, x, runs) -> None:
    trips = trip_count(scope, x)
    if trips is None:
      self.unknown.add(f"how often the loop {x.name} runs (counted once)")
      trips = 1
    if trips == 0:
      return
    before, outside = self.clock.copy(), self.events
    self.events = []
    self.block(scope.into(x.called("body")[0], x), runs * trips)
    once = self.clock.now - before.now
    self.clock.again(before, trips - 1)
    inside, self.events = self.events, outside
    timeline.repeat(self.events, inside, once, trips)

  def _branches(self, scope, x, runs) -> None:
    """The dearest branch: by its seconds, where known, else bytes and FLOPs."""
    keys = ("branch_computations", "true_computation", "false_computation")
    names = x.called(*keys)

    def outcome(name):
      saved = self.clock, self.events, self.communication
      self.clock = self.clock.copy()
      self.events, self.communication = [], []
      self.block(scope.into(name, x), runs)
      made = self.clock, self.events, self.communication
      self.clock, self.events, self.communication = saved
      return made

    def dear(made):
      clock, _, sent = made
      wire = sum(c.collective.wire_bytes * c.runs for c in sent)
      return clock.now, wire, clock.flops()

    self.clock, events, sent = max(map(outcome, names), key=dear)
    self.communication += sent
    for event in events:
      timeline.add(self.events, event)

  def _describe(self, scope, x) -> tuple[Collective, ...]:
    found = []
    own = base_kind(x.opcode) in collectives.KINDS
    pairs = [(scope.computation, x)] if own else []
    for computation, y in pairs or collectives.inside(self.module, x):
      if base_kind(y.opcode) in collectives.UNCOUNTED:
        self.unknown.add(f"the bytes of {y.opcode}")
        continue
      try:
        one = collectives.describe(self.module, computation, y)
      except (ValueError, KeyError) as error:
        self.unknown.add(f"the bytes of {y.name}: {error}")
        continue
      n = one.group_size
      if not own and forms.is_scatter(computation, y, n):
        one = collectives.as_reduce_scatter(one)
      elif one.kind == "all-reduce":
        kept = collectives.keeps_a_part(self.module, scope.computation, x, n)
        one = one._replace(sliced=kept)
      found.append(one._replace(name=x.name))
    return tuple(found)

  def _collective(self, scope, x, runs, pending) -> None:
    found = self._describe(scope, x)
    seconds = [one.wire_bytes / self.bandwidth(one) for one in found]
    if forms.is_asynchronous(self.module, x):
      self._begin(x, "communication", sum(seconds), found, pending)
      return
    for one, took in zip(found, seconds):
      # It waits for asynchronous ones that are on the link.
      start = max(self.clock.now, self.clock.free.get("communication", 0.0))
      wait = start - self.clock.now
      self._bar("communication", one.kind, start, took)
      self.clock.now = self.clock.free["communication"] = start + took
      made = Communication(one, runs, took, wait + took, None)
      self.communication.append(made)

  def _copy(self, scope, x, pending) -> None:
    source = scope.computation.instructions[x.operands[0]].shape
    both = (source, x.shape.elements[0] if x.shape.elements else x.shape)
    outside = sum(s.bytes for s in both if s.memory_space == 0)
    self._begin(x, "memory", outside / self.chip.memory_bandwidth, (), pending)

  def _begin(self, x, stream, seconds, found, pending) -> None:
    clock = self.clock
    start = max(clock.now, clock.free.get(stream, 0.0))
    clock.free[stream] = end = start + seconds
    kind = found[0].kind if found else "copies"
    self._bar(stream, kind, start, seconds)
    pending[x.name] = _Pending(
      stream, x, seconds, end, clock.busy, clock.flops(), found
    )

  def _finish(self, start: _Pending, runs, seen, more: float = 0.0) -> None:
    """Waits for a pending operation; `more`: seconds it ran beside before."""
    clock = self.clock
    wait = max(0.0, start.end - clock.now - more)
    clock.now += wait
    if start.stream == "memory":
      clock.waited += wait
      return
    names = tuple(name for name, busy in seen if busy > start.busy)
    window = Window(
      clock.busy - start.busy + more, clock.flops() - start.flops, names
    )
    total = sum(c.wire_bytes for c in start.found)
    for one in start.found:  # in proportion, where one start has several
      share = one.wire_bytes / total if total else 0.0
      self.communication.append(
        Communication(one, runs, start.seconds * share, wait * share, window)
      )

  def _finish_early(self, x, busy, pending, runs, seen) -> None:
    name = next((n for n, p in pending.items() if p.found), None)
    if name is None:
      self.unknown.add(f"what {x.name} waits for: no start was found")
    else:
      self._finish(pending.pop(name), runs, seen, more=busy)
