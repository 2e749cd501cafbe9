"""The method advisor: what several methods or topologies cost, row by row."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from distrain_jax.inspect.report import Report
from distrain_jax.inspect.table import UNITS, render


class Refusal(NamedTuple):
  """A program that the compiler would not make, such as one without room."""

  name: str  # of the method
  hardware: str
  why: str  # what the compiler said

  def to_json(self) -> dict[str, Any]:
    return {"name": self.name, "hardware": self.hardware, "refused": self.why}


def fits(report: Report) -> bool | None:
  """Whether the peak is within the chip's memory; None: not known.

  The runtime keeps a few per cent of that memory for itself.
  """
  if report.chip is None:
    return None
  return report.memory.peak <= report.chip.memory_bytes


def compare(outcomes: Sequence[Report | Refusal]) -> str:
  """One row per outcome: memory, bytes sent and, where known, times.

  Sizes are of one device. Times and utilisation are those of the model that
  `schedule` describes; a column without a value is left out.
  """
  reports = [x for x in outcomes if isinstance(x, Report)]
  sizes = {
    "peak": lambda r: r.memory.peak,
    "state": lambda r: sum(r.memory.state.values()),
    "sent a step": lambda r: r.wire_bytes,
  }
  columns = [
    ("method", [x.name + _mark(x) for x in outcomes]),
    ("hardware", [x.hardware for x in outcomes]),
  ]
  for name, size in sizes.items():
    scale, unit = in_unit(max(map(size, reports), default=0))
    text = lambda r, size=size, scale=scale: f"{size(r) / scale:,.2f}"
    columns.append((f"{name}, {unit}", _cells(outcomes, text)))
  scale, unit = time_unit(max((r.step.seconds for r in reports), default=0.0))
  times = lambda of: lambda r: f"{of(r) / scale:,.2f}" if r.chip else None
  columns += [
    (f"exposed, {unit}", _cells(outcomes, times(lambda r: r.exposed_seconds))),
    (f"a step, {unit}", _cells(outcomes, times(lambda r: r.step.seconds))),
    ("utilisation", _cells(outcomes, _utilisation)),
    ("fits", [_verdict(x) for x in outcomes]),
  ]
  known = [(h, c) for h, c in columns if any(x is not None for x in c)]
  headers, cells = zip(*known)
  align = "".join("l" if h in ("method", "hardware") else "r" for h in headers)
  notes = [note for x in outcomes for note in _notes(x)]
  return "\n\n".join([render(headers, list(zip(*cells)), align), *notes])


def _mark(outcome) -> str:
  return " *" if _sliced(outcome) else ""


def _sliced(outcome) -> bool:
  """Whether that makes a difference of a hundredth of what is sent."""
  if not isinstance(outcome, Report):
    return False
  sliced = (c for c in outcome.step.communication if c.collective.sliced)
  sent = sum(c.collective.wire_bytes * c.runs for c in sliced)
  return sent / 2 > 0.01 * outcome.wire_bytes


def _notes(outcome) -> list[str]:
  where = f"{outcome.name} on {outcome.hardware}"
  if isinstance(outcome, Refusal):
    return [f"{where} was refused: {outcome.why}"]
  notes = []
  if _sliced(outcome):
    notes.append(
      f"* {where}: the compiler made an all-reduce of a reduce-scatter, and "
      "sends twice its bytes."
    )
  if outcome.step.unknown:
    notes.append(f"{where}, not counted: {'; '.join(outcome.step.unknown)}.")
  return notes


def in_unit(largest: float) -> tuple[int, str]:
  """(bytes, name) of the unit in which a column's largest size is at least 1.

  >>> in_unit(3 * 2**29)
  (1073741824, 'GiB')
  """
  power = 0
  while largest >= 1024 ** (power + 1) and power + 1 < len(UNITS):
    power += 1
  return 1024**power, UNITS[power]


def time_unit(longest: float) -> tuple[float, str]:
  """(seconds, name) of a unit for times up to `longest` seconds.

  >>> time_unit(0.25)
  (0.001, 'ms')
  """
  return (1e-3, "ms") if longest >= 1e-3 else (1e-6, "µs")


def _cells(outcomes, text):
  return [text(x) if isinstance(x, Report) else None for x in outcomes]


def _utilisation(report: Report) -> str | None:
  return f"{100 * report.utilisation:.1f} %" if report.chip else None


def _verdict(outcome: Report | Refusal) -> str | None:
  if isinstance(outcome, Refusal):
    return "no"
  found = fits(outcome)
  return None if found is None else ("yes" if found else "no")
