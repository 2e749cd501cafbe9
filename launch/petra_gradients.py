r"""How good PETRA's gradients are, by stage, and its reconstructions, by depth.

  python launch/petra_gradients.py --config=configs/petra/fashion_mnist.py

Trains by PETRA, emulated on one CPU device (distrain_jax/pipelining/emulation.py),
for each k of --accumulate: linear warm-up in the first third of the ticks, then a
constant rate, the config's times k over its own k unless --learning_rates says
otherwise. In the other two thirds it compares micro-batches' gradients with
end-to-end back-propagation (distrain_jax/pipelining/quality.py), and reconstructed
inputs with true ones. Then, with the parameters of the first k, how exactly a
chain of couplings is inverted in several precisions. Prints tables; writes
petra_gradients.json, petra_gradients.png and petra_rounding.png.
"""

import itertools
import json
import math
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from distrain_jax import (
  data,
  gradients,
  models,
  pipelining,
  spmd,
  stages,
  train,
)
from distrain_jax.inspect import gradient_quality as drawn
from distrain_jax.method import Variables
from distrain_jax.pipelining import quality
from distrain_jax.pipelining.emulation import Emulation
from distrain_jax.train import experiment, pipelined, validate
from distrain_jax.train.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "configs/petra/NAME.py"
)
DEVICES = flags.DEFINE_integer(
  "devices", 10, "So many are simulated for config.mesh: the stages.", 1
)
STEPS = flags.DEFINE_integer("steps", 300, "Micro-batches of each run.", 1)
ACCUMULATE = flags.DEFINE_list("accumulate", ["1", "4", "16"], "k to compare.")
RATES = flags.DEFINE_list(
  "learning_rates", [], "One a k, or one for all; unset: in proportion to k."
)
PROBES = flags.DEFINE_integer("probes", 15, "Micro-batches measured a run.", 1)
DEPTHS = flags.DEFINE_list(
  "depths", ["1", "5", "8", "16", "32"], "Couplings in a chain."
)
OUT = flags.DEFINE_string("out", "results", "Folder of the files.")
flags.mark_flags_as_required(["config"])

