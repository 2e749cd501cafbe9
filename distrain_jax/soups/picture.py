"""Pictures of soups: losses along paths, by layer, and consensus distances."""

from collections.abc import Mapping, Sequence
from pathlib import Path as File
from typing import Any

import numpy as np

from distrain_jax.soups.distances import Consensus
from distrain_jax.soups.paths import Path, barrier

# Okabe and Ito's.
COLOURS = (
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#e69f00",
  "#56b4e9",
  "#111111",
)
DASHES = ("-", "--", ":", "-.")
MANY = 10  # paths: more are not told apart by a legend


def draw(
  file: str | File,
  *,
  paths: Mapping[str, Path] | None = None,
  layers: Mapping[str, Path] | None = None,
  consensus: Mapping[str, Consensus] | Consensus | None = None,
  title: str = "",
  loss: str = "loss",
) -> None:
  """Writes a PNG with a panel for each of what is given.

  Args:
    file: of the PNG.
    paths: a name -> the path between two whole models.
    layers: a layer's name -> its path, as `layer_paths` returns them.
    consensus: what `consensus_distance` returned; or a name -> that of several
      populations of one architecture.
    title: above the panels.
    loss: what the paths' loss is.

  Raises:
    ValueError: if nothing is given.
  """
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if isinstance(consensus, Consensus):
    consensus = {"": consensus}
  panels: list[tuple[Any, Any, int]] = []  # (function, data, rows)
  if paths:
    panels.append((draw_paths, paths, 0))
  if layers:
    panels.append((draw_layers, layers, len(layers)))
  if consensus:
    rows = len(next(iter(consensus.values())).by_layer)
    panels.append((draw_consensus, consensus, rows))
  if not panels:
    raise ValueError(
      "picture: nothing to draw; pass paths, layers or consensus."
    )
  rows = max(x[2] for x in panels)
  size = (5.4 * len(panels), min(max(4.2, 1.4 + 0.22 * rows), 24))
  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (function, data, _) in zip(all_axes, panels):
    if function is draw_consensus:
      function(axes, data)
    else:
      function(axes, data, loss=loss)
  if title:
    figure.suptitle(title)
  figure.savefig(file, dpi=130)


def draw_paths(
  axes: Any, paths: Mapping[str, Path], *, loss: str = "loss"
) -> None:
  """The loss from model to model on Matplotlib axes; barriers in the legend."""
  for i, (name, along) in enumerate(paths.items()):
    label = (
      f"{name}: barrier {barrier(along):.3g}" if _has_ends(along) else name
    )
    axes.plot(
      along.t,
      along.loss,
      DASHES[i // len(COLOURS) % len(DASHES)],
      color=COLOURS[i % len(COLOURS)],
      marker="o",
      ms=3,
      lw=1.6,
      label=label if i < MANY else None,
    )
  axes.set(xlabel="t, from the first model to the second", ylabel=loss)
  axes.set_title("straight lines between models", fontsize=10)
  axes.grid(alpha=0.3)
  _from_zero(axes, [x.loss for x in paths.values()])
  axes.legend(frameon=False, fontsize=8)
  if len(paths) > MANY:
    note = f"{len(paths) - MANY} more without a name"
    axes.annotate(note, (0.02, 0.02), xycoords="axes fraction", fontsize=8)


def draw_layers(
  axes: Any, layers: Mapping[str, Path], *, loss: str = "loss"
) -> None:
  """How far the loss rises when one layer goes to the other model.

  A dot for the highest point of each layer's path, and one for its end.
  """
  names = list(layers)
  most = [float(np.max(x.loss - x.loss[0])) for x in layers.values()]
  end = [float(x.loss[-1] - x.loss[0]) for x in layers.values()]
  y = np.arange(len(names))
  axes.hlines(y, np.minimum(end, 0), most, color="#c8c8c8", lw=2, zorder=1)
  axes.scatter(most, y, s=24, color=COLOURS[1], label="highest on the way")
  ring = {"s": 64, "facecolors": "none", "edgecolors": COLOURS[0]}
  axes.scatter(end, y, label="at the other model", zorder=3, **ring)
  axes.axvline(0, color="#888888", lw=0.8)
  axes.set(xlabel=f"rise of the {loss}", yticks=y)
  axes.set_yticklabels(names, fontsize=8)
  axes.set_title("one layer interpolated, the others the first's", fontsize=10)
  _rows(axes)
  _legend_below(axes)


def draw_consensus(axes: Any, consensus: Mapping[str, Consensus]) -> None:
  """Relative consensus distances by layer, a colour a population."""
  names = list(next(iter(consensus.values())).by_layer)
  y, height = np.arange(len(names)), 0.8 / len(consensus)
  for i, (name, found) in enumerate(consensus.items()):
    sizes = [found.by_layer[layer].relative for layer in names]
    total = (
      f"all: {found.total.relative:.3g}, squared {found.total.squared:.4g}"
    )
    axes.barh(
      y + (i - (len(consensus) - 1) / 2) * height,
      sizes,
      height,
      color=COLOURS[i % len(COLOURS)],
      label=f"{name}, {total}" if name else total,
    )
  axes.set(xlabel="RMS distance from the mean / RMS norm", yticks=y)
  axes.set_xlim(left=0)
  axes.set_yticklabels(names, fontsize=8)
  axes.set_title("consensus distance of the members", fontsize=10)
  axes.set_axisbelow(True)
  _rows(axes)
  _legend_below(axes)


def _rows(axes) -> None:
  """The first row on top, and few enough numbers below."""
  axes.margins(y=0.08)
  axes.invert_yaxis()
  axes.grid(axis="x", alpha=0.3)
  axes.locator_params(axis="x", nbins=5)
  axes.ticklabel_format(axis="x", scilimits=(-3, 4))


def _legend_below(axes) -> None:
  """Where it covers nothing."""
  place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
  axes.legend(frameon=False, fontsize=8, ncols=2, **place)


def _has_ends(along: Path) -> bool:
  return {0.0, 1.0} <= set(np.asarray(along.t).tolist())


def _from_zero(axes, losses: Sequence[np.ndarray]) -> None:
  """Losses are seen in proportion, unless one is below 0."""
  every = np.concatenate([np.ravel(x) for x in losses])
  every = every[np.isfinite(every)]
  if every.size and 0 <= every.min() < every.max():
    axes.set_ylim(0, 1.08 * every.max())
