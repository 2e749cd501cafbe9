r"""Step time of an SDP worker on one device, by coverage, and of the dense one.

  python launch/bench_sdp.py                              # three minutes
  python launch/bench_sdp.py --embed=512 --layers=16 --rounds=11
  python launch/bench_sdp.py --accelerator --embed=768 --layers=16 --tokens=1024

A worker's step is timed as it computes: gradient and update of its subnetwork's
arrays, on its rows, without messages. The dense step, coverage 1, has the same
rows. Rounds take every step in turn, so that whatever else the machine does
falls on all of them: compare the ratios, medians over the rounds, each of a
step to the dense one of its round. What is shared, the embedding and the output
layer, does not shrink; `wanted` is the ratio of the matrix products' FLOPs.
"""

import functools
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from absl import app, flags

from distrain_jax import spmd
from distrain_jax.inspect import table

ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each is timed.", 1)
STEPS = flags.DEFINE_integer("steps", 3, "Steps in a round, of each.", 1)
ROWS = flags.DEFINE_integer("rows", 8, "Sequences of a worker.", 1)
TOKENS = flags.DEFINE_integer("tokens", 128, "Of a sequence.", 1)
EMBED = flags.DEFINE_integer("embed", 256, "Channels of the stream.", 2)
LAYERS = flags.DEFINE_integer("layers", 8, "Blocks; a multiple of 8.", 1)
ACCELERATOR = flags.DEFINE_bool(
  "accelerator", False, "On the GPU or TPU that is there, not on a CPU."
)

WORKERS = 8
COVERAGES = ("3/4", "1/2", "1/4")
DENSE = "dense"
WARM_UP = 2  # steps that are not timed


class Case(NamedTuple):
  """One program: a worker's step."""

  level: str  # dense, neuron, block
  coverage: Fraction
  params: Any  # a worker's


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if not ACCELERATOR.value:
    spmd.use_cpu_devices(1)
  import jax

  if LAYERS.value % WORKERS:
    raise app.UsageError(
      f"--layers={LAYERS.value}: a multiple of the {WORKERS} workers, so that "
      "all subnetworks are of one depth."
    )
  model, task, batch = build()
  found = cases(model, task, batch)
  rows = measure(found, task, batch, ROUNDS.value, STEPS.value)
  print(
    f"One worker of {WORKERS} on one {jax.devices()[0].device_kind}: a Llama of "
    f"{LAYERS.value} layers of {EMBED.value}, {ROWS.value} x {TOKENS.value} "
    f"tokens; {ROUNDS.value} rounds of {STEPS.value} steps, jax "
    f"{jax.__version__}"
  )
  print(text(found, rows, batch))


def build():
  """The model, its task, and a batch of one worker."""
  import numpy as np

  from distrain_jax import models

  model = models.create(
    "llama",
    embed=EMBED.value,
    layers=LAYERS.value,
    heads=WORKERS,
    kv_heads=WORKERS,
    mlp=4 * EMBED.value,
  )
  rng = np.random.default_rng(0)
  shape = (ROWS.value, TOKENS.value)
  tokens = lambda: rng.integers(model.config.vocab, size=shape, dtype=np.int32)
  batch = {"tokens": tokens(), "targets": tokens()}
  return model, models.task(model, "language_model", batch), batch


def cases(model, task, batch) -> list[Case]:
  """The whole model, and worker 0's subnetworks."""
  import jax

  from distrain_jax import models
  from distrain_jax.methods.sdp import alone

  inputs = batch["tokens"]
  whole = jax.jit(task.init)(jax.random.key(0))._replace(model_state=())
  found = [Case(DENSE, Fraction(1), whole.params)]
  for level in ("neuron", "block"):
    for coverage in map(Fraction, COVERAGES):
      nets = alone(
        task.loss_fn,
        workers=WORKERS,
        names=models.logical_names(model, inputs),
        shapes=models.abstract(model, inputs).params,
        level=level,
        coverage=float(coverage),
      )
      own = jax.jit(functools.partial(nets.own, me=0, worker=0))(whole)
      found.append(Case(level, coverage, own.params))
  return found


def stepper(case: Case, task, batch) -> Callable[[int], float]:
  """fn(steps) -> seconds a step; it goes on from where it was."""
  import jax
  import optax

  import distrain_jax as dj

  method = dj.ddp(task.loss_fn, optax.adamw(1e-3))
  run = dj.simulate(method, workers=1)
  key = jax.random.key(0)
  kept = {"state": run.init(key, case.params)}

  def go(steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
      kept["state"], _ = run.step(kept["state"], batch, key)
    jax.block_until_ready(kept["state"])
    return (time.perf_counter() - began) / steps

  go(WARM_UP)
  return go


def measure(
  found: list[Case], task, batch, rounds: int, steps: int
) -> list[list[float]]:
  """Seconds a step: a row a case, a column a round."""
  steppers = [stepper(case, task, batch) for case in found]
  laps: list[list[float]] = [[] for _ in found]
  for k in range(rounds):
    # There and back: none always follows the same one.
    order = range(len(found)) if k % 2 == 0 else reversed(range(len(found)))
    for i in order:
      laps[i].append(steppers[i](steps))
  return laps


def product_flops(case: Case, batch) -> float:
  """Of a forward pass: two a weight and token, and those of attention."""
  import jax

  tokens, length = batch["tokens"].size, batch["tokens"].shape[1]
  weights = sum(x.size for x in jax.tree.leaves(case.params) if x.ndim > 1)
  weights -= case.params["embedding"].size  # rows are taken
  keys = case.params["blocks"]["attention"]["key"]  # (layers, e, heads, d)
  scores = 2 * 2 * length * keys.size // keys.shape[1]
  return tokens * (2 * weights + scores)


def text(found: list[Case], laps: list[list[float]], batch) -> str:
  headers = ("", "coverage", "ms a step", "of the dense one", "wanted")
  dense, flops = laps[0], product_flops(found[0], batch)
  rows = []
  for case, mine in zip(found, laps):
    ratio = statistics.median(a / b for a, b in zip(mine, dense))
    wanted = product_flops(case, batch) / flops
    ms = 1e3 * statistics.median(mine)
    cells = (f"{ms:.2f}", f"{ratio:.3f}", f"{wanted:.3f}")
    rows.append((case.level, str(case.coverage), *cells))
  return table.render(headers, rows, "lrrrr")


if __name__ == "__main__":
  app.run(main)
