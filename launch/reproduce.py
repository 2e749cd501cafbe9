r"""A method's small table again: several seeds, its baselines, equal budgets.

  python launch/reproduce.py acco
  python launch/reproduce.py acco --seeds=1 --row=acco --row=dpu --out=runs

Eight simulated devices, or as many as the table says, train every row of
launch/reproductions/METHOD.py with every seed. Interrupted, the same command goes on; runs that have finished are
not trained again. Writes results/METHOD.json and METHOD.png, and prints a table
for README.
"""

import importlib
import json
import math
import platform
import statistics
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from distrain_jax import inspect, spmd, train
from distrain_jax.train.config import default_config, suggest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Where runs go.")
OUT = flags.DEFINE_string("out", "results", "Where METHOD.json and .png go.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each row, from seed 0.", 1)
STEPS = flags.DEFINE_integer("steps", None, "Of each run; unset: the table's.")
ROWS = flags.DEFINE_multi_string("row", None, "One of them; unset: all.")
WORKERS = 8
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
PROGRAMS = ("run", "evaluate", "evaluate_members")  # of an experiment
LEGEND = 16  # rows that a legend has room for
SMOOTH = 0.05  # of a curve's length: how far the training loss is averaged

Found = dict[str, Any]  # what METHOD.json holds
Lines = list[dict[str, Any]]  # of one run's metrics.jsonl


def main(argv) -> None:
  logging.set_verbosity(logging.WARNING)
  method = asked(argv[1:])
  table = importlib.import_module(f"launch.reproductions.{method}")
  rows = chosen(table)
  spmd.use_cpu_devices(devices(table))
  runs: dict[str, list[Lines]] = {row: [] for row in rows}
  built: dict[str, train.Experiment] = {}
  try:
    for seed in range(SEEDS.value):  # after one seed all rows have a number
      for row in rows:
        folder = Path(WORKDIR.value) / method / slug(row) / f"seed_{seed}"
        runs[row].append(one(table, row, seed, folder, built))
  except train.Interrupted:
    sys.exit(train.EXIT_CODE)
  except (ValueError, FileNotFoundError, train.BadStep) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  found = collect(table, runs)
  if hasattr(table, "SCORES"):
    for row, x in found["rows"].items():
      x["sent"] = sent(table, row)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  (out / f"{method}.json").write_text(json.dumps(found, indent=1) + "\n")
  if hasattr(table, "draw"):
    table.draw(found, out / f"{method}.png")
  else:
    draw(table, found, runs, out / f"{method}.png")
  print(f"\n{markdown(table, found)}\n\n{found['claim']}")
  print(f"wrote {out / method}.json and {out / method}.png")


def asked(arguments: list[str]) -> str:
  """The method that the command names."""
  here = Path(__file__).resolve().parent / "reproductions"
  known = sorted(path.stem for path in here.glob("*.py"))
  if len(arguments) != 1 or arguments[0] not in known:
    given = " ".join(arguments)
    sys.exit(
      f"reproduce.py METHOD: got {given or 'no method'}. {suggest(given, known)}"
    )
  return arguments[0]


def chosen(table: ModuleType) -> list[str]:
  """Rows to train, in the table's order; with each, what it is against."""
  wanted = ROWS.value or list(table.ROWS)
  for row in wanted:
    if row not in table.ROWS:
      sys.exit(f"--row={row}: {suggest(row, table.ROWS)}")
  needed = {*wanted, *map(table.against, wanted)}
  needed.update(map(table.against, list(needed)))
  return [row for row in table.ROWS if row in needed]


def devices(table: ModuleType) -> int:
  """How many are simulated."""
  return getattr(table, "DEVICES", WORKERS)


def slug(row: str) -> str:
  return row.replace(",", "").replace(" ", "_").replace("/", "_")


