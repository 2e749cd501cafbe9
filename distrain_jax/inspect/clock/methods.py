"""What one worker does, method by method: a generator that never ends.

Each reads like the method itself, and yields what it waits for.
"""

import functools
import itertools
from typing import NamedTuple

from distrain_jax.inspect.clock.loop import Done
from distrain_jax.inspect.clock.worker import Worker

SHARDED = ("reduce-scatter", "update", "all-gather")
FORWARD = 1 / 3  # of a micro-batch: the backward pass has twice its products


class Settings(NamedTuple):
  """Of the methods: see `simulate`."""

  accumulate: int
  sync_every: int
  fragments: int
  delay: int
  buckets: int


def zero1(worker: Worker, s: Settings):
  while True:
    count = yield from worker.micro_batches(s.accumulate)
    yield worker.exchange(*SHARDED, count=count)


def ddp(worker: Worker, s: Settings):
  while True:
    count = yield from worker.micro_batches(s.accumulate)
    yield worker.exchange("all-reduce", "whole update", count=count)


def ddp_buckets(worker: Worker, s: Settings):
  """Equal buckets leave, in turn, during the last backward pass."""
  while True:
    yield from worker.micro_batches(s.accumulate - 1)
    start, ticks = worker.loop.now, next(worker.durations)
    yield round(FORWARD * ticks)
    for i in range(s.buckets):
      done = FORWARD + (1 - FORWARD) * (i + 1) / s.buckets
      yield start + round(done * ticks) - worker.loop.now
      worker.exchange("all-reduce", scale=1 / s.buckets)
    worker.span("compute", "micro-batch", start)
    yield worker.exchange("whole update", count=s.accumulate)


def acco(worker: Worker, s: Settings, *, adaptive: bool):
  """Each exchange runs beside the micro-batches of the next half."""
  half = s.accumulate // 2
  before = yield from worker.micro_batches(half)
  while True:
    estimate = worker.exchange("reduce-scatter", "estimate", "all-gather")
    count = yield from worker.beside(estimate, half, adaptive)
    commit = worker.exchange(*SHARDED, count=before + count)
    what = "micro-batch at the estimate"
    before = yield from worker.beside(commit, half, adaptive, what)


def delayed(worker: Worker, s: Settings, *, parts, adaptive: bool):
  """DPU and weight prediction: an exchange beside the next update's batch."""
  count = yield from worker.micro_batches(s.accumulate)
  while True:
    exchange = worker.exchange(*parts, count=count)
    count = yield from worker.beside(exchange, s.accumulate, adaptive)


def local(worker: Worker, s: Settings, *, parts):
  """Local SGD and DiLoCo: every step updates, the H-th also exchanges."""
  for step in itertools.count(1):
    count = yield from _inner_step(worker, s)
    if step % s.sync_every == 0:
      yield worker.exchange(*parts)
    worker.updated(count)


def streaming_diloco(worker: Worker, s: Settings):
  """Each fragment leaves once in H steps and is waited for `delay` later."""
  starts = {p * s.sync_every // s.fragments for p in range(s.fragments)}
  due: dict[int, Done] = {}
  for step in itertools.count(1):
    count = yield from _inner_step(worker, s)
    if step in due:
      yield due.pop(step)
    if step % s.sync_every in starts:
      due[step + s.delay] = worker.exchange(
        "all-reduce", "whole update", scale=1 / s.fragments
      )
    worker.updated(count)


def _inner_step(worker: Worker, s: Settings):
  count = yield from worker.micro_batches(s.accumulate)
  yield from worker.compute("whole update", worker.ticks["whole update"])
  return count


_dpu = functools.partial(delayed, parts=SHARDED)
_predict = ("reduce-scatter", "update", "predict", "all-gather")
METHODS = {
  "ddp": ddp,
  "ddp_buckets": ddp_buckets,
  "zero1": zero1,
  "acco": functools.partial(acco, adaptive=False),
  "acco_adaptive": functools.partial(acco, adaptive=True),
  "dpu": functools.partial(_dpu, adaptive=False),
  "dpu_adaptive": functools.partial(_dpu, adaptive=True),
  "weight_prediction": functools.partial(
    delayed, parts=_predict, adaptive=False
  ),
  "local_sgd": functools.partial(local, parts=("all-reduce",)),
  "diloco": functools.partial(local, parts=("all-reduce", "whole update")),
  "streaming_diloco": streaming_diloco,
}
LOCAL = ("local_sgd", "diloco", "streaming_diloco")
