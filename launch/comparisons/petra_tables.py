"""Tables and picture of launch/compare_petra.py.

Rows are dicts as they are kept: see `comparisons.petra.measured`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain_jax.inspect.table import bytes_text
from launch.comparisons.sdp_claims import no_room as no_room

Found = dict[str, Any]

HEADERS = ("peak", "model", "messages", "FIFO", "batch", "temporaries")
HEADERS += ("on the wire", "exposed", "GFLOP a tick", "forwards")
PARTS = {
  "model": "tab:blue",
  "messages": "tab:orange",
  "FIFO": "tab:red",
  "batch": "tab:gray",
  "temporaries": "tab:green",
}


def groups(rows: Sequence[Found]) -> dict[tuple[str, str], list[Found]]:
  """By network and chip, each with its forward pass's FLOPs."""
  forward = {
    (x["network"], x["hardware"]): x["flops"] for x in rows if "flops" in x
  }
  found: dict[tuple[str, str], list[Found]] = {}
  for x in rows:
    if "flops" in x:
      continue
    place = x["network"], x["hardware"]
    x = {"forward": forward.get(place, 0.0), **x}
    if x["network"] == "chain":
      chip = x["hardware"].split(":")[0]
      x["label"] = f"{x['name']}, {x['hardware']}"
      found.setdefault(("chain", chip), []).append(x)
    else:
      x["label"] = x["name"]
      found.setdefault(place, []).append(x)
  return found


def markdown(rows: Sequence[Found]) -> str:
  """A row each, of one device; times are a model's, of one micro-batch."""
  lines = [("", *HEADERS), ("---", *["---:"] * len(HEADERS))]
  for x in rows:
    if "refused" in x:
      empty = [""] * (len(HEADERS) - 1)
      lines.append((x["label"], f"refused: {x['refused']}", *empty))
      continue
    cells = [bytes_text(x["peak"])]
    cells += [bytes_text(size) for size in x["parts"].values()]
    for field in ("communication_seconds", "exposed_seconds"):
      cells.append(f"{x[field] / x['micro'] * 1e3:.3f} ms")
    gflop, once = x["flops_a_tick"] / 1e9, x["forward"] / 1e9
    cells += [f"{gflop:.1f}", f"{gflop / once:.2f}" if once else ""]
    lines.append((x["label"], *cells))
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def padding(x: Found) -> str:
  """How much of what is allocated is of no use, over all stages."""
  stages = x["stages"]
  told = []
  for name, sizes in x["padding"].items():
    total = sum(sizes)
    told.append(f"{name} {bytes_text(total / stages)}")
  return (
    f"Padding, mean of a stage's: {', '.join(told)}. Heaviest stage over the "
    f"mean: {x['imbalance']:.3f}."
  )


def show(folder: Path, rows: Sequence[Found]) -> None:
  """Tables of all that is kept, and the picture."""
  found = groups(rows)
  for (network, where), mine in found.items():
    print(f"\n{network} on {where}:\n")
    print(markdown(mine))
    first = next((x for x in mine if "padding" in x), None)
    if first is not None:
      print(f"\n{padding(first)}")
  drawn = save(found, folder / "petra_compiled.png")
  print(f"\nwrote {folder}/petra_compiled.json{' and .png' if drawn else ''}")


def save(found: dict[tuple[str, str], list[Found]], path: Path) -> bool:
  """A panel a group, its rows' memory by part; False: nothing to draw."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  shown = {k: [x for x in v if "peak" in x] for k, v in found.items()}
  shown = {k: v for k, v in shown.items() if v}
  if not shown:
    return False
  heights = [1.5 + len(rows) for rows in shown.values()]
  size = (11, 1 + 0.4 * sum(heights))
  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)
  for axes, ((network, where), mine) in zip(panels.flat, shown.items()):
    _panel(axes, mine)
    axes.set_title(f"{network} on {where}", fontsize=10)
  handles, labels = panels.flat[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=5, frameon=False
  )
  figure.savefig(path, dpi=120)
  return True


def _panel(axes, rows: Sequence[Found]) -> None:
  names = [x["label"] for x in rows]
  left = [0.0] * len(rows)
  for part, colour in PARTS.items():
    # Below 0 where the compiler puts one part in another's place.
    width = [max(x["parts"][part], 0) / 2**30 for x in rows]
    axes.barh(names, width, left=left, color=colour, label=part)
    left = [a + b for a, b in zip(left, width)]
  for y, x in enumerate(rows):
    axes.annotate(
      bytes_text(x["peak"]),
      (left[y], y),
      (3, 0),
      textcoords="offset points",
      va="center",
      size=8,
    )
  axes.invert_yaxis()
  axes.set_xlim(0, 1.15 * max(left))
  axes.set_xlabel("peak memory of a device, GiB")