def one(
  table: ModuleType,
  row: str,
  seed: int,
  folder: Path,
  built: dict[str, train.Experiment],
) -> Lines:
  """Trains a row with a seed, unless that is done; returns its metrics."""
  c = config(table, row, seed)
  check_same(c, folder)
  lines = train.read_metrics(folder)
  if not any("test_loss" in x and x["step"] == c.steps for x in lines):
    experiment = train.build(c, used(c))
    if row in built:  # the same programs: a seed changes only values
      programs = {f: getattr(built[row], f) for f in PROGRAMS}
      experiment = experiment._replace(**programs)
    built[row] = experiment
    train.train(experiment, folder, label=f"{row}, seed {seed}")
    lines = train.read_metrics(folder)
  return lines


def config(table: ModuleType, row: str, seed: int) -> ConfigDict:
  c = table.config(row)
  c.seed = seed
  if STEPS.value is not None:
    c.steps = STEPS.value
  return c


def sent(table: ModuleType, row: str) -> float:
  """Bytes that a worker sends a step, on average over the run of seed 0."""
  c = config(table, row, 0)
  x = train.build(c, used(c))
  if x.run.mesh.size == 1:
    return 0.0
  state, batch = x.run.init(x.key, x.params()), x.run.put(next(x.batches()))
  found = inspect.bytes_sent(x.run, state, batch, x.key, steps=c.steps)
  return sum(found.values())


def used(c: ConfigDict) -> list[Any] | None:
  """Devices of a row that takes fewer than there are; None: all."""
  import jax

  sizes = [size for _, size in c.mesh.items()]
  return None if -1 in sizes else jax.devices()[: math.prod(sizes)]


def check_same(c: ConfigDict, folder: Path) -> None:
  """Refuses to take another config's run for this one's.

  Raises:
    ValueError: if the folder has such a run.
  """
  file = folder / "config.json"
  if not file.exists():
    return
  read = lambda c: json.loads(c.to_json_best_effort())
  old, new = json.loads(file.read_text()), read(c)
  usual = read(default_config())
  names = {*old, *new}
  different = [k for k in names if not is_same(k, old, new, usual)]
  if different:
    raise ValueError(
      f"{folder} holds a run with another {', '.join(sorted(different))}. "
      "Choose another --workdir, or delete that folder."
    )


def is_same(name: str, old: Any, new: Any, usual: Any) -> bool:
  """Of a field; one younger than the run was at its default, one that is gone
  does not matter if it was not set."""
  usual = usual if isinstance(usual, dict) else {}
  if name not in old:
    return new[name] == usual.get(name)
  if name not in new:
    return old[name] is None
  old, new = old[name], new[name]
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return old == new
  return all(is_same(k, old, new, usual.get(name)) for k in {*old, *new})


def collect(table: ModuleType, runs: Mapping[str, list[Lines]]) -> Found:
  """Every row's numbers, one a seed, and whether the claim holds."""

  def last(lines: Lines, metric: str) -> float:
    return next(x[metric] for x in reversed(lines) if metric in x)

  metric, rows = table.METRIC, {}
  for row, seeds in runs.items():
    against = table.against(row)
    values = [last(lines, metric) for lines in seeds]
    base = [last(lines, metric) for lines in runs[against]]
    scores = {
      name: [last(lines, name) for lines in seeds]
      for name in getattr(table, "SCORES", {})
      if all(any(name in x for x in lines) for lines in seeds)
    }
    rows[row] = {
      "method": table.ROWS[row],
      metric: values,
      "test_loss": [last(lines, "test_loss") for lines in seeds],
      **scores,
      "against": against,
      # Seeds are paired: initial parameters and the order of data are equal.
      "percent_above": [100 * (v / b - 1) for v, b in zip(values, base)],
    }
  first = next(iter(runs.values()))[0]
  return {
    "command": " ".join(["python launch/reproduce.py", *sys.argv[1:]]),
    "versions": {p: version(p) for p in PACKAGES}
    | {"python": platform.python_version()},
    "devices": f"{devices(table)} simulated CPU devices",
    "title": table.TITLE,
    "steps": first[-1]["step"],
    "seeds": SEEDS.value,
    "claim": claim(table, rows),
    "rows": rows,
  }


