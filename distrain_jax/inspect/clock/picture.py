"""The clock's two pictures: against communication, and a few rounds of it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain_jax.inspect.clock.simulation import Outcome
from distrain_jax.inspect.clock.worker import Span
from distrain_jax.inspect.picture import KINDS

# A colour a family (Okabe and Ito's), a dash a member.
LINES = {
  "ddp": ("#000000", "-"),
  "ddp_buckets": ("#8a8a8a", "--"),
  "zero1": ("#000000", "-"),
  "acco": ("#d55e00", "-"),
  "acco_adaptive": ("#d55e00", ":"),
  "dpu": ("#0072b2", "-"),
  "dpu_adaptive": ("#0072b2", ":"),
  "weight_prediction": ("#56b4e9", "--"),
  "local_sgd": ("#009e73", "-"),
  "diloco": ("#009e73", "--"),
  "streaming_diloco": ("#cc79a7", "-."),
}
COLOURS = {
  "micro-batch": "#0072b2",
  "micro-batch at the estimate": "#8fc7ea",
  "reduce-scatter": KINDS["reduce-scatter"],
  "all-gather": KINDS["all-gather"],
  "all-reduce": KINDS["all-reduce"],
  "update": "#009e73",
  "whole update": "#009e73",
  "estimate": "#8dd3b5",
  "predict": "#8dd3b5",
}
ROWS = {"compute": (0.0, 0.48), "exchange": (0.5, 0.26)}  # top, height


def ratio(
  sweep: Mapping[str, Sequence[Outcome]],
  ratios: Sequence[float],
  compute: float,
  path: str | Path,
  *,
  title: str = "",
) -> None:
  """Writes a PNG: an update's time and gradients a second against Tm / Tc.

  Args:
    sweep: method -> an outcome for each of the ratios; zero1's must be there.
    ratios: Tm / Tc, rising.
    compute: Tc, seconds.
    path: of the PNG.
    title: above both panels.
  """
  figure = _figure(12.5, 5.4)
  left, right = figure.subplots(1, 2)
  time = {m: [o.update_seconds / compute for o in x] for m, x in sweep.items()}
  base = [o.micro_batches_per_second for o in sweep["zero1"]]
  rate = {
    m: [o.micro_batches_per_second / b for o, b in zip(x, base)]
    for m, x in sweep.items()
  }
  _curves(left, ratios, time)
  _curves(right, ratios, rate)
  left.set(ylabel="time of an update / Tc", title="Time of an update")
  right.set(
    ylabel="gradients a second / those of zero1",
    title="Gradients a second, beside ZeRO-1",
  )
  if "acco" in sweep:
    offsets = ((0, -38), (112, -30)), ((-18, 34), (16, -44))
    _mark(left, ratios, time["acco"], rate["acco"], offsets[0])
    _mark(right, ratios, rate["acco"], rate["acco"], offsets[1])
    left.set_ylim(bottom=0.6)
  for axes in (left, right):
    axes.set_xlabel("Tm / Tc: one exchange / compute of an update's batch")
    axes.grid(alpha=0.25, which="both", lw=0.5)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
  figure.suptitle(title)
  note = "* with a batch that grows while workers wait; others' is the same"
  figure.supxlabel(note, fontsize=8)
  figure.savefig(path, dpi=130)


def gantt(
  columns: Sequence[tuple[str, Sequence[tuple[str, Outcome]], float]],
  path: str | Path,
  *,
  title: str = "",
) -> None:
  """Writes a PNG: a panel per outcome, two rows per worker.

  Args:
    columns: (heading, [(caption, outcome), ...], seconds to show) of each.
    path: of the PNG.
    title: above all.
  """
  most = max(len(outcomes) for _, outcomes, _ in columns)
  workers = len(columns[0][1][0][1].utilisation)
  figure = _figure(7.6 * len(columns), most * (0.9 + 0.36 * workers) + 1.2)
  panels = figure.subplots(most, len(columns), squeeze=False)
  seen: dict[str, None] = {}
  for j, (heading, outcomes, end) in enumerate(columns):
    for i in range(most):
      axes = panels[i][j]
      if i >= len(outcomes):
        axes.set_axis_off()
        continue
      caption, outcome = outcomes[i]
      seen |= dict.fromkeys(_bars(axes, outcome, end))
      text = f"{heading}: {caption}"
      axes.set_title(text, loc="left", fontsize=9)
    panels[len(outcomes) - 1][j].set_xlabel("seconds")
  _key(figure, seen)
  figure.suptitle(title)
  figure.savefig(path, dpi=130)


def _figure(width: float, height: float) -> Any:
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _curves(axes, ratios, values) -> None:
  """One line for all methods of the same values."""
  groups: list[tuple[list[str], list[float]]] = []
  for method, y in values.items():
    for names, other in groups:
      if all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(y, other)):
        names.append(method)
        break
    else:
      groups.append(([method], y))
  for names, y in groups:
    colour, dash = LINES[names[0]]
    label = ", ".join(n + "*" * n.endswith("adaptive") for n in names)
    axes.plot(ratios, y, label=label, lw=1.8, color=colour, ls=dash)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log", base=2)
  axes.xaxis.set_major_formatter(_short)
  axes.yaxis.set_major_formatter(_short)


def _short(value: float, position: int) -> str:
  del position
  return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


def _mark(axes, ratios, acco, gain, offsets) -> None:
  """Where ACCO gains most over ZeRO-1, and from where on it loses."""
  best = max(range(len(gain)), key=gain.__getitem__)
  marks = {best: f"acco: {gain[best]:.2f} times\nas fast as zero1"}
  falls = (i for i in range(best, len(gain)) if gain[i] <= 1 + 1e-9)
  for i in itertools.islice(falls, 1):
    marks[i] = "acco is slower\nthan zero1 from here on"
  for (i, text), offset in zip(marks.items(), offsets):
    axes.plot([ratios[i]], [acco[i]], "o", color="black", ms=5, zorder=5)
    axes.annotate(
      text,
      (ratios[i], acco[i]),
      offset,
      textcoords="offset points",
      ha="center",
      fontsize=8,
      arrowprops={"arrowstyle": "-", "lw": 0.8},
    )


def _bars(axes, outcome: Outcome, end: float) -> list[str]:
  """Draws one panel; what is in it."""
  workers = len(outcome.utilisation)
  shown = [s for s in outcome.spans if s.start < end]
  for (stream, what), bars in _by_kind(shown, end).items():
    top, height = ROWS[stream]
    for worker, spans in bars.items():
      y = worker + top - 0.4
      how = {"color": COLOURS[what], "ec": "white", "lw": 0.6}
      axes.broken_barh(spans, (y, height), **how)
  for update in outcome.updates:
    if update.end <= end:
      axes.axvline(update.end, color="black", lw=0.9, ls=(0, (2, 2)))
  axes.set(
    xlim=(0, end),
    ylim=(workers - 0.4, -0.55),
    yticks=range(workers),
    yticklabels=[f"worker {i}" for i in range(workers)],
  )
  axes.tick_params(labelsize=8)
  axes.spines[["top", "right"]].set_visible(False)
  return [s.what for s in shown]


def _by_kind(spans: Sequence[Span], end: float):
  """(stream, what) -> worker -> [(start, seconds)]."""
  found: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
  for s in spans:
    rows = found.setdefault((s.stream, s.what), {})
    bar = s.start, min(s.end, end) - s.start
    rows.setdefault(s.worker, []).append(bar)
  return found


def _key(figure, seen) -> None:
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  handles = [Patch(color=c, label=k) for k, c in COLOURS.items() if k in seen]
  line = {"color": "black", "lw": 0.9, "ls": (0, (2, 2))}
  handles.append(Line2D([], [], label="an update is there", **line))
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=len(handles),
    frameon=False,
    fontsize=8,
  )
