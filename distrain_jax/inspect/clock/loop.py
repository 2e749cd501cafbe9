"""Generators that take turns on one clock."""

import heapq
import itertools
from collections.abc import Callable, Iterator

TICKS = 10**12  # a second: whole numbers, so that what is equal stays equal
# At one tick exchanges end before micro-batches: who waits for both is not late.
EXCHANGE, COMPUTE = 0, 1


class Done:
  """Something to wait for."""

  def __init__(self, over: bool = False):
    self.over = over
    self.waiting: list[Callable[[], None]] = []

  def finish(self) -> None:
    self.over = True
    for resume in self.waiting:
      resume()


class Loop:
  """Runs generators that yield ticks to let pass, or a `Done` to wait for."""

  def __init__(self):
    self.now = 0
    self._queue, self._order = [], itertools.count()

  def later(self, ticks: int, rank: int, call: Callable[[], None]) -> None:
    entry = (self.now + ticks, rank, next(self._order), call)
    heapq.heappush(self._queue, entry)

  def spawn(self, program: Iterator[int | Done], rank: int) -> Done:
    done = Done()

    def resume():
      for what in program:
        if not isinstance(what, Done):
          self.later(what, rank, resume)
        elif what.over:
          continue
        else:
          what.waiting.append(resume)
        return
      done.finish()

    resume()
    return done

  def run(self, until: Callable[[], bool]) -> None:
    while not until():
      self.now, _, _, call = heapq.heappop(self._queue)
      call()
