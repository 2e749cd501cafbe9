r"""Where is the best learning rate, by width, with muP and without?

  python launch/mup_transfer.py               # 20 minutes of two busy cores
  python launch/mup_transfer.py --task=llama --widths=32,64

Trains an MLP on Fashion-MNIST and a small Llama on text at several widths, each
with rates in steps of two: AdamW in the standard parametrisation, and muP's
AdamW in muP. Prints each width's best rate, how far it moves between the widths
and what the smallest's is worth at the largest; writes OUT.json and OUT.png.
"""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OUT = flags.DEFINE_string("out", "results/mup_transfer", "Of .json and .png.")
TASKS = flags.DEFINE_multi_string("task", None, "Only these; unset: all.")
WIDTHS = flags.DEFINE_list("widths", None, "Instead of each task's own.")
STEPS = flags.DEFINE_integer("steps", 200, "Of each training.", 1)
SEEDS = flags.DEFINE_integer("seeds", 2, "Runs of each, from seed 0.", 1)
DATA = flags.DEFINE_string("data", "fashion_mnist", "Images of the MLP.")
SHARE = 10  # the last 1 / SHARE of the steps' losses are averaged


class Case(NamedTuple):
  """A task at any width."""

  make: Callable[[int, bool], Any]  # (width, mup) -> Task
  widths: tuple[int, ...]
  powers: dict[str, range]  # setting -> of two, the rates
  wide: int  # from here on one rate after the other, for memory's sake


def of_model(model, batch, data, mup: bool) -> Any:
  """A `Task` of a Flax model; its `mup` is `mup_info`, or None."""
  import jax

  from distrain_jax import learned, models
  from distrain_jax.learned import meta
  from distrain_jax.models.chunked_loss import cross_entropy

  example = jax.eval_shape(batch, data, jax.random.key(0))["x"]
  init = lambda key: models.init(model, key, example).params

  def loss(params, rows, key):
    del key  # no dropout
    logits = model.apply({"params": params}, rows["x"], train=True)
    return cross_entropy(logits, rows["y"]).mean()

  shapes = models.abstract(model, example).params
  names = models.logical_names(model, example)
  info = learned.mup_info(shapes, names=names) if mup else None
  return meta.Task("", init, loss, batch, data, lambda x: x, info)


@functools.cache
def images(name: str):
  """As in the meta-training, Fashion-MNIST at 7 x 7 pixels."""
  from launch import meta_train

  return meta_train.resident(name, 4 if name == "fashion_mnist" else 1)


def mlp(width: int, mup: bool):
  """Two hidden layers."""
  from distrain_jax import models
  from distrain_jax.learned.meta import tasks

  data = images(DATA.value)
  classes = int(data["y"].max()) + 1
  model = models.create("mlp", widths=(width,) * 2, classes=classes, mup=mup)
  return of_model(model, tasks.sampled(64), data, mup)


