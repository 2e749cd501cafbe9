"""From seconds to updates a second: `simulate`."""

import difflib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from distrain_jax.inspect.clock.loop import COMPUTE, TICKS, Loop
from distrain_jax.inspect.clock.methods import LOCAL, METHODS, Settings
from distrain_jax.inspect.clock.times import Times, at_least
from distrain_jax.inspect.clock.worker import Span, Worker


class Update(NamedTuple):
  """One update: the mean over the micro-batches that are counted."""

  end: float  # seconds, when the last worker has it
  counts: tuple[int, ...]  # (n,), each worker's micro-batches in it


class Outcome(NamedTuple):
  """Of a method: means over the updates after its start; then all there is."""

  method: str
  update_seconds: float
  micro_batches: tuple[float, ...]  # (n,), each worker's in an update
  utilisation: tuple[float, ...]  # (n,), of its time, computing gradients
  exchanges: float  # an update; 1: the bytes of a reduce-scatter + all-gather
  updates: tuple[Update, ...]  # from the very start
  spans: tuple[Span, ...]  # so is the timeline

  @property
  def updates_per_second(self) -> float:
    return 1 / self.update_seconds

  @property
  def micro_batches_per_second(self) -> float:
    """Gradients, of all workers."""
    return sum(self.micro_batches) / self.update_seconds

  @property
  def weights(self) -> tuple[float, ...]:
    """(n,): what each worker's data count for in the mean of an update."""
    return tuple(m / sum(self.micro_batches) for m in self.micro_batches)


def simulate(
  method: str,
  given: Times,
  *,
  accumulate: int = 4,
  updates: int = 32,
  sync_every: int = 30,
  fragments: int = 3,
  delay: int = 5,
  buckets: int = 16,
  jitter: float = 0.0,
  seed: int = 0,
) -> Outcome:
  """One method's clock.

  Args:
    method: of METHODS. ddp_buckets is DDP whose gradients leave in buckets
      during the backward pass (two thirds) of the last micro-batch; adaptive
      workers go on accumulating until their exchange is over. In local_sgd,
      diloco and streaming_diloco an update is a worker's own inner step.
    given: from `times` or `from_report`.
    accumulate: micro-batches of an update on each worker: those of
      ddp(accumulate=k), or acco(accumulate=k / 2), whose halves have as many
      each. The adaptive ones take at least these.
    updates: how many are timed, after a start that is not; local methods take
      the next multiple of sync_every.
    sync_every: inner steps between two exchanges (H).
    fragments: of the model, that streaming_diloco sends one after the other.
    delay: inner steps behind which it hides each (tau).
    buckets: of ddp_buckets.
    jitter: standard deviation of the logarithm of a micro-batch's seconds,
      their mean kept. The i-th of a worker is the same for all methods.
    seed: of the jitter.

  Raises:
    ValueError: for another method, and for settings that no method has.
  """
  settings = Settings(accumulate, sync_every, fragments, delay, buckets)
  _check(method, settings, jitter)
  at_least("updates", updates, 1)
  period = sync_every if method in LOCAL else 1
  updates = -(-updates // period) * period
  start = max(2, 8 // period) * period
  # Two more, to see the end of what is computed while the last is made.
  target = start + updates + 2
  workers = _run(method, given, settings, target, jitter, seed)
  return _measure(method, workers, start, start + updates)


def _check(method: str, s: Settings, jitter: float) -> None:
  if method not in METHODS:
    close = difflib.get_close_matches(str(method), METHODS, 1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise ValueError(
      f"clock: {method!r} is no method. {hint}There are: {', '.join(METHODS)}."
    )
  for name, value in s._asdict().items():
    at_least(name, value, 1)
  if method.startswith("acco") and s.accumulate % 2:
    raise ValueError(
      f"clock: {method} takes half of an update's micro-batches in each half, "
      f"so `accumulate` is even; got {s.accumulate}, e.g. {s.accumulate + 1}."
    )
  if (
    method == "streaming_diloco"
    and max(s.fragments, s.delay + 1) > s.sync_every
  ):
    raise ValueError(
      "clock: streaming_diloco sends each of the `fragments` once in "
      "`sync_every` steps and waits for it `delay` steps later, before it "
      f"leaves again; got fragments={s.fragments}, delay={s.delay} and "
      f"sync_every={s.sync_every}. Raise sync_every, or lower the other."
    )
  if not 0 <= jitter < 10:
    raise ValueError(
      "clock: `jitter` is the standard deviation of a logarithm, e.g. 0.1; got "
      f"{jitter!r}."
    )


def _run(method, given, settings, target, jitter, seed) -> list[Worker]:
  """Workers that have all made `target` updates."""
  loop, meetings = Loop(), []
  n, update = len(given.micro_batch), given.update
  scatter, gather = max(given.reduce_scatter), max(given.all_gather)
  seconds = {
    "reduce-scatter": scatter,
    "all-gather": gather,
    "all-reduce": scatter + gather,
    **dict.fromkeys(("update", "estimate", "predict"), update),
    "whole update": n * update,
  }
  ticks = {name: round(s * TICKS) for name, s in seconds.items()}
  workers = [
    Worker(i, loop, meetings, n, _durations(s, jitter, (seed, i)), ticks)
    for i, s in enumerate(given.micro_batch)
  ]
  for worker in workers:
    loop.spawn(METHODS[method](worker, settings), COMPUTE)
  loop.run(lambda: all(len(w.updates) >= target for w in workers))
  return workers


def _durations(seconds, jitter, seed) -> Iterator[int]:
  """Ticks of one worker's micro-batches."""
  if not jitter:
    return itertools.repeat(round(seconds * TICKS))
  random = np.random.default_rng(seed)
  draw = lambda: random.lognormal(-(jitter**2) / 2, jitter)
  return (max(1, round(seconds * draw() * TICKS)) for _ in itertools.count())


def _measure(method, workers, start, end) -> Outcome:
  """Means from the `start`-th update to the `end`-th."""
  made = [
    Update(max(t for t, _ in each) / TICKS, tuple(count for _, count in each))
    for each in zip(*(w.updates[:end] for w in workers))
  ]
  timed = made[start:]
  first, last = made[start - 1].end, made[-1].end
  sent = [x for t, x in workers[0].sent if first < t / TICKS <= last]
  counts = zip(*(u.counts for u in timed))
  return Outcome(
    method=method,
    update_seconds=(last - first) / len(timed),
    micro_batches=tuple(sum(each) / len(timed) for each in counts),
    utilisation=tuple(_busy(w, first, last) for w in workers),
    exchanges=sum(sent) / len(timed),
    updates=tuple(made),
    spans=tuple(s for w in workers for s in w.spans),
  )


def _busy(worker: Worker, first: float, last: float) -> float:
  inside = (
    min(s.end, last) - max(s.start, first)
    for s in worker.spans
    if s.what.startswith("micro-batch")
  )
  return sum(s for s in inside if s > 0) / (last - first)
