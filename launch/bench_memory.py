r"""What XLA says that a step will hold, beside what it really allocates.

  python launch/bench_memory.py                            # a minute
  python launch/bench_memory.py --programs=llama/zero1/8 --out=memory.json

A row is a program in a fresh process: MODEL/METHOD/DEVICES, the devices
simulated on this CPU. Predicted is the compiled step's memory analysis, before
any array exists: arguments, outputs that do not reuse them, temporaries; times
the devices, which here share one memory. Real is the peak of the process's
resident memory during the steps, as Linux counts it, above what it was just
before the state was made; so the state, the batch, the kernels' own scratch and
whatever else a step takes are in it.

Memory here is what is in use. glibc keeps what a program frees, up to 32 MB
apiece, for its next request: the processes tell it to give that back, unless
`--hoard` is set. A step's temporaries go a moment after its results are ready:
the next step waits for that.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from distrain_jax import spmd
from distrain_jax.inspect import table

PROGRAMS = (
  "llama/ddp/1",
  "llama/ddp/8",
  "llama/zero1/8",
  "resnet18/ddp/1",
  "resnet18/ddp/8",
)
CHOSEN = flags.DEFINE_list(
  "programs", list(PROGRAMS), "MODEL/METHOD/DEVICES, with commas between."
)
STEPS = flags.DEFINE_integer("steps", 4, "Steps of each program.", 1)
OUT = flags.DEFINE_string("out", None, "A JSON file to write.")
HOARD = flags.DEFINE_bool("hoard", False, "Let glibc keep what is freed.")
CHILD = flags.DEFINE_bool("child", False, "Measure here; print one JSON line.")

# Some hundred MB each: 7,345,408 and 2,797,610 parameters.
OPTIONS = {
  "llama": {"embed": 256, "layers": 8, "heads": 8, "kv_heads": 8, "mlp": 704},
  "resnet18": {"width": 0.5},
}
SEQUENCES, TOKENS, IMAGES = 16, 128, 128  # of the global batch
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes; glibc's environment
PROC = Path("/proc/self")


class Measured(NamedTuple):
  """One program; bytes of the whole process."""

  program: str
  state: int  # as its shapes say, on all devices
  predicted: int
  real: int
  ratio: float  # real / predicted


def predicted(stats: Any) -> int:
  """Bytes that one device holds at most, from `compiled.memory_analysis()`.

  Not its `peak_memory_in_bytes`: on a CPU that leaves the temporaries out.
  """
  fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes  # not donated
  return stats.argument_size_in_bytes + fresh + stats.temp_size_in_bytes


def resident() -> tuple[int, int]:
  """This process's resident bytes: the peak since `forget_peak`, and now."""
  status = (PROC / "status").read_text()
  read = lambda name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024
  return read("VmHWM"), read("VmRSS")


def forget_peak() -> int:
  """Gives freed memory back, starts a new peak; resident bytes now."""
  gc.collect()
  libc = ctypes.CDLL(None)
  if hasattr(libc, "malloc_trim"):  # glibc's; others need no telling
    libc.malloc_trim(0)
  (PROC / "clear_refs").write_text("5")
  return resident()[1]


def settle() -> None:
  """Waits for the memory that a step frees after its results are ready."""
  before, now = None, resident()[1]
  while before != now:
    time.sleep(0.05)
    before, now = now, resident()[1]


def measure(program: str, steps: int) -> Measured:
  """Compiles and runs a program here; JAX must not have started."""
  model, method, devices = program.split("/")
  spmd.use_cpu_devices(int(devices))
  import jax
  import jax.numpy as jnp

  run, state, batch = build(model, method, int(devices))
  key = jax.random.key(0)
  compiled = run.step.lower(state, batch, key).compile()
  # Zeros: memory does not depend on values. Compiled before the peak begins.
  fill = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state),
    out_shardings=jax.tree.map(lambda x: x.sharding, state),
  )
  fill = fill.lower().compile()
  held = sum(shard_bytes(x) for x in jax.tree.leaves(state))
  before = forget_peak()
  state, batch = fill(), run.put(batch)
  for _ in range(steps):
    state, _ = jax.block_until_ready(compiled(state, batch, key))
    settle()
  real = resident()[0] - before
  expected = predicted(compiled.memory_analysis()) * int(devices)
  return Measured(program, held, expected, real, real / expected)


