r"""Who holds what in SDP, what it costs, and how its gradients are aligned.

  python launch/subnetworks.py --config=configs/text.py \
    --config.method.name=sdp --config.method.coverage=0.5 --steps=100 \
    --config.model.heads=8 --config.model.kv_heads=8

Prints what each worker holds by the config's own options and the operations of
its loss and gradient. Then trains with them, and measures before and after how
the subnetworks' gradients agree with the whole model's, for units and blocks,
both maskings and several coverages, on rows that were not trained on (unless
that was an epoch). Simulated CPU devices train; one of them measures. Writes
sdp_alignment.json and sdp_alignment.png. --steps=0 measures at the start only.
What was trained with is aligned best: compare levels after training with each,
as results/sdp_alignment.json (blocks) and results/sdp_alignment_neuron.json do.
"""

import functools
import itertools
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from distrain_jax import data, methods, spmd, train
from distrain_jax.inspect import subnetworks
from distrain_jax.method import stateful
from distrain_jax.methods.sdp import Load, alignment, alone, load
from distrain_jax.train import config as configs
from distrain_jax.train import experiment, validate
from distrain_jax.train.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
WORKERS = flags.DEFINE_integer(
  "workers", 8, "As many CPU devices are simulated.", 1
)
STEPS = flags.DEFINE_integer(
  "steps", None, "Of the training; unset: config.steps.", 0
)
BATCHES = flags.DEFINE_integer("batches", 4, "Global ones, to measure on.", 1)
COVERAGES = flags.DEFINE_list(
  "coverages", ["0.75", "0.5", "0.25"], "To be measured."
)
OUT = flags.DEFINE_string("out", "results", "Folder of the files.")
flags.mark_flags_as_required(["config"])

LEVELS, MASKINGS = ("neuron", "block"), ("forward", "backward")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
MEASURED = ("assignment", "seed", "redraw_every", "shared", "rescale")
HOLDING = ("coverage", "level", "assignment", "seed", "shared")
Found = dict[str, Any]  # what sdp_alignment.json holds


class Problem(NamedTuple):
  """A config, and the structure of its model."""

  config: ConfigDict
  experiment: train.Experiment
  loss_fn: Any
  structure: dict[str, Any]  # names, shapes, writers, blocks
  options: dict[str, Any]  # of the config's method that are set


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  spmd.use_cpu_devices(WORKERS.value)
  try:
    coverages = [float(x) for x in COVERAGES.value]
    problem = read(CONFIG.value)
    held, dense = report(problem)
  except (ValueError, ImportError, FileNotFoundError) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  print(held)
  print(
    f"Loss and gradient on a worker's rows: {dense:.4g} FLOPs in the whole "
    f"model, {held.flops.mean() / dense:.1%} of that in a subnetwork.\n"
  )
  points = {"start": host(problem.experiment.params())}
  steps = problem.config.steps if STEPS.value is None else STEPS.value
  if steps:
    points[f"after {steps} steps"] = trained(problem, steps)
  rows = unseen(problem, steps)
  found, refused = measure(problem, points, rows, coverages)
  for text in dict.fromkeys(refused.values()):
    print(f"Not measured: {text}")
  if not found:
    sys.exit("No variant can be measured.")
  keep(problem, Path(OUT.value), held, dense, found, refused, rows)


def read(c: ConfigDict) -> Problem:
  """The config, checked; nothing is compiled.

  Raises:
    ValueError: if its method is not sdp, or as `train.build`.
  """
  if c.method.name != "sdp":
    raise ValueError(
      f"config.method.name={c.method.name!r} has no subnetworks. Add "
      "--config.method.name=sdp."
    )
  if c.method.rescale == "test":
    # It trains as without, and what is measured is the model as trained.
    c = c.copy_and_resolve_references()
    c.method.rescale = None
  built = train.build(c)
  told = data.describe(
    c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
  )
  made = experiment.program(c, told.info)
  inputs = next(iter(experiment.example(told.info).values()))
  structure = {
    k: of_model(made.model, inputs)
    for k, of_model in experiment.STRUCTURE.items()
    if configs.takes(methods.FACTORIES[c.method.name], k)
  }
  loss_fn = made.task.loss_fn
  if made.task.stateful:
    loss_fn = stateful(loss_fn, stats=c.stats)
  options = validate.chosen_method_options(c)
  return Problem(c, built, loss_fn, structure, options)


def pick(options: dict[str, Any], *names: str) -> dict[str, Any]:
  return {k: options[k] for k in names if k in options}


