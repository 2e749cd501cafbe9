"""What a worker can do: compute, and exchange beside it."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from distrain_jax.inspect.clock.loop import EXCHANGE, TICKS, Done, Loop

# Collectives, and how much of a model's exchange each is.
WIRE = {"reduce-scatter": 0.5, "all-gather": 0.5, "all-reduce": 1.0}


class Span(NamedTuple):
  """A bar of the timeline."""

  worker: int
  stream: str  # compute or exchange
  what: str  # "micro-batch", "reduce-scatter", "update", ...
  start: float  # seconds
  end: float


class Meeting:
  """A collective: begins with the last worker, ends for all at once."""

  def __init__(self):
    self.came, self.start, self.done = 0, 0, Done()


class Worker:
  """Its two streams, and what it has done so far."""

  def __init__(
    self,
    index: int,
    loop: Loop,
    meetings: list[Meeting],
    workers: int,
    durations: Iterator[int],
    ticks: Mapping[str, int],
  ):
    """Args: of its micro-batches in order; of the parts of exchanges."""
    self.index, self.loop, self.workers = index, loop, workers
    self.meetings, self.durations, self.ticks = meetings, durations, ticks
    self.spans: list[Span] = []
    self.updates: list[tuple[int, int]] = []  # (tick, own micro-batches)
    self.sent: list[tuple[int, float]] = []  # (tick, of a model's exchange)
    self._met, self._last = 0, Done(over=True)

  def updated(self, count: int) -> None:
    """Counts an update with so many of this worker's micro-batches."""
    self.updates.append((self.loop.now, count))

  def span(self, stream: str, what: str, start: int) -> None:
    """From `start` to now."""
    ends = start / TICKS, self.loop.now / TICKS
    if self.loop.now > start:
      self.spans.append(Span(self.index, stream, what, *ends))

  def compute(self, what: str, ticks: int) -> Iterator[int]:
    start = self.loop.now
    yield ticks
    self.span("compute", what, start)

  def micro_batches(
    self, least: int, what: str = "micro-batch", until: Done | None = None
  ) -> Iterator[int]:
    """At least so many, and more until something is over; how many."""
    count = 0
    while count < least or (until is not None and not until.over):
      yield from self.compute(what, next(self.durations))
      count += 1
    return count

  def beside(
    self,
    exchange: Done,
    least: int,
    adaptive: bool,
    what: str = "micro-batch",
  ) -> Iterator[int | Done]:
    """Micro-batches while an exchange runs; both are over then."""
    until = exchange if adaptive else None
    count = yield from self.micro_batches(least, what, until)
    yield exchange
    return count

  def exchange(
    self, *parts: str, scale: float = 1.0, count: int | None = None
  ) -> Done:
    """Begins parts one after the other, behind the exchange before.

    Args:
      parts: keys of `ticks`; those of WIRE are collectives.
      scale: of a model's exchange.
      count: ends in an update with so many of this worker's micro-batches.
    """

    def program(before):
      yield before
      for what in parts:
        start, ticks = self.loop.now, round(scale * self.ticks[what])
        if what in WIRE:
          start = yield from self._meet(ticks)
          self.sent.append((self.loop.now, scale * WIRE[what]))
        else:
          yield ticks
        self.span("exchange", what, start)
      if count is not None:
        self.updated(count)

    self._last = self.loop.spawn(program(self._last), EXCHANGE)
    return self._last

  def _meet(self, ticks: int) -> Iterator[Done]:
    """This worker's next collective is the others' next; when it began."""
    if self._met == len(self.meetings):
      self.meetings.append(Meeting())
    meeting = self.meetings[self._met]
    self._met += 1
    meeting.came += 1
    if meeting.came == self.workers:
      meeting.start = self.loop.now
      self.loop.later(ticks, EXCHANGE, meeting.done.finish)
    yield meeting.done
    return meeting.start