def shard_bytes(x: Any) -> int:
  """Of one array, on all devices together."""
  shard = x.sharding.shard_shape(x.shape)
  size = x.dtype.itemsize * len(x.sharding.device_set)
  for n in shard:
    size *= n
  return size


def build(model: str, method: str, devices: int):
  """The run, its abstract state and a batch of zeros."""
  import jax
  import numpy as np
  import optax

  import distrain_jax as dj

  if model == "llama":
    kind, inputs, shape = "language_model", "tokens", (SEQUENCES, TOKENS)
    batch = dict.fromkeys(("tokens", "targets"), np.zeros(shape, np.int32))
  else:
    kind, inputs, shape = "classification", "image", (IMAGES, 32, 32, 3)
    batch = {
      "image": np.zeros(shape, np.float32),
      "label": np.zeros(IMAGES, np.int32),
    }
  net = dj.models.create(model, **OPTIONS[model])
  task = dj.models.task(net, kind, batch)
  variables = dj.models.abstract(net, batch[inputs])
  loss_fn = dj.stateful(task.loss_fn) if task.stateful else task.loss_fn
  params = variables if task.stateful else variables.params
  factory = dj.methods.FACTORIES[method]
  mesh = spmd.make_mesh({"data": devices})
  run = dj.distribute(factory(loss_fn, optax.adamw(1e-3)), mesh)
  return run, run.abstract(jax.random.key(0), params), batch


def in_fresh_process(program: str, steps: int, hoard: bool) -> Measured:
  command = [sys.executable, __file__, "--child", f"--programs={program}"]
  env = {**os.environ, **({} if hoard else GIVE_BACK), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [*command, f"--steps={steps}"], env=env, capture_output=True, text=True
  )
  if done.returncode:
    raise SystemExit(f"{program} failed:\n{done.stderr}")
  return Measured(**json.loads(done.stdout.splitlines()[-1]))


def check(programs: list[str]) -> None:
  """Before any process starts."""
  from distrain_jax import methods

  if not (PROC / "clear_refs").exists():
    raise app.UsageError(
      "bench_memory reads a process's peak from Linux's /proc/self/status and "
      f"resets it through /proc/self/clear_refs; this is {sys.platform}."
    )
  for program in programs:
    model, method, devices = (*program.split("/"), "", "")[:3]
    known = model in OPTIONS and method in methods.OF_A_LOSS
    if not known or not devices.isdecimal() or program.count("/") != 2:
      raise app.UsageError(
        f"--programs: {program!r} is not MODEL/METHOD/DEVICES with a model of "
        f"{', '.join(OPTIONS)} and a method of {', '.join(methods.OF_A_LOSS)}, "
        "e.g. llama/zero1/8."
      )


def text(rows: list[Measured]) -> str:
  headers = ("program", "state MB", "predicted MB", "real MB", "ratio")
  mb = lambda n: f"{n / 1e6:,.1f}"
  cells = [(*r[:1], *map(mb, r[1:4]), f"{r.ratio:.3f}") for r in rows]
  return table.render(headers, cells, "lrrrr")


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  check(CHOSEN.value)
  if CHILD.value:
    print(json.dumps(measure(*CHOSEN.value, STEPS.value)._asdict()))
    return
  rows = []
  for program in CHOSEN.value:
    rows.append(in_fresh_process(program, STEPS.value, HOARD.value))
  print(text(rows))
  if OUT.value:
    found = {"hoard": HOARD.value, "programs": [r._asdict() for r in rows]}
    Path(OUT.value).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