def report(p: Problem) -> tuple[Load, float]:
  """The load with FLOPs, and those of the whole model on a worker's rows."""
  workers = p.experiment.run.workers
  structure = pick(p.structure, "names", "shapes", "blocks")
  chosen = pick(p.options, *HOLDING, "param_dtype")
  held = load(**structure, workers=workers, **chosen)
  chosen = pick(p.options, *HOLDING, "masking", "rescale", "redraw_every")
  each = alone(p.loss_fn, workers=workers, **p.structure, **chosen)
  say("counting operations ...")
  rows = next(p.experiment.batches())
  counts, dense = subnetworks.flops(each, rows, p.experiment.key)
  return held._replace(flops=counts), dense


def trained(p: Problem, steps: int) -> Any:
  """The whole model after so many of the config's steps."""
  run, key, batches = p.experiment.run, p.experiment.key, p.experiment.batches()
  state = run.init(key, p.experiment.params())
  for i in range(steps):
    state, metrics = run.step(state, run.put(next(batches)), key)
    if (i + 1) % max(1, steps // 10) == 0:
      say(f"step {i + 1}/{steps}: loss {float(metrics['loss']):.4f}")
  if not np.isfinite(float(metrics["loss"])):
    sys.exit(f"The loss after {steps} steps is {float(metrics['loss'])}.")
  return host(run.params(state))


def host(tree):
  """Off the mesh: what is measured runs once, not on every device."""
  import jax

  return jax.tree.map(np.asarray, tree)


def unseen(p: Problem, steps: int) -> Any:
  """The batches that would come after the training, as one."""
  import jax

  some = itertools.islice(p.experiment.batches(), steps, steps + BATCHES.value)
  return jax.tree.map(lambda *x: np.concatenate(x), *some)


def measure(p: Problem, points, rows, coverages: list[float]):
  """{point: {variant: {coverage: numbers}}}, and what is refused, and why."""
  import jax

  chosen = pick(p.options, *MEASURED)
  workers, found = p.experiment.run.workers, {}
  refused: dict[str, str] = {}
  for level, masking, c in itertools.product(LEVELS, MASKINGS, coverages):
    how = {**chosen, "level": level, "masking": masking, "coverage": c}
    if masking == "backward":
      how.pop("rescale", None)
    variant = f"{level} {masking}"
    say(f"measuring {variant}, coverage {c:g} ...")
    fn = functools.partial(
      alignment, p.loss_fn, workers=workers, **p.structure, **how
    )
    run = jax.jit(fn)
    for point, params in points.items():
      try:
        numbers = host(run(params, rows, p.experiment.key))
      except ValueError as e:
        refused[f"{variant}, {c:g}"] = str(e)
        break
      as_text = {k: np.round(x.astype(float), 6) for k, x in numbers.items()}
      of_point = found.setdefault(point, {}).setdefault(variant, {})
      of_point[f"{c:g}"] = {k: x.tolist() for k, x in as_text.items()}
  return found, refused


def keep(p: Problem, folder: Path, held: Load, dense, found, refused, rows):
  """sdp_alignment.json and sdp_alignment.png; prints the means."""
  folder.mkdir(parents=True, exist_ok=True)
  count, workers = len(next(iter(rows.values()))), p.experiment.run.workers
  as_json = {
    k: x.tolist() if isinstance(x, np.ndarray) else x
    for k, x in held._asdict().items()
  }
  as_json["units"] = {k: x.tolist() for k, x in held.units.items()}
  kept = {
    "command": command(),
    "versions": {x: version(x) for x in PACKAGES}
    | {"python": platform.python_version()},
    "devices": f"{WORKERS.value} simulated CPU devices",
    "config": json.loads(p.config.to_json_best_effort()),
    "workers": workers,
    "rows": count,
    "load": {**as_json, "flops_of_whole_model": dense},
    "alignment": found,
    "refused": refused,
  }
  file = folder / "sdp_alignment.json"
  file.write_text(json.dumps(kept, indent=1) + "\n")
  for point, variants in found.items():
    for variant, by_coverage in variants.items():
      for coverage, x in by_coverage.items():
        print(
          f"{point}: {variant}, {coverage}: cosine {np.mean(x['cosine']):.4f}, "
          f"of what is sampled {np.mean(x['cosine_sampled']):.4f}, norms "
          f"{np.mean(x['norm_ratio']):.3f}; of the mean over holders "
          f"{x['cosine_to_mean']:.4f}"
        )
  config = config_flags.get_config_filename(flags.FLAGS["config"])
  own = ", ".join(f"{k}={v}" for k, v in p.options.items())
  title = f"{config}, {workers} workers, {count} rows; trained with {own}"
  subnetworks.draw(found, folder / "sdp_alignment.png", title=title)
  print(f"wrote {file}\nwrote {folder / 'sdp_alignment.png'}")


def command() -> str:
  """As given, but for where the files go."""
  given = [x for x in sys.argv[1:] if not x.startswith("--out")]
  return " ".join(["python launch/subnetworks.py", *given])


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
