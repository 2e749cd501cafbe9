r"""What the trainer costs beside the step that it takes: three times, one run.

  python launch/bench_trainer.py --devices=8                  # configs/text.py
  python launch/bench_trainer.py --config=configs/digits.py --steps=200

Rounds alternate between the bare jitted step on one batch, the trainer on real
data (no evaluation, no checkpoints) and the data loader alone, so that whatever
else the machine does falls on all of them. Compare ratios, not times. The last
columns are processor time, of all threads: on a busy machine of simulated
devices, where every thread takes from the step, they are the ones to believe.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

from distrain_jax import spmd

TEXT = Path(__file__).resolve().parent.parent / "configs" / "text.py"
CONFIG = config_flags.DEFINE_config_file(
  "config", str(TEXT), "configs/NAME.py; the tiny Llama by default."
)
DEVICES = flags.DEFINE_integer(
  "devices", None, "Simulate so many CPU devices; unset: what is there."
)
ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each is timed.", 1)
STEPS = flags.DEFINE_integer("steps", 10, "Steps in a round, of each.", 1)
WARM_UP = 2  # steps after each change that are not timed


class Lap(NamedTuple):
  """Seconds a step."""

  wall: float
  cpu: float  # of all threads of this process


class Times(NamedTuple):
  """One lap a round."""

  step: list[Lap]
  trainer: list[Lap]
  loader: list[Lap]


def now() -> Lap:
  return Lap(time.perf_counter(), time.process_time())


def lap(began: Lap, steps: int) -> Lap:
  """Since `began`, divided by the steps taken."""
  return Lap(*((b - a) / steps for a, b in zip(began, now())))


class _Enough(Exception):
  """Ends the training."""


class Stopwatch:
  """A run's data iterator, which sees the trainer come back for each batch.

  The time from one request to another, `steps` later, is what the trainer
  takes for so many steps. Between rounds it keeps the trainer waiting and
  times the others.
  """

  def __init__(
    self,
    batches: Iterator[Any],
    others: Callable[[], tuple[Lap, Lap]],
    rounds: int,
    steps: int,
  ):
    """Args: the run's batches; `others()` times the step and the loader."""
    self.times = Times([], [], [])
    self._batches, self._others = batches, others
    self._rounds, self._steps = rounds, steps
    self._asked, self._began = 0, now()

  def __iter__(self):
    return self

  def __next__(self):
    if self._asked == WARM_UP:
      self._began = now()
    if self._asked == WARM_UP + self._steps:
      self._end_round(lap(self._began, self._steps))
    self._asked += 1
    return next(self._batches)

  def _end_round(self, trainer: Lap) -> None:
    step, loader = self._others()
    for laps, one in zip(self.times, (step, trainer, loader)):
      laps.append(one)
    if len(self.times.trainer) == self._rounds:
      raise _Enough
    self._asked = 0


def measure(config, rounds: int, steps: int) -> Times:
  """Trains what the config says, in a folder that is thrown away."""
  import jax

  from distrain_jax import train

  x = train.build(config)
  alone = {}  # a state and iterators of its own, made once XLA is warm

  def others():
    if not alone:
      alone["loader"] = x.batches()
      alone["batch"] = x.run.put(next(alone["loader"]))
      alone["state"] = x.run.init(x.key, x.params())
    return bare(), loader()

  def bare():
    state, before = alone["state"], None
    for k in range(WARM_UP + steps):
      if k == WARM_UP:
        began = now()
      state, metrics = x.run.step(state, alone["batch"], x.key)
      jax.block_until_ready(before)  # as the trainer: one step ahead
      before = metrics
    taken = lap(began, steps)
    alone["state"] = jax.block_until_ready(state)
    return taken

  def loader():
    for k in range(8 + steps):  # what was made ahead is not timed
      if k == 8:
        began = now()
      next(alone["loader"])
    return lap(began, steps)

  watch = Stopwatch(x.batches(), others, rounds, steps)
  with tempfile.TemporaryDirectory() as folder:
    try:
      train.train(x._replace(batches=lambda: watch), folder, label="bench")
    except _Enough:
      return watch.times
  raise AssertionError("unreachable: the config has steps for all rounds")


def table(times: Times) -> str:
  """The three rows: milliseconds a step, and ratios to the bare step."""
  lines = [
    f"{'':12}{'ms a step':>18}{'ratio to bare step':>22}{'processor time':>18}",
    f"{'':12}{'best':>9}{'median':>9}{'best':>11}{'median':>11}"
    f"{'ms':>9}{'ratio':>9}",
  ]
  names = ("bare step", "trainer", "data loader")
  for name, laps in zip(names, times):
    wall, cpu = zip(*laps)
    base_wall, base_cpu = zip(*times.step)
    lines.append(
      f"{name:12}{1e3 * min(wall):9.2f}{1e3 * statistics.median(wall):9.2f}"
      f"{min(wall) / min(base_wall):11.4f}{_ratio(wall, base_wall):11.4f}"
      f"{1e3 * statistics.median(cpu):9.2f}{_ratio(cpu, base_cpu):9.4f}"
    )
  return "\n".join(lines)


def _ratio(a: Iterable[float], b: Iterable[float]) -> float:
  """The median over rounds, each compared with itself."""
  return statistics.median(x / y for x, y in zip(a, b))


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  if DEVICES.value is not None:
    spmd.use_cpu_devices(DEVICES.value)
  import jax

  c = CONFIG.value
  with c.unlocked():
    enough = 1 + ROUNDS.value * (WARM_UP + STEPS.value)
    c.steps = max(c.steps, enough)
    c.evaluation.every = c.checkpoint.every = 0
  times = measure(c, ROUNDS.value, STEPS.value)
  print(
    f"{c.data.name}, {c.model.name}, {c.method.name}, global batch "
    f"{c.batch_size}; {jax.device_count()} {jax.default_backend()} devices, "
    f"jax {jax.__version__}; {ROUNDS.value} rounds of {STEPS.value} steps"
  )
  print(table(times))


if __name__ == "__main__":
  app.run(main)