def llama(width: int, mup: bool):
  """Two layers, on the standard library's json, by bytes."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from distrain_jax import models

  files = sorted(Path(json.__file__).parent.glob("*.py"))
  raw = b"".join(p.read_bytes() for p in files)
  text = np.frombuffer(raw, np.uint8).astype(np.int32)

  def batch(data, key):
    starts = jax.random.randint(key, (8,), 0, len(data) - 32)
    rows = data[starts[:, None] + jnp.arange(33)[None]]
    return {"x": rows[:, :-1], "y": rows[:, 1:]}

  model = models.create("llama", embed=width, mlp=2 * width, layers=2, mup=mup)
  return of_model(model, batch, text, mup)


CASES = {
  "mlp": Case(
    mlp,
    (16, 64, 256, 1024),
    {"SP, adamw": range(-13, -3), "μP, mup_adamw": range(-8, 2)},
    512,
  ),
  "llama": Case(
    llama,
    (32, 64, 128),
    {"SP, adamw": range(-11, -3), "μP, mup_adamw": range(-7, 1)},
    128,
  ),
}


def losses(case: Case, setting: str, width: int) -> list[list[float]]:
  """(rates, seeds): each run's loss at its end."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from distrain_jax import learned
  from distrain_jax.learned import meta

  mup = setting.startswith("μP")
  task = case.make(width, mup)
  make = (lambda r: learned.mup_adamw(r, task.mup)) if mup else optax.adamw
  go = meta.trained(task, make, STEPS.value)
  keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS.value))

  @jax.jit
  def run(rates, data):
    def one(rate):
      found = jax.vmap(lambda key: go(rate, data, key)[1])(keys)
      return found[:, -max(1, STEPS.value // SHARE) :].mean(1)

    each = jax.lax.map if width >= case.wide else lambda f, x: jax.vmap(f)(x)
    return each(one, rates)

  rates = jnp.asarray([2.0**p for p in case.powers[setting]])
  return np.asarray(run(rates, jax.device_put(task.data))).tolist()


def finite(x: float) -> float | None:
  """JSON has a null for what has diverged, and no infinity."""
  return x if math.isfinite(x) else None


def summary(rows: dict[str, list[list[float]]], powers) -> dict[str, Any]:
  """The mean over seeds, each width's best power of two, and the drift.

  Args:
    rows: width -> (rates, seeds).
    powers: of two, the rates.
  """
  means = {
    w: [finite(sum(seeds) / len(seeds)) for seeds in x] for w, x in rows.items()
  }
  there = lambda x: [(y, i) for i, y in enumerate(x) if y is not None]
  least = lambda x: min(there(x), default=(0.0, 0))[1]
  best = {w: powers[least(x)] for w, x in means.items()}
  of_widths, widest = list(best.values()), list(means.values())[-1]
  return {
    "powers": list(powers),
    "mean": means,
    "best": best,
    "drift": max(of_widths) - min(of_widths),
    # At the largest width, with the rate that was best at the smallest.
    "transferred": widest[powers.index(of_widths[0])],
    "at the grid's end": any(p in (powers[0], powers[-1]) for p in of_widths),
  }


def told(loss: float | None) -> str:
  return "diverged" if loss is None else f"{loss:.3f}"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
  """A row a task, a column a parametrisation: loss against rate, by width."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8.8, 3.4 * len(results)), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(len(results), 2, squeeze=False, sharey="row")
  for row, (task, by_setting) in zip(panels, results.items()):
    lowest = math.inf
    for axes, (setting, found) in zip(row, by_setting.items()):
      for i, (width, mean) in enumerate(found["mean"].items()):
        at = found["powers"].index(found["best"][width])
        shade = f"C{i}"
        shown = [math.nan if x is None else x for x in mean]
        axes.plot(found["powers"], shown, color=shade, label=width)
        axes.plot(found["best"][width], shown[at], "o", color=shade)
        lowest = min(lowest, math.inf if mean[at] is None else mean[at])
      axes.set(title=f"{task}: {setting}", xlabel="log2 of the rate")
      axes.grid(alpha=0.3)
    row[0].set_ylabel("training loss at the end")
    starts = [m[0] for x in by_setting.values() for m in x["mean"].values()]
    first = max((x for x in starts if x is not None), default=2 * lowest)
    row[0].set_ylim(lowest - 0.05 * (first - lowest), first)
    row[-1].legend(title="width", fontsize="small")
  figure.savefig(path, dpi=130)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  chosen = TASKS.value or list(CASES)
  for name in chosen:
    if name not in CASES:
      raise app.UsageError(f"--task={name}: one of {', '.join(CASES)}.")
  import jax

  out = Path(OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  results: dict[str, dict[str, Any]] = {}
  for name in chosen:
    case = CASES[name]
    widths = [int(w) for w in WIDTHS.value or case.widths]
    for setting, powers in case.powers.items():
      rows: dict[str, list[list[float]]] = {}
      for width in widths:
        rows[str(width)] = losses(case, setting, width)
        found = summary(rows, powers)
        kept = {w: [list(map(finite, x)) for x in y] for w, y in rows.items()}
        results.setdefault(name, {})[setting] = {"losses": kept, **found}
        best = found["best"][str(width)]
        low = told(found["mean"][str(width)][powers.index(best)])
        print(f"{name}, {setting}, {width}: 2^{best}, {low}", flush=True)
        whole = {
          "steps": STEPS.value,
          "seeds": SEEDS.value,
          "jax": jax.__version__,
          "results": results,
        }
        line = json.dumps(whole, indent=1) + "\n"
        out.with_suffix(".json").write_text(line)
      print(f"{name}, {setting}: the best rate moves by 2^{found['drift']}")
      print(
        f"{name}, {setting}, {widths[-1]}: {told(found['transferred'])} at "
        f"the best rate of {widths[0]}"
      )
  draw(results, out.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
