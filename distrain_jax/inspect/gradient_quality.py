"""How good PETRA's gradients are, as tables for Markdown and as pictures.

`Runs` below is {k: what `pipelining.quality.average` returned}.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Runs = Mapping[int, Mapping[str, Any]]

# Okabe and Ito's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKS = "osD^vP"
ABOUT_GRADIENTS = """\
end-to-end: back-propagation with all parameters as they are at the stage's backward
pass. Bars: a standard error of the mean of the micro-batches measured."""
ABOUT_ROUNDING = """\
R reversible blocks forward and back, parameters fixed, rounded as the line says.
0: to the bit."""


def stage_table(names: Sequence[str], runs: Runs) -> str:
  """Cosines, and norm ratios, of PETRA's and of delayed gradients."""
  headers = ["cosine (norm ratio)"]
  for k in runs:
    headers += [f"PETRA, k = {k}", f"delayed, k = {k}"]
  rows = []
  for s, name in enumerate(names):
    cells = [f"{s}: {name}"]
    for x, kind in itertools.product(runs.values(), ("", "delayed_")):
      cosine = x[f"{kind}cosine"]["mean"][s]
      ratio = x[f"{kind}norm_ratio"]["mean"][s]
      cells.append(f"{_shown(cosine, '.3f')} ({_shown(ratio, '.2f')})")
    rows.append(cells)
  return _markdown(headers, rows)


def block_table(runs: Runs) -> str:
  """Mean errors of reconstructed inputs."""
  headers = ["error of the reconstructed input", *(f"k = {k}" for k in runs)]
  blocks = next(iter(runs.values()))["reconstruction"]
  rows = [
    [b, *(_shown(x["reconstruction"][b]["mean"], ".2e") for x in runs.values())]
    for b in blocks
  ]
  return _markdown(headers, rows)


def rounding_table(
  depths: Sequence[int], rounded: Mapping[str, Sequence[float]]
) -> str:
  headers = ["error of the inversion, R =", *map(str, depths)]
  rows = [[k, *(_shown(e, ".1e") for e in x)] for k, x in rounded.items()]
  return _markdown(headers, rows)


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
  lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(x: float | None, form: str) -> str:
  """None: not defined in any of what was measured."""
  if x is None:
    return "–"
  return format(x, form) if x else "0"


def draw_gradients(
  names: Sequence[str], runs: Runs, path: str | Path, *, title: str = ""
) -> None:
  """Writes a PNG: cosines by stage, and reconstruction errors by block.

  Args:
    names: of the stages.
    runs: of each k.
    path: of the PNG.
    title: above all.
  """
  blocks = list(next(iter(runs.values()))["reconstruction"])
  shares = [len(names) + 3, len(blocks) + 3]
  width = max(0.55 * sum(shares) + 3, 10)
  made = _figure((width, 6), title, ABOUT_GRADIENTS)
  axes = made.subplots(1, 2, width_ratios=shares)
  styles = zip(runs.items(), _styles())
  for i, ((k, x), style) in enumerate(styles):
    aside = 0.1 * (i - (len(runs) - 1) / 2)  # or bars would hide bars
    _with_bars(axes[0], x["cosine"], aside, style, label=f"PETRA, k = {k}")
    means = np.array(x["delayed_cosine"]["mean"], float)
    label = f"delayed, k = {k}"
    at = np.arange(len(names)) + aside
    axes[0].plot(at, means, "--", mfc="white", label=label, **style)
    errors = x["reconstruction"].values()
    errors = {w: [e[w] for e in errors] for w in ("mean", "std", "count")}
    _with_bars(axes[1], errors, aside, style, ls="", label=f"k = {k}")
  axes[0].set(
    title="Direction: cosine with the end-to-end gradient",
    xlabel="stage",
    ylabel="cosine",
  )
  axes[0].set_ylim(top=1.02)
  axes[1].set(
    title="Weight drift: error of reconstructed inputs",
    xlabel="reversible block",
    ylabel="|x' − x| / |x|",
  )
  axes[1].set_ylim(bottom=0)
  axes[1].margins(x=0.15)
  turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
  for one, labels in zip(axes, (names, blocks)):
    one.set_xticks(range(len(labels)), labels, **turned)
    one.grid(alpha=0.3)
    one.legend(frameon=False, fontsize=9)
  made.savefig(path, dpi=130)


def _with_bars(axes, found, aside: float, style, **more) -> None:
  """Means and their standard errors; what is None has no point."""
  means, stds = (np.array(found[what], float) for what in ("mean", "std"))
  bars = stds / np.sqrt(np.maximum(found["count"], 1))
  at = np.arange(len(means)) + aside
  axes.errorbar(at, means, bars, elinewidth=0.8, capsize=2, **style, **more)


def draw_rounding(
  depths: Sequence[int],
  rounded: Mapping[str, Sequence[float]],
  path: str | Path,
  *,
  title: str = "",
) -> None:
  """Writes a PNG: errors of the inversion by depth, a line a precision.

  Args:
    depths: numbers of blocks, R.
    rounded: {precision: an error for each}.
    path: of the PNG.
    title: above all.
  """
  made = _figure((8.5, 5.5), title, ABOUT_ROUNDING)
  axes = made.subplots()
  errors = np.array(list(rounded.values()), float)
  exact = errors[errors > 0].min(initial=1.0) / 10  # where zeros are drawn
  for i, (name, y, style) in enumerate(zip(rounded, errors, _styles())):
    # Lines at zero would hide each other.
    zero = exact * 0.6**i
    axes.plot(depths, np.where(y > 0, y, zero), label=name, **style)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xticks(depths, [str(d) for d in depths])
  if (errors == 0).any():
    most = np.ceil(np.log10(errors.max(initial=exact)))
    ticks = 10.0 ** np.arange(np.ceil(np.log10(exact)) + 1, most + 1)
    axes.set_yticks(
      [exact * 0.6, *ticks], ["0", *(f"1e{np.log10(t):.0f}" for t in ticks)]
    )
    axes.axhline(exact * 2, color="#999999", lw=0.8)
  axes.minorticks_off()
  axes.set(xlabel="R, reversible blocks", ylabel="|x' − x| / |x|")
  axes.grid(alpha=0.3)
  axes.legend(frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
  made.savefig(path, dpi=130)


def _figure(size: tuple[float, float], title: str, note: str) -> Any:
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  made = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(made)
  made.suptitle(title)
  made.supxlabel(note, fontsize=9)
  return made


def _styles() -> Iterator[dict[str, Any]]:
  pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKS))
  return ({"color": c, "marker": m, "ms": 5} for c, m in pairs)
