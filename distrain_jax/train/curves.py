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
  for axes, name in zip(
    figure.subplots(1, len(panels), squeeze=False)[0], panels
  ):
    panel(axes, runs, name)
  if title:
    figure.suptitle(title)
  figure.savefig(path, dpi=130)


def panel(
  axes: Any, runs: Mapping[str, list[dict[str, Any]]], name: str
) -> None:
  """One metric of several runs, against the step, on Matplotlib axes."""
  for i, (label, lines) in enumerate(runs.items()):
    points = [(x["step"], x[name]) for x in lines if name in x]
    # Equal methods give equal curves: dashes let the ones below show.
    style = ("-", "--", ":", "-.")[i % 4]
    marker = "o" if len(points) < 12 else None
    x, y = zip(*points) if points else ((), ())
    axes.plot(x, y, style, label=label, lw=1.6, marker=marker, ms=4)
  axes.set(xlabel="step", title=TITLES.get(name, name))
  axes.grid(alpha=0.3)
  if len(runs) > 1:
    axes.legend(frameon=False)


# Shown in this order where they were logged; units in the panel's title.
TITLES = {
  "loss": "training loss (nats)",
  "validation_loss": "validation loss (nats)",
  "validation_accuracy": "validation accuracy",
  "validation_bits_per_byte": "validation bits per byte",
  "grad_norm": "gradient norm",
}


def _panels(runs) -> list[str]:
  """The metrics that some run has; one empty panel where there is none yet."""
  logged = {name for lines in runs.values() for x in lines for name in x}
  return [name for name in TITLES if name in logged] or ["loss"]
