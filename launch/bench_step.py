r"""What a report says that a step takes, beside what the device here takes.

  python launch/bench_step.py --config=configs/fineweb_llama.py:134M \
    --config.batch_size=32
  python launch/bench_step.py --config=configs/text.py --devices=8

Compiles what launch/train.py would run, as launch/compile.py does, and runs it
on random rows; the data need not be there. Of the device: seconds of a step,
the median over rounds, and the most memory that its allocator had given out.
Predicted are the report's time, a model by published peaks, and the compiler's
memory. Measured is a process of its own, which finds the program in a cache:
what XLA allocates to tune it is in another. CPUs have no peaks that we know,
and no count of memory: see bench_memory.py.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from distrain_jax import data, inspect, spmd
from distrain_jax.inspect import table
from distrain_jax.train import experiment
from distrain_jax.train.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
DEVICES = flags.DEFINE_integer(
  "devices", None, "Simulate so many CPU devices; unset: what is there.", 1
)
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often it is timed.", 1)
STEPS = flags.DEFINE_integer("steps", 5, "Steps in a round.", 1)
OUT = flags.DEFINE_string("out", None, "A JSON file to write.")
CHILD = flags.DEFINE_enum(
  "child", None, ["compile", "measure"], "Of this command's own processes."
)
flags.mark_flags_as_required(["config"])

WARM_UP = 3  # steps that are not timed


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  if CHILD.value is None:
    found = in_fresh_processes()
    print(text(found))
    if OUT.value:
      Path(OUT.value).write_text(json.dumps(found, indent=2) + "\n")
    return
  if DEVICES.value is not None:
    spmd.use_cpu_devices(DEVICES.value)
  try:
    found = measure(CONFIG.value, CHILD.value == "measure")
  except (ValueError, ImportError, FileNotFoundError) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  print(json.dumps(found))


def in_fresh_processes() -> dict[str, Any]:
  """Compiles in one process and measures in the next; what it found."""
  with tempfile.TemporaryDirectory() as cache:
    env = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    for child in ("compile", "measure"):
      command = [sys.executable, __file__, f"--child={child}", *sys.argv[1:]]
      done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
      if done.returncode:
        sys.exit(done.returncode)  # it has said why
  return json.loads(done.stdout.splitlines()[-1])


def measure(c: ConfigDict, run_it: bool) -> dict[str, Any]:
  """Compiles a config's step here, and runs it if that is asked for."""
  import jax

  told = data.describe(
    c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
  )
  x = experiment.program(c, told.info)
  report = inspect.compile(x.run, *x.abstract())
  if not run_it:
    return {}
  device = x.run.mesh.devices.flat[0]
  laps = timed(x, rows(c, told.info))
  allocator = device.memory_stats() or {}
  seconds = statistics.median(laps)
  return {
    "config": config_flags.get_config_filename(flags.FLAGS["config"]),
    "method": x.run.method.name,
    "workers": x.run.workers,
    "batch_size": c.batch_size,
    "device": device.device_kind,
    "devices": x.run.mesh.size,
    "jax": jax.__version__,
    "predicted_seconds": report.step.seconds if report.chip else None,
    "measured_seconds": seconds,
    "rounds_seconds": laps,
    "flops": report.flops,
    "utilisation": report.chip
    and report.flops / (seconds * report.chip.peak("bf16")),
    "predicted_bytes": report.memory.peak,
    "measured_bytes": allocator.get("peak_bytes_in_use"),
  }


def timed(x: experiment.Program, batch: dict[str, Any]) -> list[float]:
  """Seconds a step, of each round."""
  import jax

  batch, key = x.run.put(batch), jax.random.key(0)
  state, laps = x.run.init(key, x.params()), []
  for number in range(ROUNDS.value + 1):  # the first is not counted
    steps = STEPS.value if number else WARM_UP
    began = time.perf_counter()
    for _ in range(steps):
      state, metrics = x.run.step(state, batch, key)
    jax.block_until_ready((state, metrics))
    laps.append((time.perf_counter() - began) / steps)
  return laps[1:]


def rows(c: ConfigDict, info: data.Info) -> dict[str, Any]:
  """A global batch of random values, of the data's shapes."""
  import numpy as np

  rng = np.random.default_rng(0)
  top = {"label": info.num_classes}  # of the others that are whole numbers:
  made = {}
  for name, x in experiment.example(info).items():
    shape = (c.batch_size, *x.shape[1:])
    if np.issubdtype(x.dtype, np.integer):
      made[name] = rng.integers(
        top.get(name, info.vocab_size), size=shape, dtype=x.dtype
      )
    else:
      made[name] = rng.random(shape, x.dtype)
  return made


def text(found: dict[str, Any]) -> str:
  """A line on what ran where, and time and memory below it."""
  ratio = lambda a, b: f"{a / b:.2f}" if a and b else "-"
  ms = lambda x: f"{1e3 * x:,.2f}" if x else "-"
  gb = lambda x: f"{x / 1e9:,.3f}" if x else "-"
  cells = []
  for name, unit, show in (("seconds", "ms a step", ms), ("bytes", "GB", gb)):
    predicted, real = (found[f"{k}_{name}"] for k in ("predicted", "measured"))
    cells.append((unit, show(predicted), show(real), ratio(real, predicted)))
  title = (
    f"{found['config']}, {found['method']}, {found['workers']} workers, batch "
    f"{found['batch_size']}, on {found['devices']} x {found['device']}, jax "
    f"{found['jax']}"
  )
  if found["utilisation"]:
    title += f"; {100 * found['utilisation']:.1f} % of the chip's bf16 peak"
  head = ("", "predicted", "measured", "measured / predicted")
  return f"{title}\n{table.render(head, cells, 'lrrr')}"


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
