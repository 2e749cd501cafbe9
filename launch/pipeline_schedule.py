r"""What each stage of a pipeline does in each tick, and how long it takes.

  python launch/pipeline_schedule.py                     # half a minute
  python launch/pipeline_schedule.py --stages=6 --micro_batches=12 --cross=6

Takes steps of PETRA, 1F1B, GPipe and the synchronous reversible pipeline on a
small reversible network, and from them which micro-batch each stage takes
forward and back in each tick (distrain_jax/inspect/ticks.py). Prints a table of
times, in passes forward of a stage, and how many micro-batches a step 1F1B needs
to be faster than PETRA. Writes pipeline_schedule.png and pipeline_schedule.json.
"""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import app, flags

import distrain_jax as dj
from distrain_jax import models
from distrain_jax.inspect import table, ticks
from distrain_jax.models import parts, tasks

STAGES = flags.DEFINE_integer("stages", 4, "J, of the table and picture.", 2)
MICRO_BATCHES = flags.DEFINE_integer(
  "micro_batches", 6, "M, of a step of the synchronous ones.", 1
)
FORWARD = flags.DEFINE_float("forward", 1.0, "Time of a pass forward.", 0)
BACKWARD = flags.DEFINE_float("backward", 2.0, "Of a pass back.", 0)
AGAIN = flags.DEFINE_float(
  "again", 1.0, "Of computing or reconstructing what was not kept.", 0
)
CROSS = flags.DEFINE_list(
  "cross", ["4", "8"], "J for which to find where 1F1B overtakes PETRA."
)
OUT = flags.DEFINE_string("out", "results", "Folder of the files.")

MOST = 1024  # micro-batches up to which 1F1B is tried
TRUTHS = """\
Ticks are those of the methods' own steps, of PETRA once the pipeline is full. In
flight: micro-batches between a stage's two passes, at most; of those PETRA and
the reversible pipeline keep nothing where a stage can be reversed. Time is a
model: all stages cost the same, and a tick takes as long as its slowest stage. A
stage's two passes in a tick follow each other; were they beside each other, PETRA
would take {beside:g}, not {after:g}. The last stage evaluates nothing twice, and goes
forward where it goes back: so GPipe with kept graphs takes more than the formula.
A 1F1B tick is a pass forward and one back: 2 (J - 1) of M + 2 (J - 1) ticks have
one of the two, and those are the short ones."""


class Schedule(NamedTuple):
  """A method with its options, and what it costs."""

  factory: Callable[..., dj.Method]
  options: dict[str, str]
  again: bool  # whether something is evaluated twice
  shown: str | None = None  # the picture's heading


SCHEDULES = {
  "PETRA": Schedule(
    dj.petra,
    {},
    True,
    "PETRA: parameters change in every tick; it goes on so",
  ),
  "1F1B, graph kept": Schedule(
    dj.pipeline,
    {"schedule": "1f1b", "buffer": "graph"},
    False,
    "1F1B, graphs kept: one step; then parameters change",
  ),
  "1F1B, recomputed": Schedule(
    dj.pipeline, {"schedule": "1f1b", "buffer": "input"}, True
  ),
  "1F1B, reversible": Schedule(
    dj.pipeline,
    {"schedule": "1f1b", "buffer": "none"},
    True,
    "Synchronous reversible pipeline (1F1B): one step",
  ),
  "GPipe, graph kept": Schedule(
    dj.pipeline, {"schedule": "gpipe", "buffer": "graph"}, False
  ),
  "GPipe, recomputed": Schedule(
    dj.pipeline,
    {"schedule": "gpipe", "buffer": "input"},
    True,
    "GPipe, recomputed from kept inputs: one step",
  ),
}


class Row(NamedTuple):
  """A schedule at some J and M."""

  trace: ticks.Trace
  counted: ticks.Trace  # of it, what goes on so: of PETRA, the full ticks
  costs: ticks.Costs
  time: float  # per micro-batch
  formula: float


class Crossing(NamedTuple):
  """Where 1F1B with kept graphs overtakes PETRA."""

  stages: int
  petra: float  # time per micro-batch
  micro_batches: int | None  # from so many a step on; None: not up to MOST
  times: dict[int, float]  # of 1F1B, by micro-batches a step


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  j, m = STAGES.value, MICRO_BATCHES.value
  crossed = [crossing(count) for count in asked()]
  rows = {name: row(name, j, m) for name in SCHEDULES}
  print(f"J = {j} stages, M = {m} micro-batches a step; times in passes.\n")
  print(f"{text(rows)}\n")
  for found in crossed:
    print(sentence(found))
  again = costs_of(True)
  back = again.again + again.backward
  beside, after = max(again.forward, back), again.forward + back
  print(f"\n{TRUTHS.format(beside=beside, after=after)}")
  keep(rows, crossed, Path(OUT.value))


def asked() -> list[int]:
  """--cross, as numbers."""
  try:
    found = [int(x) for x in CROSS.value]
  except ValueError:
    found = [0]
  if any(x < 2 for x in found):
    sys.exit(
      "--cross: numbers of stages, each at least 2, e.g. 4,8; got "
      f"{','.join(CROSS.value)!r}."
    )
  return found


def costs_of(again: bool) -> ticks.Costs:
  second = AGAIN.value if again else 0.0
  return ticks.Costs(FORWARD.value, second, BACKWARD.value)


