"""A run's curves as a picture; several runs' side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "curves.png"


def draw(
  runs: Mapping[str, list[dict[str, Any]]], path: Path, *, title: str = ""
) -> None:
  """Loss, then whatever was evaluated, against the step.

  Args:
    runs: a label -> the lines of its metrics.jsonl, as `read_metrics` gives.
    path: of the PNG.
    title: above the panels.
  """
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  panels = _panels(runs)
  figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
  FigureCanvasAgg(figure)
  for axes, (name, curves) in zip(
    figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
  ):
    for i, (label, points) in enumerate(curves):
      # Equal methods give equal curves: dashes let the ones below show.
      style = ("-", "--", ":", "-.")[i % 4]
      steps, values = zip(*points)
      marker = "o" if len(points) < 12 else None
      axes.plot(steps, values, style, label=label, lw=1.6, marker=marker, ms=4)
    axes.set(xlabel="step", title=name)
    axes.grid(alpha=0.3)
    if len(runs) > 1:
      axes.legend(frameon=False)
  if title:
    figure.suptitle(title)
  figure.savefig(path, dpi=130)


# Shown in this order where they were logged; units in the panel's title.
TITLES = {
  "loss": "training loss (nats)",
  "validation_loss": "validation loss (nats)",
  "validation_accuracy": "validation accuracy",
  "validation_bits_per_byte": "validation bits per byte",
  "grad_norm": "gradient norm",
}


def _panels(runs) -> dict[str, list[tuple[str, list[tuple[int, float]]]]]:
  """Panel title -> [(label, [(step, value)])]."""
  panels: dict[str, list[Any]] = {}
  for name, title in TITLES.items():
    for label, lines in runs.items():
      points = [(x["step"], x[name]) for x in lines if name in x]
      if points:
        panels.setdefault(title, []).append((label, points))
  return panels or {"no metrics yet": []}
