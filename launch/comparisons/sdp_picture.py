"""The picture of launch/compare_sdp.py: memory, FLOPs, traffic by coverage."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

Found = dict[str, Any]

PANELS = (
  ("peak", 2**30, "peak memory of a device, GiB"),
  ("flops", 1e12, "TFLOP of a device and step"),
  ("wire", 2**30, "sent by a device a step, GiB"),
)
# By level: colour, line, and a marker that leaves the other one to be seen.
LEVELS = {
  "neuron": {"color": "tab:red", "ls": "-", "marker": "o"},
  "block": {"color": "tab:blue", "ls": "--", "marker": "s", "mfc": "none"},
}
# Baselines have no coverage: lines, one for those that are as good as equal.
LINES = {
  "DDP": "DDP",
  "DDP, nothing recomputed": "DDP without remat",
  "ZeRO-1": "ZeRO-1",
  "FSDP": "FSDP",
  "DDP, dropout 0.1": "dropout",
  "DDP, stochastic depth 1/2": "stochastic depth",
}
EQUAL = 0.01  # of each other


def save(groups: Mapping[tuple[str, str], Sequence[Found]], path: Path) -> bool:
  """A row of panels for each (preset, topology); False: nothing to draw."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  shown = {k: [x for x in v if "peak" in x] for k, v in groups.items()}
  shown = {k: v for k, v in shown.items() if v}
  if not shown:
    return False
  size = (15, 0.8 + 3.6 * len(shown))
  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  rows = figure.subplots(len(shown), len(PANELS), squeeze=False)
  for axes, ((preset, where), found) in zip(rows, shown.items()):
    for one, panel in zip(axes, PANELS):
      _panel(one, found, *panel)
      one.set_title(f"Llama {preset} on {where}", fontsize=10)
  handles: dict[str, Any] = {}
  for one in rows.flat:
    for handle, label in zip(*one.get_legend_handles_labels()):
      handles.setdefault(label, handle)
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=5,
    frameon=False,
    fontsize=9,
  )
  figure.savefig(path, dpi=120)
  return True


def _panel(axes, found, field: str, scale: float, title: str) -> None:
  for value, names in _lines(found, field):
    axes.axhline(value / scale, color="black", lw=1)
    text = ", ".join(LINES[name] for name in names)
    axes.annotate(
      text,
      (0.79, value / scale),
      (0, 2),
      textcoords="offset points",
      size=8,
      ha="right",
    )
  for level, style in LEVELS.items():
    points = [
      (float(Fraction(x["coverage"])), x[field] / scale)
      for x in found
      if x["level"] == level and "," not in x["name"]
    ]
    if points:
      label = f"SDP, {level} level"
      axes.plot(*zip(*sorted(points)), ms=8, label=label, **style)
  dense = [
    (float(Fraction(x["name"].split()[1])), x[field] / scale)
    for x in found
    if x["name"].startswith("dense ")
  ]
  if dense:
    label = "dense model as small as a subnetwork"
    axes.plot(*zip(*dense), "x", color="tab:purple", ms=8, label=label)
  axes.set(xlabel="coverage", ylabel=title, xlim=(0.2, 0.8))
  axes.set_xticks([0.25, 0.375, 0.5, 0.75], ["1/4", "3/8", "1/2", "3/4"])
  axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
  axes.grid(alpha=0.3)


def _lines(found, field: str) -> list[tuple[float, list[str]]]:
  """(value, the baselines that have it)."""
  groups: list[tuple[float, list[str]]] = []
  for x in found:
    if x["name"] not in LINES:
      continue
    for value, names in groups:
      if abs(x[field] - value) <= EQUAL * value:
        names.append(x["name"])
        break
    else:
      groups.append((x[field], [x["name"]]))
  return groups
