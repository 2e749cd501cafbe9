"""Reports as one picture: a step's timeline, and what memory is used for."""

import bisect
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from distrain_jax.inspect.advisor import in_unit, time_unit
from distrain_jax.inspect.report import Report, assumptions
from distrain_jax.inspect.table import bytes_text
from distrain_jax.inspect.timeline import Event

# Rows of a timeline, from the top, and their labels.
STREAMS = {
  "compute": "compute",
  "communication": "communication",
  "memory": "memory copies",
}
# Colours that remain apart for most colour-blind readers (Okabe and Ito).
KINDS = {
  "matrix products": "#0072b2",
  "other compute": "#8fc7ea",
  "all-reduce": "#d55e00",
  "reduce-scatter": "#e69f00",
  "all-gather": "#cc79a7",
  "all-to-all": "#009e73",
  "collective-permute": "#b8b03a",
  "collective-broadcast": "#7d5ba6",
  "copies": "#9a9a9a",
}
EXPOSED = "#111111"
MANY = 1000  # bars: the timeline of a step has put some together
# Bars thinner than a pixel shade it in proportion; snapped, most would vanish.
THIN = {"lw": 0, "snap": False}
STATE = ("#0b3c5d", "#2c7fb8", "#59a5d8", "#91c9ef", "#c3e2f7")
OTHERS = {  # kinds of memory that are no state, in the order of the stack
  "batch and other arguments": "#7fbf7b",
  "padding of the arguments": "#d9d9d9",
  "temporaries like gradients (estimate)": "#e69f00",
  "activations, workspace (estimate)": "#f5d08a",
  "outputs in memory of their own": "#b58fc9",
}
# Of the largest peak: what is smaller in all reports is shown as one.
SMALL = 0.01
REST = "the rest, each under 1 %"


def save(
  reports: Sequence[Report], path: str | Path, *, title: str = ""
) -> None:
  """Writes a PNG: a timeline per report, on one scale, above memory by kind.

  Args:
    reports: of programs to be seen side by side.
    path: of the PNG.
    title: above all.

  Raises:
    ValueError: for no reports.
  """
  figure(reports, title=title).savefig(path, dpi=130)


def figure(reports: Sequence[Report], *, title: str = "") -> Any:
  """As `save`, the Matplotlib figure itself.

  Axes: one per report that has times, labelled with its name, then "memory".
  """
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if not reports:
    raise ValueError("picture: there are no reports to draw.")
  timed = [r for r in reports if r.chip is not None and r.step.seconds]
  heights = [1.4] * len(timed) + [0.9 + 0.45 * len(reports)]
  made = Figure(figsize=(12, sum(heights) + 1.6), layout="constrained")
  FigureCanvasAgg(made)
  panels = made.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
  *above, below = panels[:, 0]
  end = max((r.step.seconds for r in timed), default=0.0)
  for axes, report in zip(above, timed):
    timeline(axes, report, end)
  if timed:
    above[-1].set_xlabel(f"{time_unit(end)[1]} from the start of the step")
    _legend(above[0], _kinds_legend(timed))
    for axes in above[:-1]:
      axes.tick_params(labelbottom=False)
  memory(below, reports)
  if title:
    made.suptitle(title)
  made.supxlabel(_caption(reports, bool(timed)), x=0.01, ha="left", fontsize=8)
  return made


def timeline(axes: Any, report: Report, end: float) -> None:
  """One step's events on Matplotlib axes, a row per stream.

  Args:
    axes: where.
    report: whose.
    end: seconds that the horizontal axis spans.
  """
  rows = {stream: -i for i, stream in enumerate(STREAMS)}
  scale, unit = time_unit(end)
  for stream, y in rows.items():
    for kind in KINDS:
      bars = [
        (e.start / scale, e.seconds / scale)
        for e in report.step.events
        if (e.stream, e.kind) == (stream, kind)
      ]
      if bars:  # one collection, however many bars
        axes.broken_barh(bars, (y - 0.36, 0.72), color=KINDS[kind], **THIN)
  bare = [(a / scale, (b - a) / scale) for a, b in exposed(report.step.events)]
  y = rows["communication"]
  if bare:
    axes.broken_barh(bare, (y - 0.5, 0.12), color=EXPOSED, **THIN)
  axes.set(
    xlim=(0, end / scale * 1.005 or 1),
    ylim=(min(rows.values()) - 0.55, 0.55),
    yticks=list(rows.values()),
    yticklabels=list(STREAMS.values()),
  )
  axes.set_title(_summary(report, scale, unit), loc="left", fontsize=9)
  axes.set_label(report.name)
  axes.grid(axis="x", alpha=0.3)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)


def exposed(events: Iterable[Event]) -> list[tuple[float, float]]:
  """(start, end) of the seconds that communicate while nothing computes."""
  events = list(events)
  computing = _union(e for e in events if e.stream == "compute")
  found = []
  for start, end in _union(e for e in events if e.stream == "communication"):
    for a, b in _during(computing, start, end):
      if a > start:
        found.append((start, a))
      start = b
    if start < end:
      found.append((start, end))
  return found


def _union(events: Iterable[Event]) -> list[tuple[float, float]]:
  """Intervals in order, those that touch as one."""
  out: list[tuple[float, float]] = []
  for e in sorted(events, key=lambda e: e.start):
    end = e.start + e.seconds
    if out and e.start <= out[-1][1]:
      out[-1] = (out[-1][0], max(out[-1][1], end))
    else:
      out.append((e.start, end))
  return out