@functools.cache
def row(name: str, j: int, m: int) -> Row:
  """Of PETRA so many ticks once it is full, of the others a whole step."""
  schedule = SCHEDULES[name]
  costs = costs_of(schedule.again)
  both = sum(costs)
  if schedule.factory is dj.petra:
    trace = traced(name, j, m + 2 * (j - 1))
    full = ticks.when_full(trace)
    time = float(ticks.tick_times(full, costs).mean())
    return Row(trace, full, costs, time, both)
  trace = traced(name, j, m)
  time = ticks.time_per_micro_batch(trace, costs)
  return Row(trace, trace, costs, time, (1 + (j - 1) / m) * both)


def traced(name: str, j: int, m: int) -> ticks.Trace:
  """The first step, of m micro-batches of two rows."""
  batch = {
    "image": np.ones((2 * m, 4), np.float32),
    "label": np.zeros(2 * m, np.int32),
  }
  example = jax.tree.map(lambda x: x[:2], batch)
  blocks, params = network(j)
  run = dj.simulate(
    SCHEDULES[name].factory(
      blocks,
      optax.sgd(0.1),
      shapes=params,
      example=example,
      inputs="image",
      accumulate=m,
      **SCHEDULES[name].options,
    ),
    workers=j,
  )
  key = jax.random.key(0)
  return ticks.trace(run, run.init(key, params), batch, key)


@functools.cache
def network(j: int):
  """(blocks, params) of stem, j - 2 reversible blocks and head."""
  model = models.RevMLP(width=4, hidden=4, blocks=max(j - 2, 1), classes=2)
  blocks = parts.blocks(model, tasks.classification_measure())
  image = np.ones((2, 4), np.float32)
  params = models.init(model, jax.random.key(0), image).params
  if j == 2:  # two of the three blocks on the first stage
    blocks = (blocks[:2], blocks[2])
  return blocks, params


def crossing(j: int) -> Crossing:
  """By bisection: more micro-batches a step make 1F1B faster."""
  petra = row("PETRA", j, 1).time
  times = {}

  def faster(m):
    times[m] = row("1F1B, graph kept", j, m).time
    return times[m] < petra

  low, high = 0, 1
  while not faster(high):
    low, high = high, 2 * high
    if high > MOST:
      return Crossing(j, petra, None, times)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if faster(middle) else (middle, high)
  return Crossing(j, petra, high, times)


def sentence(found: Crossing) -> str:
  """A crossing in words, and by the formula."""
  j, m, c = found.stages, found.micro_batches, costs_of(True)
  start = f"J = {j}: 1F1B with kept graphs"
  if m is None:
    return f"{start} does not overtake PETRA up to M = {MOST}."
  before = f"{found.times[m - 1]:.3f} with {m - 1}, " if m > 1 else ""
  limit = math.inf
  if c.again:
    limit = (j - 1) * (c.forward + c.backward) / c.again
  return (
    f"{start} overtakes PETRA ({found.petra:g} per micro-batch) at M = {m}: "
    f"{before}{found.times[m]:.3f} with {m}. By the formula PETRA is faster for "
    f"M < {limit:g}."
  )


def text(rows: dict[str, Row]) -> str:
  headers = ["schedule", "ticks", "in flight", "busy passes, %", "busy time, %"]
  headers += ["per micro-batch", "formula"]
  cells = []
  for name, found in rows.items():
    n = numbers(found)
    cells.append(
      [
        name,
        str(n["ticks"]),
        str(n["in_flight"]),
        f"{100 * n['busy_passes']:.1f}",
        f"{100 * n['busy_time']:.1f}",
        f"{n['time']:.3f}",
        f"{n['formula']:.3f}",
      ]
    )
  return table.render(headers, cells, "l" + "r" * (len(headers) - 1))


def numbers(found: Row) -> dict:
  trace, costs = found.trace, found.costs
  return {
    "ticks": len(trace.forward),
    "in_flight": trace.in_flight,
    "busy_passes": found.counted.busy,
    "busy_time": ticks.busy_time(found.counted, costs),
    "time": found.time,
    "formula": found.formula,
  }


def keep(rows: dict[str, Row], crossed: list[dict], folder: Path) -> None:
  """pipeline_schedule.json and pipeline_schedule.png."""
  folder.mkdir(parents=True, exist_ok=True)
  kept = {
    "stages": STAGES.value,
    "micro_batches": MICRO_BATCHES.value,
    "costs": costs_of(True)._asdict(),
    "schedules": {
      name: numbers(x) | {k: v.tolist() for k, v in x.trace._asdict().items()}
      for name, x in rows.items()
    },
    "crossings": [found._asdict() for found in crossed],
  }
  name = "pipeline_schedule"
  (folder / f"{name}.json").write_text(json.dumps(kept) + "\n")
  panels = [
    (f"{SCHEDULES[n].shown}; {x.time:.3g} per micro-batch", x.trace, x.costs)
    for n, x in rows.items()
    if SCHEDULES[n].shown
  ]
  title = f"{STAGES.value} stages; numbers are micro-batches, dots end ticks"
  ticks.picture(panels, folder / f"{name}.png", title=title)
  print(f"wrote {folder / name}.json and {folder / name}.png")


if __name__ == "__main__":
  app.run(main)