def claim(table: ModuleType, rows: Found) -> str:
  """What the method is to do, and whether it does."""
  if callable(table.CLAIM):
    return table.CLAIM(rows)
  row, limit = table.CLAIM
  promised = f"{row} is to be at most {limit} % above {table.against(row)}"
  if row not in rows:
    return f"{promised}: not measured."
  above = statistics.fmean(rows[row]["percent_above"])
  holds = "holds" if above <= limit else "DOES NOT HOLD"
  return f"{promised}: {holds}, {above:+.2f} %."


def spread(values: list[float], form: str) -> str:
  """Mean, and the least and the most where there are several."""
  mean = format(statistics.fmean(values), form)
  if len(values) == 1:
    return mean
  return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def markdown(table: ModuleType, found: Found) -> str:
  """The table for README."""
  if hasattr(table, "SCORES"):
    return scores_markdown(table, found)
  headers = (
    "method",
    f"{table.METRIC.replace('_', ' ')}, {table.UNIT}",
    "above its baseline, %",
    f"test loss, {table.UNIT}",
  )
  lines = [headers, ("---", *["---:"] * 3)]
  for row, x in found["rows"].items():
    lines.append(
      (
        row,
        spread(x[table.METRIC], ".4f"),
        "" if x["against"] == row else spread(x["percent_above"], "+.2f"),
        spread(x["test_loss"], ".4f"),
      )
    )
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def scores_markdown(table: ModuleType, found: Found) -> str:
  """Of a table that says which scores are its columns, in per cent."""
  headers = ("method", *table.SCORES.values(), "bytes sent a step")
  lines = [headers, ("---", *["---:"] * (len(headers) - 1))]
  for row, x in found["rows"].items():
    cells = []
    for name in table.SCORES:
      factor = 100 if name.endswith("accuracy") else 1
      values = [factor * value for value in x.get(name, ())]
      form = ".2f" if name != "test_greedy_size" else ".1f"
      cells.append(spread(values, form) if values else "")
    lines.append((row, *cells, f"{x['sent']:,.0f}"))
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(
  table: ModuleType, found: Found, runs: Mapping[str, list[Lines]], path: Path
) -> None:
  """Left: a curve a row. Right: every seed (dots) against the baseline."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 5), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  for i, (row, seeds) in enumerate(runs.items()):
    x, y = smooth_loss(seeds)
    style = ("-", "--", ":")[i // 10 % 3]
    left.plot(x, y, style, color=f"C{i}", label=row, lw=1.3)
  left.set(xlabel="update", title=f"training loss, {table.UNIT}")
  left.set_ylim(top=settled(runs.values()))
  left.grid(alpha=0.3)
  if len(runs) <= LEGEND:  # else the names on the right have the colours
    left.legend(frameon=False, fontsize=7, labelspacing=0.2)
  for i, x in enumerate(found["rows"].values()):
    above = x["percent_above"]
    mean = statistics.fmean(above)
    right.barh(i, mean, color=f"C{i}", alpha=0.35)
    right.plot(above, [i] * len(above), "o", color=f"C{i}", ms=4)
  right.axvline(0, color="black", lw=0.8)
  right.set(
    title=f"{table.METRIC.replace('_', ' ')} above the baseline's, %",
    yticks=range(len(found["rows"])),
    yticklabels=list(found["rows"]),
  )
  right.grid(alpha=0.3, axis="x")
  right.invert_yaxis()
  figure.suptitle(f"{found['title']}; seeds: {found['seeds']}")
  figure.savefig(path, dpi=130)


def settled(runs) -> float:
  """A training loss that all are below once the first eighth is over."""
  losses = [smooth_loss(seeds)[1] for seeds in runs]
  return max(y[len(y) // 8] for y in losses)


def smooth_loss(seeds: list[Lines]) -> tuple[list[int], list[float]]:
  """The seeds' mean training loss, averaged over the last few lines."""
  steps = [x["step"] for x in seeds[0] if "loss" in x]
  losses = [[x["loss"] for x in lines if "loss" in x] for lines in seeds]
  means = [statistics.fmean(values) for values in zip(*losses)]
  width = max(1, round(SMOOTH * len(means)))
  smooth = [
    statistics.fmean(means[max(0, i + 1 - width) : i + 1])
    for i in range(len(means))
  ]
  return steps, smooth


if __name__ == "__main__":
  app.run(main)
