r"""Every method on scikit-learn's digits: one table, one picture.

  ./launch/quickstart.sh             # in an environment of its own
  python launch/quickstart.py        # in yours

Eight workers on simulated CPU devices train a small MLP; as many stages of a
reversible one where the method takes a network in stages. The members of a
population start from different models (those of dart from one), and train for
twice as many steps. mulo is no method but a learned optimizer, in ddp, which
takes a third of them. Interrupted, it goes on where it was; finished methods are
not trained again.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict

from distrain_jax import inspect, methods, spmd, train
from distrain_jax.train import curves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs import digits, digits_mulo
from configs.petra import digits as petra_digits
from configs.wash import digits as wash_digits

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where runs go.")
STEPS = flags.DEFINE_integer("steps", None, "Of each run; unset: the config's.")
WORKERS = 8
AVERAGED = 120  # steps: whole rounds of all that exchange every so many

ROWS = (*methods.FACTORIES, "mulo")  # one a method, in their order
POPULATION_STEPS = 600
SETTINGS = {  # of config.method, for so short a run
  "wash": {"rate": 0.1},  # 60 shuffles of a weight of the first layer
  "sparta": {"rate": 0.1},
  "papa": {"alpha": 0.9},
  "dart": {"joint_steps": POPULATION_STEPS // 2, "every": 50},
}
HEADERS = (
  "method",
  "test accuracy",
  "test loss",
  "bytes a worker sends per step, on average",
  "bytes of state a worker holds",
)
NOTE = f"""\
Of {", ".join(methods.POPULATIONS)}: the members' average is evaluated.
Those of an ensemble share nothing, so that their average is of no use; their
mean prediction, which is, is not in this table."""


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  spmd.use_cpu_devices(WORKERS)
  folder = Path(WORKDIR.value)
  table, runs = [HEADERS], {}
  for method in ROWS:
    table.append(one(method, folder / method))
    runs[method] = train.read_metrics(folder / method)
  picture = folder / "quickstart.png"
  draw(table, runs, picture)
  print("\n" + format_table(table))
  print(f"\n{NOTE}")
  print(f"\ncurves: {picture}")


def one(method: str, folder: Path) -> tuple[str, ...]:
  """Trains one method and returns its row."""
  config = config_of(method)
  if STEPS.value is not None:
    config.steps = STEPS.value
  experiment = train.build(config)
  result = train.train(experiment, folder, label=method)
  run, x = experiment.run, experiment
  batch = run.put(next(x.batches()))
  state, steps = result.state, AVERAGED
  if method == "dart":  # its halves differ: of all steps, from the first on
    state, steps = run.init(x.key, x.params()), config.steps
  sent = inspect.bytes_sent(run, state, batch, x.key, steps=steps)
  return (
    method,
    f"{result.metrics['test_accuracy']:.4f}",
    f"{result.metrics['test_loss']:.4f}",
    f"{sum(sent.values()):,.0f}",
    f"{inspect.bytes_held(result.state):,}",
  )


def config_of(method: str) -> ConfigDict:
  """What a method trains, and how."""
  if method == "mulo":
    return digits_mulo.get_config()
  base = petra_digits if method in methods.PIPELINED else digits
  config = base.get_config()
  if method in methods.POPULATIONS:
    config = wash_digits.get_config()
    config.model = digits.get_config().model  # so that bytes compare
    config.steps = POPULATION_STEPS
    config.evaluation.members = False
    config.evaluation.every = config.checkpoint.every = 100
    config.population.same_init = method == "dart"  # its first half is joint
  config.method.name = method
  config.method.update(SETTINGS.get(method, {}))
  return config


def draw(table, runs, path: Path) -> None:
  """What was learned, and what it cost: curves above, bytes below."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9.6, 8), layout="constrained")
  FigureCanvasAgg(figure)
  above, below = figure.subplots(2, 2)
  for axes, metric in zip(above, ("loss", "validation_accuracy")):
    curves.panel(axes, runs, metric)
    axes.legend(frameon=False, fontsize=8, ncols=2)
  methods_shown = [row[0] for row in table[1:]]
  for axes, column in zip(below, (3, 4)):
    sizes = [float(row[column].replace(",", "")) / 1024 for row in table[1:]]
    bars = axes.barh(methods_shown, sizes, color=colours(len(sizes)))
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_title(f"{HEADERS[column]}, in KiB", fontsize=10, loc="left")
    axes.set_xlim(0, 1.15 * max(sizes))
    axes.invert_yaxis()
  figure.suptitle(f"scikit-learn's digits, a small MLP, {WORKERS} workers")
  figure.savefig(path, dpi=130)


def colours(count: int) -> list[str]:
  """The colours that Matplotlib gives to the first curves."""
  return [f"C{i}" for i in range(count)]


def format_table(rows) -> str:
  """Columns as wide as their widest cell; numbers to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  pad = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
  lines = ["  ".join(pad(i, cell) for i, cell in enumerate(r)) for r in rows]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


if __name__ == "__main__":
  app.run(main)