def _during(intervals, start, end):
  """Those of sorted, disjoint intervals that overlap (start, end)."""
  first = bisect.bisect_right(intervals, start, key=lambda ab: ab[1])
  for a, b in intervals[first:]:
    if a >= end:
      break
    yield a, b


def memory(axes: Any, reports: Sequence[Report]) -> None:
  """Stacked bars of the peak's parts, one per report, from the top."""
  parts = parts_of(reports)
  most = max(sum(p.values()) for p in parts)
  scale, unit = in_unit(most)
  left = [0.0] * len(reports)
  for name, colour in _colours(parts).items():
    sizes = [p.get(name, 0) / scale for p in parts]
    axes.barh(range(len(parts)), sizes, left=left, color=colour, label=name)
    left = [a + b for a, b in zip(left, sizes)]
  for y, (total, report) in enumerate(zip(left, reports)):
    _note(axes, bytes_text(report.memory.peak), (total, y), (4, 0), va="center")
  far, limit = [], 1.12 * most / scale
  for name, size in _chips(reports).items():
    text = f"{name} has {bytes_text(size)}"
    if size > 1.6 * most:
      far.append(text)
      continue
    limit = max(limit, 1.08 * size / scale)
    axes.axvline(size / scale, color="black", ls="--", lw=1)
    where = (size / scale, len(reports) - 0.5)
    _note(axes, text, where, (-4, 3), ha="right", fontsize=8)
  axes.set(
    xlim=(0, limit or 1),
    xlabel="; ".join([f"{unit} per device at the peak", *far]),
    yticks=range(len(reports)),
    yticklabels=[_label(r, reports) for r in reports],
  )
  axes.invert_yaxis()
  axes.set_label("memory")
  axes.spines[["top", "right"]].set_visible(False)
  _legend(axes)


def parts_of(reports: Sequence[Report]) -> list[dict[str, int]]:
  """Bytes of each report's peak by kind; they sum up to the peak.

  What is small in all reports is one part.
  """
  found = []
  for m in (r.memory for r in reports):
    sizes = {f"state: {name}": size for name, size in m.state.items()}
    temporaries = m.gradient_like, m.activations
    others = (m.batch, m.padding, *temporaries, m.outputs - m.aliased)
    found.append(sizes | dict(zip(OTHERS, others)))
  least = SMALL * max(r.memory.peak for r in reports)
  names = dict.fromkeys(name for parts in found for name in parts)
  small = {n for n in names if max(p.get(n, 0) for p in found) < least}
  for parts in found:
    rest = sum(parts.pop(name, 0) for name in small)
    if rest:
      parts[REST] = rest
  return found


def _colours(parts) -> dict[str, str]:
  """Of the parts that some report has, in the order of the stack."""
  seen = dict.fromkeys(name for p in parts for name in p)
  state = [name for name in seen if name not in OTHERS and name != REST]
  found = {n: STATE[i % len(STATE)] for i, n in enumerate(state)}
  found |= {n: c for n, c in OTHERS.items() if n in seen}
  return found | ({REST: "#555555"} if REST in seen else {})


def _chips(reports) -> dict[str, int]:
  return {r.chip.name: r.chip.memory_bytes for r in reports if r.chip}


def _label(report: Report, reports) -> str:
  """The method; with the hardware where that differs."""
  if len({r.hardware for r in reports}) == 1:
    return report.name
  return f"{report.name} on {report.hardware}"


def _summary(report: Report, scale: float, unit: str) -> str:
  step = report.step
  # As many decimals as show four digits of the whole.
  decimals = max(0, 3 - math.floor(math.log10(step.seconds / scale)))
  text = lambda seconds: f"{seconds / scale:,.{decimals}f}"
  parts = [
    f"{text(step.compute_seconds)} compute",
    f"{text(report.exposed_seconds)} exposed communication",
  ]
  if step.copies_exposed:
    parts.append(f"{text(step.copies_exposed)} waiting for copies")
  hidden = report.communication_seconds - report.exposed_seconds
  return (
    f"{report.name} on {report.hardware}: {text(step.seconds)} {unit} a step = "
    f"{' + '.join(parts)}; {text(hidden)} of communication hidden"
  )


def _caption(reports: Sequence[Report], timed: bool) -> str:
  lines = []
  for chip in {r.chip.name: r.chip for r in reports if r.chip}.values():
    lines += textwrap.wrap(assumptions(chip), 170)
  if any(len(r.step.events) > MANY for r in reports):
    lines.append("Long loops are drawn coarsely; the titles are exact.")
  if not timed:
    lines.append("No timeline: no peaks are known of this hardware.")
  return "\n".join(lines)


def _kinds_legend(reports):
  """A patch per kind that occurs, and one for what is exposed."""
  from matplotlib.patches import Patch

  seen = {e.kind for r in reports for e in r.step.events}
  patches = [Patch(color=c, label=k) for k, c in KINDS.items() if k in seen]
  if any(exposed(r.step.events) for r in reports):
    label = "exposed: nothing computes meanwhile"
    patches.append(Patch(color=EXPOSED, label=label))
  return patches


def _legend(axes, handles=None) -> None:
  """Beside the axes, where it covers no bar."""
  axes.legend(
    handles=handles,
    loc="upper left",
    bbox_to_anchor=(1.01, 1),
    frameon=False,
    fontsize=8,
    borderaxespad=0,
  )


def _note(axes, text, where, offset, **how) -> None:
  axes.annotate(text, where, offset, textcoords="offset points", **how)
