"""What a compiled program costs on its hardware: the report and its table."""

from typing import Any, NamedTuple

from distrain_jax.inspect.buffers import Buffers
from distrain_jax.inspect.hardware import Chip
from distrain_jax.inspect.memory import Memory
from distrain_jax.inspect.schedule import Communication, Step
from distrain_jax.inspect.table import bytes_text, render


class Report(NamedTuple):
  """Of one device; `print(report)` shows it, `to_json()` keeps it."""

  name: str  # of the method or function
  hardware: str  # the topology's name, or the platform
  devices: int
  chip: Chip | None  # None: no peaks known, and then no times
  memory: Memory
  step: Step
  compile_seconds: float
  buffers: Buffers | None = None  # of `compile(..., with_buffers=True)`

  @property
  def flops(self) -> float:
    """Of matrix products and convolutions, in a step on one device."""
    return sum(self.step.flops.values())

  @property
  def wire_bytes(self) -> float:
    """That a device sends in a step."""
    return sum(_sent(c) for c in self.step.communication)

  @property
  def communication_seconds(self) -> float:
    """On the wire in a step, hidden or not."""
    return sum(c.seconds * c.runs for c in self.step.communication)

  @property
  def exposed_seconds(self) -> float:
    """Of communication that nothing hides, in a step."""
    return sum(c.exposed * c.runs for c in self.step.communication)

  @property
  def utilisation(self) -> float:
    """FLOPs of a step over what the chip could have done in its time (bf16).

    The model's utilisation (MFU) where nothing is computed twice: what
    rematerialisation computes again is counted.
    """
    if not self.step.seconds or self.chip is None:
      return 0.0
    return self.flops / (self.step.seconds * self.chip.peak("bf16"))

  def wire_by_kind(self) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of collective."""
    found: dict[str, float] = {}
    for c in self.step.communication:
      kind = c.collective.kind
      found[kind] = found.get(kind, 0.0) + _sent(c)
    return found

  def to_json(self) -> dict[str, Any]:
    """Everything, as plain values; seconds are the model's (see schedule)."""
    return {
      "name": self.name,
      "hardware": self.hardware,
      "devices": self.devices,
      "chip": _chip(self.chip),
      "compile_seconds": round(self.compile_seconds, 2),
      "memory": self.memory._asdict(),
      "flops": self.step.flops,
      "wire_bytes": self.wire_bytes,
      "wire_bytes_by_kind": self.wire_by_kind(),
      "model": {
        "step_seconds": self.step.seconds,
        "compute_seconds": self.step.compute_seconds,
        "communication_seconds": self.communication_seconds,
        "exposed_communication_seconds": self.exposed_seconds,
        "exposed_copy_seconds": self.step.copies_exposed,
        "utilisation": self.utilisation,
      },
      "collectives": [_collective(c) for c in self.step.communication],
      "unknown": list(self.step.unknown),
    }

  def __str__(self) -> str:
    parts = [
      f"{self.name} on {self.hardware}, {self.devices} devices "
      f"(compiled in {self.compile_seconds:.1f} s). Per device:",
      _memory_table(self),
      _collective_table(self),
      _time_table(self),
      *_notes(self),
    ]
    return "\n\n".join(part for part in parts if part)


def _sent(c: Communication) -> float:
  return c.collective.wire_bytes * c.runs


def _chip(chip: Chip | None) -> dict[str, Any] | None:
  if chip is None:
    return None
  fields = chip._asdict()
  return fields | {"flops": dict(chip.flops), "source": dict(chip.source)}


def _collective(c: Communication) -> dict[str, Any]:
  one = c.collective
  groups = one.groups or ()
  return {
    "name": one.name,
    "kind": one.kind,
    "dtype": one.dtype,
    "bytes": one.bytes,
    "groups": len(groups),
    "group_size": one.group_size,
    "first_group": list(groups[0]) if groups else [],
    "runs": c.runs,
    "wire_bytes": one.wire_bytes,
    "seconds": c.seconds,
    "exposed_seconds": c.exposed,
    "asynchronous": c.window is not None,
    "window": c.window._asdict() if c.window else None,
    "each_keeps_a_part": one.sliced,
    "op_name": one.op_name,
  }


