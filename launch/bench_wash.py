r"""A population's step beside independent training's.

  python launch/bench_wash.py                             # some minutes
  python launch/bench_wash.py --width=0.25 --members=4 --rounds=15
  python launch/bench_wash.py --accelerator --rows=128 --steps=10

ResNet-18 on images of CIFAR-10's size (random ones), BatchNorm's statistics a
member's own. Rounds take every method in turn, so that whatever else the
machine does falls on all of them: compare the ratios, medians over the rounds,
each of a step to the independent one of its round. With --accelerator all
members are on the GPU or TPU that is there, by vmap: what is compared is then the
exchange without a network.
"""

import statistics
import time
from typing import Any, NamedTuple

from absl import app, flags

from distrain_jax import spmd
from distrain_jax.inspect import table

MEMBERS = flags.DEFINE_integer(
  "members", 2, "On a CPU a simulated device each.", 1
)
MODEL = flags.DEFINE_enum(
  "model", "resnet18", ["resnet18", "mlp"], "What the members train."
)
ROWS = flags.DEFINE_integer("rows", 32, "Images of a member and step.", 1)
WIDTH = flags.DEFINE_float("width", 1.0, "Times 64 channels.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "How often each is timed.", 1)
STEPS = flags.DEFINE_integer("steps", 2, "Steps in a round, of each.", 1)
ACCELERATOR = flags.DEFINE_bool(
  "accelerator", False, "On the GPU or TPU that is there, not on CPUs."
)

INDEPENDENT = "independent"
WARM_UP = 2  # steps that are not timed
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  INDEPENDENT: ("ensemble", {}),
  "wash, rate 0.01": ("wash", {"rate": 0.01}),
  "wash and optimizer, rate 0.01": (
    "wash",
    {"rate": 0.01, "shuffle_optimizer": True},
  ),
  "sparta, rate 0.01": (
    "sparta",
    {"rate": 0.01, "layer_schedule": "decreasing"},
  ),
  "papa, every step": ("papa", {"every": 1, "tied": False}),
}


class Case(NamedTuple):
  """A method that runs: its step, and where it is."""

  run: Any
  state: Any


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if not ACCELERATOR.value:
    spmd.use_cpu_devices(MEMBERS.value)
  import jax

  task, batch, depths = build()
  cases = {name: start(task, depths, *METHODS[name]) for name in METHODS}
  batch = next(iter(cases.values())).run.put(batch)
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  for number in range(ROUNDS.value + 1):  # the first is not counted
    for name, case in cases.items():
      state, steps = case.state, STEPS.value if number else WARM_UP
      began = time.perf_counter()
      for _ in range(steps):
        state, metrics = case.run.step(state, batch, jax.random.key(0))
      jax.block_until_ready((state, metrics))
      if number:
        seconds[name].append((time.perf_counter() - began) / steps)
      cases[name] = case._replace(state=state)
  show(seconds)


def build():
  """The task, a batch of all members, and the layers' order."""
  import jax
  import numpy as np

  from distrain_jax import models

  rng = np.random.default_rng(0)
  rows = MEMBERS.value * ROWS.value
  batch = {
    "image": rng.normal(size=(rows, 32, 32, 3)).astype(np.float32),
    "label": rng.integers(0, 10, rows),
  }
  one = {k: x[:1] for k, x in batch.items()}
  options = {"stem": "cifar", "width": WIDTH.value}
  if MODEL.value == "mlp":
    options = {"widths": (round(256 * WIDTH.value),)}
  model = models.create(MODEL.value, classes=10, **options)
  task = models.task(model, "classification", one)
  image = jax.ShapeDtypeStruct(one["image"].shape, one["image"].dtype)
  return task, batch, models.depths(model, image)


def start(task, depths, name: str, options: dict[str, Any]) -> Case:
  """A method that runs, its members from different models."""
  import jax
  import optax

  import distrain_jax as dj

  if name in ("wash", "sparta"):
    options = {**options, "depths": depths}
  loss, own = task.loss_fn, lambda key: task.init(key).params
  if task.stateful:
    loss, own = dj.stateful(loss, stats="local"), task.init
  tx = optax.sgd(0.01, momentum=0.9)
  method = getattr(dj, name)(loss, tx, **options)
  if ACCELERATOR.value:
    run = dj.simulate(method, workers=MEMBERS.value)
  else:
    run = dj.distribute(method, spmd.make_mesh({method.axis: -1}))
  keys = jax.random.split(jax.random.key(0), MEMBERS.value)
  members = jax.jit(jax.vmap(own))(keys)
  return Case(run, run.init(jax.random.key(0), members, per_worker=True))


def show(seconds: dict[str, list[float]]) -> None:
  import jax

  rows = []
  for name, values in seconds.items():
    ratios = [a / b for a, b in zip(values, seconds[INDEPENDENT])]
    rows.append(
      (
        name,
        f"{1e3 * statistics.median(values):,.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
      )
    )
  heads = ("method", "ms a step", "over independent", "rounds")
  print(table.render(heads, rows, "lrrr"))
  print(
    f"\n{MODEL.value} of width {WIDTH.value:g}, {MEMBERS.value} members of "
    f"{ROWS.value} images a step, {ROUNDS.value} rounds of {STEPS.value} steps; "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}."
  )


if __name__ == "__main__":
  app.run(main)
