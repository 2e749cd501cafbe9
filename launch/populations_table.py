"""What the tables of populations have in common: scores, claim, picture."""

import statistics

SCORES = {
  "test_members_accuracy": "members, test accuracy, %",
  "test_ensemble_accuracy": "ensemble",
  "test_accuracy": "average",
  "test_greedy_accuracy": "greedy soup",
  "test_distance": "relative distance",
}
METRIC = "test_accuracy"
UNIT = "nats an image"
INDEPENDENT = "independent"
SHOWN = {
  "test_members_accuracy": ("members (mean)", "o"),
  "test_ensemble_accuracy": ("ensemble", "s"),
  "test_accuracy": ("average", "D"),
  "test_greedy_accuracy": ("greedy soup", "^"),
}


def mean(rows, row: str, score: str) -> float:
  return 100 * statistics.fmean(rows[row][score])


def average_near_ensemble(row: str, points: float):
  """A claim: the average of `row` against the ensemble of independent ones."""

  def claim(rows) -> str:
    promised = (
      f"the average of {row} is to be at most {points} points below the "
      f"ensemble of {INDEPENDENT} members"
    )
    if row not in rows or INDEPENDENT not in rows:
      return f"{promised}: not measured."
    mine = mean(rows, row, "test_accuracy")
    theirs = mean(rows, INDEPENDENT, "test_ensemble_accuracy")
    holds = "holds" if mine >= theirs - points else "DOES NOT HOLD"
    return f"{promised}: {holds}, {mine:.2f} % against {theirs:.2f} %."

  return claim


def draw(found, path) -> None:
  """Every row's scores, every seed a mark; distances beside them."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = found["rows"]
  figure = Figure(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
  for i, x in enumerate(rows.values()):
    for shift, (score, (label, marker)) in enumerate(SHOWN.items()):
      values = [100 * value for value in x.get(score, ())]
      at = [i + 0.16 * (shift - 1.5)] * len(values)
      label = label if i == min(1, len(rows) - 1) else None
      left.plot(values, at, marker, color=f"C{shift}", ms=5, label=label)
    apart = x.get("test_distance", ())
    right.plot(apart, [i] * len(apart), "ko", ms=4)
  left.set(
    yticks=range(len(rows)), yticklabels=list(rows), xlabel="test accuracy, %"
  )
  right.set(xlabel="distance from the average,\nrelative to the norm")
  left.legend(frameon=False, fontsize=8)
  left.invert_yaxis()
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.suptitle(f"{found['title']}; seeds: {found['seeds']}")
  figure.savefig(path, dpi=130)
