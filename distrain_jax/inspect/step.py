"""What a walk through a compiled program finds: see `schedule`."""

from typing import NamedTuple

from distrain_jax.inspect.collectives import Collective


class Event(NamedTuple):
  """A bar of the timeline."""

  stream: str  # compute, communication or memory
  kind: str  # "matrix products", "other compute", a collective's, "copies"
  start: float  # seconds from the step's beginning
  seconds: float


class Window(NamedTuple):
  """What is scheduled between an asynchronous start and its done, once."""

  seconds: float  # of compute
  flops: float
  instructions: tuple[str, ...]  # those that take time, in order


class Communication(NamedTuple):
  """A collective of the program, with all of its runs in a step."""

  collective: Collective
  runs: int
  seconds: float  # of one run, on the wire
  exposed: float  # seconds of one run in which the device does nothing else
  window: Window | None  # None: synchronous


class Step(NamedTuple):
  seconds: float
  compute_seconds: float
  flops: dict[str, float]  # by dtype of the operands
  communication: tuple[Communication, ...]
  copies_exposed: float  # seconds that asynchronous copies are waited for
  events: tuple[Event, ...]
  unknown: tuple[str, ...]  # what the model has no rule for