GRID = 2.0**-12
FULL = {"dtype": "float32", "grid": None}
# Name -> (options of the model, dtype that streams are rounded to).
PRECISIONS = {
  "float32": (FULL, None),
  "float32, grid 2^-12": (FULL | {"grid": GRID}, None),
  "F in bfloat16": (FULL | {"dtype": "bfloat16"}, None),
  "F in bfloat16, grid 2^-12": ({"dtype": "bfloat16", "grid": GRID}, None),
  "streams in bfloat16": (FULL, "bfloat16"),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
Found = dict[str, Any]  # what petra_gradients.json holds of a run


class Problem(NamedTuple):
  """A config, and its network in stages."""

  config: ConfigDict
  experiment: train.Experiment
  info: data.Info
  model: Any
  cut: pipelining.Partition
  inputs: str  # their key in a batch
  pieces: int  # micro-batches in the config's batch


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  spmd.use_cpu_devices(DEVICES.value)
  try:
    depths = numbers("depths", DEPTHS.value, int)
    problem = read(CONFIG.value)
    rates = rates_by_k(problem)
    numbered = probed(len(problem.cut.stages))
  except (ValueError, ImportError, FileNotFoundError) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  runs, trained = {}, None
  for k, rate in rates.items():
    runs[k], model = measured(problem, k, rate, numbered)
    trained = model if trained is None else trained
  rounded = rounding(problem, trained, depths)
  keep(problem, runs, depths, rounded, Path(OUT.value))


def numbers(flag: str, given: list[str], kind: type) -> list[Any]:
  """A flag's list, all above 0."""
  try:
    found = [kind(x) for x in given]
  except ValueError:
    found = [0]
  if not found or any(not x > 0 for x in found):
    raise ValueError(
      f"--{flag}: numbers above 0, with commas; got {','.join(given)!r}."
    )
  return found


def read(c: ConfigDict) -> Problem:
  """The config, checked; nothing is compiled.

  Raises:
    ValueError: if its method is not petra as it is measured, or as
      `train.build`.
  """
  if c.method.name != "petra":
    raise ValueError(
      f"config.method.name={c.method.name!r}: only petra's gradients are "
      "measured. Take a file of configs/petra/, or --config.method.name=petra."
    )
  chosen = validate.chosen_method_options(c)
  others = {k: v for k, v in chosen.items() if k in ("buffer", "wire_dtype")}
  if others and others != {"buffer": "none"}:
    raise ValueError(
      f"config.method={others}: only buffer='none' without wire_dtype is "
      "measured. Leave both unset."
    )
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.evaluation.batch_size = (
      DEVICES.value
    )  # nothing is evaluated: one that fits
  built = train.build(c)
  info = data.describe(
    c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
  ).info
  made, example = experiment.program(c, info), experiment.example(info)
  shape = built.run.mesh.shape
  cut, told = pipelined.partition(c, made.model, made.task, example, shape)
  pieces = (c.method.accumulate or 1) * pipelined.replicas(shape)
  return Problem(c, built, info, made.model, cut, told["inputs"], pieces)


def rates_by_k(p: Problem) -> dict[int, float]:
  """{k: learning rate}."""
  ks = numbers("accumulate", ACCUMULATE.value, int)
  if not RATES.value:
    unit = p.config.optimizer.learning_rate / (p.config.method.accumulate or 1)
    return {k: unit * k for k in ks}
  rates = numbers("learning_rates", RATES.value, float)
  if len(rates) not in (1, len(ks)):
    raise ValueError(
      f"--learning_rates: one for all, or one for each of the {len(ks)} of "
      f"--accumulate; got {len(rates)}."
    )
  return dict(zip(ks, rates * (len(ks) if len(rates) == 1 else 1)))


def probed(count: int) -> list[int]:
  """Numbers of the micro-batches to measure; each takes 2 (J - 1) ticks."""
  first, last = STEPS.value // 3, STEPS.value - 1 - 2 * (count - 1)
  if last < first:
    raise ValueError(
      f"--steps={STEPS.value}: a micro-batch is in flight for {2 * count - 1} "
      f"ticks on {count} stages, and the first third is not measured. Take at "
      f"least --steps={3 * count}."
    )
  spread = np.linspace(first, last, min(PROBES.value, last - first + 1))
  return sorted({round(x) for x in spread})


def measured(p: Problem, k: int, rate: float, numbered: list[int]):
  """(Found of a run with that k, its model at the end)."""
  c = p.config.copy_and_resolve_references()
  with c.unlocked():
    c.optimizer.learning_rate, c.optimizer.schedule = rate, "constant"
    c.steps = max(1, STEPS.value // k)
    c.optimizer.warmup_steps = c.steps // 3
  shape = next(iter(experiment.example(p.info).values()))
  tx = pipelined.transforms(c, p.model, shape, p.cut)
  emulation = Emulation(
    p.cut.stages,
    tx,
    host(p.experiment.params()),
    p.experiment.key,
    accumulate=k,
    clip_norm=c.method.clip_norm,
  )
  probes, losses = [], []
  rows = itertools.islice(micro_batches(p), STEPS.value)
  for i, (x, targets) in enumerate(rows):
    loss, left = emulation.tick(x, targets, watch=i in numbered)
    if loss is not None:
      losses.append(loss)
    if left is not None and left.watched:
      probes.append(quality.probe(emulation, left))
    if (i + 1) % max(1, STEPS.value // 6) == 0 and losses:
      say(f"k = {k}: tick {i + 1}/{STEPS.value}: loss {float(losses[-1]):.4f}")
  tail = float(np.mean(losses[-max(1, len(losses) // 10) :]))
  if not math.isfinite(tail):
    sys.exit(f"k = {k}, rate {rate:g}: the loss is {tail}. Lower the rate.")
  found = {"learning_rate": rate, "probes": len(probes), "final_loss": tail}
  params, model_state = emulation.model()
  model = Variables(params, model_state) if model_state else params
  return found | quality.average(probes), model


def micro_batches(p: Problem) -> Iterator[tuple[Any, Any]]:
  """(inputs, targets) of all of them, cut as the config's method would."""
  import jax

  for batch in p.experiment.batches():
    cut = gradients.microbatches(batch, p.pieces)
    for i in range(p.pieces):
      one = jax.tree.map(lambda x, i=i: x[i], cut)
      yield stages.inputs_and_targets(one, p.inputs)


def host(tree):
  """Off the mesh: one device emulates all."""
  import jax

  return jax.tree.map(np.asarray, tree)


def rounding(p: Problem, model: Any, depths: list[int]) -> dict[str, Any]:
  """{precision: errors by depth}, for the first micro-batch."""
  inputs, _ = next(micro_batches(p))
  found = {}
  for name, (options, dtype) in PRECISIONS.items():
    say(f"rounding: {name} ...")
    c = p.config.copy_and_resolve_references()
    with c.unlocked():
      c.model.update(options)
    made = experiment.program(c, p.info)
    blocks = models.parts.blocks(made.model, made.task.measure)
    key = p.experiment.key
    found[name] = quality.rounding(
      blocks, model, inputs, key, depths, dtype=dtype
    )
  return found


def keep(p: Problem, runs, depths, rounded, folder: Path) -> None:
  """The three files; prints the tables."""
  names = [" ".join(b.name for b in stage) for stage in p.cut.stages]
  config = config_flags.get_config_filename(flags.FLAGS["config"])
  title = f"{config}, {len(names)} stages, {STEPS.value} micro-batches"
  tables = drawn.stage_table(names, runs), drawn.block_table(runs)
  print(title, *tables, drawn.rounding_table(depths, rounded), sep="\n\n")
  folder.mkdir(parents=True, exist_ok=True)
  kept = {
    "command": command(),
    "versions": {x: version(x) for x in PACKAGES}
    | {"python": platform.python_version()},
    "device": f"one of {DEVICES.value} simulated CPU devices",
    "config": json.loads(p.config.to_json_best_effort()),
    "stages": names,
    "steps": STEPS.value,
    "accumulate": runs,
    "rounding": {"depths": depths, **rounded},
  }
  files = [folder / f"petra_{x}" for x in ("gradients.json", "gradients.png")]
  files.append(folder / "petra_rounding.png")
  files[0].write_text(json.dumps(kept, indent=1) + "\n")
  drawn.draw_gradients(names, runs, files[1], title=title)
  drawn.draw_rounding(depths, rounded, files[2], title=config)
  print("\n" + "\n".join(f"wrote {file}" for file in files))


def command() -> str:
  """As given, but for where the files go."""
  given = [x for x in sys.argv[1:] if not x.startswith("--out")]
  return " ".join(["python launch/petra_gradients.py", *given])


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
