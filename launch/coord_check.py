r"""Checks that our models are in muP: do their layers move alike at all widths?

  python launch/coord_check.py                     # all models; 5 minutes
  python launch/coord_check.py --model=mlp --seeds=1

For an MLP, a ResNet and a Llama, in muP under muP's AdamW and under mulo, and
in the standard parametrisation under AdamW: how much farther every layer's
activations have moved after some steps at the largest width than at the
smallest. In muP that is 1, nearly: narrow networks differ from wide ones, by
about 1 / sqrt(width). Prints the layer farthest from it of each, and writes
OUT.json and OUT.png.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OUT = flags.DEFINE_string("out", "results/coord_check", "Of .json and .png.")
STEPS = flags.DEFINE_integer("steps", 8, "Of training, on one batch.", 1)
SEEDS = flags.DEFINE_integer("seeds", 3, "Averaged over, from seed 0.", 1)
MODELS = flags.DEFINE_multi_string("model", None, "Only these; unset: all.")
OPTIMIZERS = flags.DEFINE_multi_enum(
  "optimizer",
  ["mup_adamw", "mulo", "adamw"],
  ["mup_adamw", "mulo", "adamw"],
  "Only these; the last is without muP.",
)
WIDTHS = flags.DEFINE_list("widths", None, "Instead of each model's own.")


class Case(NamedTuple):
  """A model at any width."""

  create: Callable[[int, bool], Any]  # (width, mup) -> Linen module
  batch: Callable[[], Any]  # () -> {"x", "y"}
  widths: tuple[int, ...]
  rates: dict[str, float]  # of AdamW, by setting


def digits(count: int) -> dict[str, Any]:
  """Images of 8 x 8 pixels, of mean 0 and deviation 1."""
  import numpy as np

  from distrain_jax import data

  arrays = data.in_memory(data.load("digits").train).arrays
  x, y = arrays["image"][:count].astype(np.float32), arrays["label"][:count]
  return {"x": (x - x.mean()) / x.std(), "y": y}


def text() -> dict[str, Any]:
  """8 rows of 32 bytes of the standard library's sources."""
  import numpy as np

  raw = Path(json.__file__).read_bytes()
  rows = np.frombuffer(raw, np.uint8)[: 8 * 33].reshape(8, 33).astype(np.int32)
  return {"x": rows[:, :-1], "y": rows[:, 1:]}


def cases() -> dict[str, Case]:
  """Name -> case. A ResNet's width is its channels in the first stage."""
  from distrain_jax import models

  mlp = lambda w, mup: models.create("mlp", widths=(w,) * 3, mup=mup)
  resnet = lambda w, mup: models.ResNet(
    stages=(1, 1), width=w / 64, norm="group", mup=mup
  )
  llama = lambda w, mup: models.create(
    "llama", embed=w, mlp=2 * w, layers=2, scan=False, mup=mup
  )
  rates = lambda mup, sp: {"mup_adamw": mup, "adamw": sp}
  return {
    "mlp": Case(mlp, lambda: digits(64), (64, 128, 512), rates(0.02, 1e-3)),
    "resnet": Case(resnet, lambda: digits(16), (16, 32, 64), rates(0.02, 1e-3)),
    "llama": Case(llama, text, (32, 64, 256), rates(0.05, 3e-3)),
  }


def settings() -> dict[str, tuple[bool, Callable]]:
  """Title -> (whether in muP, (rates, mup_info) -> optimizer)."""
  import optax

  from distrain_jax import learned

  return {
    "μP, mup_adamw": (
      True,
      lambda rates, mup: learned.mup_adamw(rates["mup_adamw"], mup),
    ),
    "μP, mulo": (True, lambda _, mup: learned.mulo(mup=mup, tile=2**20)),
    "SP, adamw": (False, lambda rates, _: optax.adamw(rates["adamw"])),
  }


def check(case: Case, widths, mup: bool, make: Callable) -> Any:
  """The `Coordinates` of a model under an optimizer."""
  from distrain_jax import learned, models
  from distrain_jax.models.chunked_loss import cross_entropy

  batch = case.batch()
  loss = lambda logits, batch: cross_entropy(logits, batch["y"]).mean()

  def build(width, key):
    model = case.create(width, mup)
    names = models.logical_names(model, batch["x"])
    tx = make(case.rates, lambda p: learned.mup_info(p, names=names))
    return learned.flax_probe(
      model, key, tx, batch, inputs="x", loss=loss, train=True
    )

  return learned.coord_check(
    build, widths, batch, steps=STEPS.value, seeds=SEEDS.value
  )


def farthest(growth: dict[str, float]) -> tuple[str, float]:
  """The layer whose growth is farthest from 1, either way."""
  far = lambda item: abs(math.log(item[1])) if item[1] > 0 else math.inf
  return max(growth.items(), key=far)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  # A few steps need not be fast, but compile fast.
  more = "--xla_backend_optimization_level=1"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}"
  known = cases()
  chosen = MODELS.value or list(known)
  for name in chosen:
    if name not in known:
      raise app.UsageError(f"--model={name}: one of {', '.join(known)}.")
  import jax

  from distrain_jax import learned

  out = Path(OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  found, results = {}, {}
  print("| model | parametrisation, optimizer | widths | layer | growth |")
  print("|---|---|---|---|---|")
  for name in chosen:
    widths = tuple(map(int, WIDTHS.value or known[name].widths))
    for title, (mup, make) in settings().items():
      if title.rpartition(" ")[2] not in OPTIMIZERS.value:
        continue
      result = check(known[name], widths, mup, make)
      layer, growth = farthest(result.growth())
      span = f"{widths[0]} to {widths[-1]}"
      print(f"| {name} | {title} | {span} | {layer} | {growth:.2f} |")
      sys.stdout.flush()
      found[f"{name}: {title}"] = result
      results[f"{name}: {title}"] = {
        "widths": widths,
        "growth": result.growth(),
        "moved": {k: x[:, -1].tolist() for k, x in result.moved.items()},
      }
      whole = {
        "steps": STEPS.value,
        "seeds": SEEDS.value,
        "jax": jax.__version__,
        "results": results,
      }
      line = json.dumps(whole, indent=1) + "\n"
      out.with_suffix(".json").write_text(line)
  learned.draw_coordinates(found, out.with_suffix(".png"), columns=3)


if __name__ == "__main__":
  app.run(main)