def _memory_table(report: Report) -> str:
  m = report.memory
  rows = [(f"state: {name}", size) for name, size in m.state.items()]
  rows += [
    ("batch and other arguments" if m.state else "arguments", m.batch),
    ("padding of the arguments", m.padding),
    ("temporaries like gradients (estimate)", m.gradient_like),
    ("temporaries: activations, workspace (estimate)", m.activations),
    ("outputs in memory of their own", m.outputs - m.aliased),
    ("peak of these", m.peak),
    ("program code", m.code),
  ]
  return render(
    ("memory", "bytes", ""),
    [(name, f"{size:,}", bytes_text(size)) for name, size in rows],
    "lrr",
  )


def _collective_table(report: Report) -> str:
  if not report.step.communication:
    return "No collectives."
  rows = []
  for c in sorted(report.step.communication, key=_sent, reverse=True):
    one = c.collective
    rows.append(
      (
        one.kind + (" *" if one.sliced else ""),
        one.dtype,
        bytes_text(one.bytes),
        f"{one.group_size}" if one.kind != "collective-permute" else "pairs",
        f"{c.runs}",
        bytes_text(_sent(c)),
        _milliseconds(c.seconds * c.runs) if report.chip else "?",
        _milliseconds(c.exposed * c.runs) if report.chip else "?",
        "no" if c.window is None else "yes",
        f"{c.window.flops:.3g}" if c.window else "",
      )
    )
  heads = ("collective", "dtype", "bytes", "among", "runs", "sent a step")
  heads += ("on the wire", "exposed", "asynchronous", "FLOPs beside it")
  return render(heads, rows, "llrrrrrrlr")


def _time_table(report: Report) -> str:
  if report.chip is None:
    return (
      f"{report.flops:,.0f} FLOPs; no times: no peaks known of this hardware."
    )
  step = report.step
  rows = [
    ("matrix FLOPs", f"{report.flops:.4g}"),
    ("sent", bytes_text(report.wire_bytes)),
    ("compute", _milliseconds(step.compute_seconds)),
    ("communication", _milliseconds(report.communication_seconds)),
    ("of which exposed", _milliseconds(report.exposed_seconds)),
    ("waiting for copies", _milliseconds(step.copies_exposed)),
    ("a step", _milliseconds(step.seconds)),
    ("utilisation", f"{100 * report.utilisation:.1f} %"),
  ]
  return render(("a step, by the model", ""), rows, "lr")


def _notes(report: Report) -> list[str]:
  notes = []
  if any(c.collective.sliced for c in report.step.communication):
    notes.append(
      "* Each device keeps a part of this all-reduce's result: the compiler "
      "made it of a reduce-scatter, which would send half."
    )
  if report.step.unknown:
    notes.append("Not counted: " + "; ".join(report.step.unknown) + ".")
  if report.chip is not None:
    notes.append(assumptions(report.chip))
  return notes


def assumptions(chip: Chip) -> str:
  """The inputs of the model, in a sentence."""
  return (
    f"Model, not measurement: {chip.name} at its published peaks of "
    f"{chip.peak('bf16') / 1e12:.0f} TFLOP/s (bf16), "
    f"{chip.memory_bandwidth / 1e9:.0f} GB/s memory, "
    f"{chip.link_bandwidth / 1e9:.0f} GB/s sent in a ring, "
    f"{chip.network_bandwidth / 1e9:.0f} GB/s between hosts; each instruction "
    "at its roofline, synchronous collectives fully exposed, no latencies."
  )


def _milliseconds(seconds: float) -> str:
  return f"{seconds * 1e3:,.3f} ms"
