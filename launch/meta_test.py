r"""Tests a learned optimizer on tasks that it was not meta-trained on.

  python launch/meta_test.py                             # the shipped weights
  python launch/meta_test.py --theta=runs/mulo/theta.safetensors --seeds=1 \
    --out=runs/mulo

Wider, deeper and longer than in meta-training, other data, a conv net and a
transformer; against AdamW and muP's AdamW, with a default rate and with the
best of several for each task by itself, and SGD likewise. The learned one is
tuned nowhere. Beside it a learned optimizer that was made without muP (lo_sp).
Writes results/mulo.json after every task and goes on from there, and mulo.png;
prints a table. What was made with other weights, steps, seeds or another JAX is
left alone: give another folder with --out.
"""

import functools
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

THETA = flags.DEFINE_string("theta", None, "A file; unset: the shipped one.")
TWIN = flags.DEFINE_string(
  "twin", None, "A file made without muP; unset: the shipped one."
)
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each, from seed 0.", 1)
STEPS = flags.DEFINE_integer("steps", 500, "Of a trajectory.", 1)
OUT = flags.DEFINE_string("out", "results", "Where mulo.json and .png go.")
TASKS = flags.DEFINE_multi_string("task", None, "Only these; unset: all.")

RATES = {
  "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
  "mup_adamw": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
  "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
}
DEFAULT = {"adamw": 1e-3, "mup_adamw": 1e-1, "sgd": 1e-1}
WIDTHS = (16, 32, 64, 128, 256, 512)  # of the picture
SEEN = (16, 64)  # in meta-training, on the same data


class Case(NamedTuple):
  """A task, in both parametrisations."""

  make: Callable[[bool], Any]  # (mup) -> Task
  steps: int
  seen: str  # how it differs from what was meta-trained on


@functools.cache
def resident(name: str, pool: int):
  """As the meta-training's."""
  from launch import meta_train

  return meta_train.resident(name, pool)


def mlp(data: str, pool: int, widths: tuple[int, ...]):
  """(mup) -> an MLP's task."""
  from distrain_jax.learned import meta

  return lambda mup: meta.mlp_task(resident(data, pool), widths, mup=mup)


def text(embed: int):
  """(mup) -> a transformer on the standard library's sources, by bytes."""
  import pathlib

  import numpy as np

  from distrain_jax.learned import meta

  folder = pathlib.Path(json.__file__).parent
  raw = b"".join(p.read_bytes() for p in sorted(folder.glob("*.py")))
  tokens = np.frombuffer(raw, np.uint8)
  return lambda mup: meta.text_task(tokens, embed, mup=mup)


def conv(width: int):
  """(mup) -> a conv net's task on Fashion-MNIST at 14 x 14."""
  from distrain_jax.learned import meta

  data = lambda: resident("fashion_mnist", 2)
  return lambda mup: meta.conv_task(data(), width, mup=mup)


def cases(steps: int) -> dict[str, Case]:
  """Name -> case."""
  found = {
    f"MLP, {w} wide": Case(
      mlp("fashion_mnist", 4, (w,) * 3), steps, "" if w in SEEN else "width"
    )
    for w in WIDTHS
  }
  return {
    **found,
    "MLP, 9 layers": Case(mlp("fashion_mnist", 4, (64,) * 9), steps, "depth"),
    "MLP, 5 x longer": Case(
      mlp("fashion_mnist", 4, (64,) * 3), 5 * steps, "steps"
    ),
    "MLP, 28 x 28 pixels": Case(
      mlp("fashion_mnist", 1, (64,) * 3), steps, "inputs"
    ),
    "MLP, teacher": Case(mlp("teacher", 1, (64,) * 3), steps, "data"),
    "conv net": Case(conv(16), steps, "architecture"),
    "transformer": Case(text(32), steps, "architecture, data"),
  }


class Learned(NamedTuple):
  """A theta, and what it is used with."""

  theta: Any
  options: dict[str, Any]  # of `mulo`, that it was made with
  about: dict[str, Any]  # to be kept: which theta it was


def makers(task, mulo: Learned, twin: Learned):
  """Optimizer -> (setting -> transform), settings; by parametrisation."""
  import optax

  from distrain_jax import learned

  mup = task.mup != 1.0
  if mup:
    return {
      "mulo": (
        lambda x: learned.mulo(x, mup=task.mup, **mulo.options),
        [mulo.theta],
      ),
      "mup_adamw": (
        lambda x: learned.mup_adamw(x, task.mup),
        list(RATES["mup_adamw"]),
      ),
    }
  return {
    "adamw": (lambda x: optax.adamw(x), list(RATES["adamw"])),
    "sgd": (lambda x: optax.sgd(x, momentum=0.9), list(RATES["sgd"])),
    "lo_sp": (
      lambda x: learned.mulo(x, mup=1.0, **twin.options),
      [twin.theta],
    ),
  }


