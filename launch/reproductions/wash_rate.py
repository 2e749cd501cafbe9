"""Accuracy against the rate: WASH from an ensemble to a shuffle of everything.

scikit-learn's digits, four MLPs of 42,634 parameters from different initial
models; the decreasing schedule of the paper.
"""

from configs.wash import digits
from launch import populations_table as shared

TITLE = "Digits, an MLP, populations of 4"
METRIC, UNIT, SCORES = shared.METRIC, shared.UNIT, shared.SCORES
CLAIM = shared.average_near_ensemble("wash, rate 0.03", 1.0)
DEVICES = 4
FOLLOWS = ()
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ROWS = {
  shared.INDEPENDENT: {"name": "ensemble"},
  **{f"wash, rate {rate:g}": {"name": "wash", "rate": rate} for rate in RATES},
}


def against(row: str) -> str:
  """The row that it is compared with."""
  del row
  return shared.INDEPENDENT


def config(row: str):
  """One row's config, but for the seed."""
  c = digits.get_config()
  c.evaluation.every = 0
  c.checkpoint.every = 0
  c.method.update(ROWS[row])
  return c


def draw(found, path) -> None:
  """Scores against the rate, mean and range of the seeds."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = found["rows"]
  rates = [ROWS[row].get("rate", RATES[0] / 3) for row in rows]
  figure = Figure(figsize=(14, 4.2), layout="constrained")
  FigureCanvasAgg(figure)
  left, middle, right = figure.subplots(1, 3)
  for i, (score, (label, marker)) in enumerate(shared.SHOWN.items()):
    seeds = [[100 * v for v in x[score]] for x in rows.values()]
    means = [sum(values) / len(values) for values in seeds]
    low, high = list(map(min, seeds)), list(map(max, seeds))
    for axes in (left, middle):
      axes.plot(rates, means, f"{marker}-", color=f"C{i}", label=label, ms=4)
      axes.fill_between(rates, low, high, color=f"C{i}", alpha=0.15)
  apart = [x["test_distance"] for x in rows.values()]
  right.plot(rates, [sum(x) / len(x) for x in apart], "ko-", ms=4)
  for axes in (left, middle, right):
    axes.set(xscale="log", xlabel="rate (leftmost: 0, an ensemble)")
    axes.grid(alpha=0.3)
  left.set(title="test accuracy, %", ylim=(0, 100))
  middle.set(title="the same from 85 % on", ylim=(85, 100))
  right.set(
    title="distance from the average, relative to the norm", ylim=(0, 1)
  )
  left.legend(frameon=False, fontsize=8, loc="lower right")
  figure.suptitle(f"{found['title']}; seeds: {found['seeds']}")
  figure.savefig(path, dpi=130)