def run(case: Case, mulo: Learned, twin: Learned, seeds: int, kept):
  """Final training losses of each optimizer, by rate where it has one.

  What is in `kept` is not run again.
  """
  import jax
  import numpy as np

  from distrain_jax.learned import meta

  result: dict[str, Any] = dict(kept)
  for mup in (True, False):
    task = case.make(mup)
    data = jax.device_put(task.data)
    for name, (make, settings) in makers(task, mulo, twin).items():
      if name in kept:
        continue
      go = meta.trained(task, make, case.steps)

      def last(setting, seed, go=go, data=data):
        losses = np.asarray(go(setting, data, jax.random.key(seed))[1])
        return float(np.mean(losses[-max(1, len(losses) // 20) :]))

      if name not in RATES:
        result[name] = [last(settings[0], s) for s in range(seeds)]
        continue
      first = {rate: last(rate, 0) for rate in settings}
      finite = lambda x: x if math.isfinite(x) else math.inf
      best = min(first, key=lambda r: finite(first[r]))
      chosen = {name: DEFAULT[name], f"{name}, tuned": best}
      for label, rate in chosen.items():
        more = [last(rate, s) for s in range(1, seeds)]
        result[label] = [first[rate], *more]
      result[f"{name}, best rate"] = best
  return result


def cell(values: list[float]) -> str:
  """Mean and, of several, standard deviation."""
  mean = statistics.fmean(values)
  if len(values) == 1 or not math.isfinite(mean):
    return f"{mean:.3f}"
  return f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def columns(results: dict[str, Any]) -> list[str]:
  """The optimizers of any row, in the order in which they appear."""
  found = dict.fromkeys(n for x in results.values() for n in x["losses"])
  return [n for n in found if not n.endswith("best rate")]


def table(results: dict[str, Any]) -> str:
  """Markdown: a line a task, a column an optimizer; – where it was not run."""
  names = columns(results)
  lines = ["| task | new | " + " | ".join(names) + " |"]
  lines.append("|" + "---|" * (len(names) + 2))
  for task, x in results.items():
    losses = x["losses"]
    cells = " | ".join(cell(losses[n]) if n in losses else "–" for n in names)
    lines.append(f"| {task} | {x['new']} | {cells} |")
  return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
  """Loss against width."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = {w: results.get(f"MLP, {w} wide") for w in WIDTHS}
  rows = {w: x for w, x in rows.items() if x}
  if not rows:
    return
  figure = Figure(figsize=(6, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for name in columns(rows):
    known = {w: x["losses"] for w, x in rows.items() if name in x["losses"]}
    means = [statistics.fmean(losses[name]) for losses in known.values()]
    style = {"lw": 2.5, "color": "black"} if name == "mulo" else {"lw": 1}
    axes.plot(list(known), means, marker="o", ms=3, label=name, **style)
  axes.set(xscale="log", xlabel="width", ylabel="training loss")
  axes.set_xticks(list(rows), [str(w) for w in rows])
  axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.set_title("Fashion-MNIST at 7 x 7, three hidden layers")
  axes.legend(fontsize="small")
  figure.savefig(path, dpi=130)


def find(file: str | None, mup: bool) -> Learned:
  """The theta in a file, or the shipped one.

  Args:
    file: None for the shipped one.
    mup: whether it is to be one that was made under muP, or its twin.

  Raises:
    UsageError: a file that was made the other way.
    ValueError: a file that is no theta of mulo's.
  """
  from distrain_jax import learned
  from distrain_jax.learned import storage

  if file is None:
    theta, made = storage.shipped("meta_test", mup)
    about = {"file": storage.SHIPPED[mup]}
  else:
    theta, metadata = learned.load_theta(file)
    made, about = storage.made_with(file, metadata), {"file": file, **metadata}
    own, other = ("theta", "twin") if mup else ("twin", "theta")
    if made.mup is not None and made.mup != mup:
      raise app.UsageError(
        f"--{own}={file} was made {'under' if made.mup else 'without'} muP; "
        f"--{own} wants one that was made {'under' if mup else 'without'} it. "
        f"Give it as --{other}."
      )
    learned.check_theta(f"--{own}={file}", theta)
  whole = b"".join(theta[name].tobytes() for name in sorted(theta))
  about["sha256"] = hashlib.sha256(whole).hexdigest()
  return Learned(theta, made.options, about)


def kept(file: Path, made: dict[str, Any]) -> dict[str, Any]:
  """The results of a file, to go on from.

  Raises:
    UsageError: they were made with something else, and would be lost.
  """
  old = json.loads(file.read_text()) if file.exists() else {}
  results = old.get("results", {})
  other = [name for name, value in made.items() if old.get(name) != value]
  if results and other:
    raise app.UsageError(
      f"{file} has results that were made with other {', '.join(other)} "
      f"(seeds={old.get('seeds')}, steps={old.get('steps')}, "
      f"jax={old.get('jax')}), and they would be lost. Give another folder "
      "with --out=FOLDER, or move the file away."
    )
  return results


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  known = cases(STEPS.value)
  chosen = TASKS.value or list(known)
  for name in chosen:
    if name not in known:
      raise app.UsageError(f"--task={name}: one of {'; '.join(known)}.")
  import jax

  mulo, twin = find(THETA.value, True), find(TWIN.value, False)
  out = Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  file = out / "mulo.json"
  made = {
    "mulo": mulo.about,
    "lo_sp": twin.about,
    "steps": STEPS.value,
    "seeds": SEEDS.value,
    "jax": jax.__version__,
  }
  results = kept(file, made)
  for name in chosen:
    old = results.get(name, {}).get("losses", {})
    losses = run(known[name], mulo, twin, SEEDS.value, old)
    results[name] = {"new": known[name].seen, "losses": losses}
    print(f"{name}: {losses}", flush=True)
    file.write_text(json.dumps(made | {"results": results}, indent=1) + "\n")
  results = {name: results[name] for name in known if name in results}
  print(table(results))
  draw(results, out / "mulo.png")


if __name__ == "__main__":
  app.run(main)
