r"""Time and memory of one update of the learned optimizer, beside others.

  python launch/bench_optimizer.py                        # two minutes
  python launch/bench_optimizer.py --sizes=512,2048 --rounds=5
  python launch/bench_optimizer.py --sizes=1024,4096 --calls=20  # a GPU or TPU

One parameter of size x size, float32. Rounds take every form in turn, so that
whatever else the machine does falls on all of them: compare the ratios. Forms:

  adamw      optax.adamw, compiled
  tiled      mulo's default: 16 inputs an element, tile after tile
  kernel     the same with the Pallas kernel, on TPUs and GPUs from Hopper on
  16-input   the same over the whole parameter at once
  39-input   the rule as it is written down, compiled
  un-fused   the rule as it is written down, operation after operation

`off` is how far an update is from that of the rule as it is written down, the
largest difference over the largest element. `temporaries` are the compiler's,
beside parameter, gradient and state. Below is
what the chips' peaks allow at best, of matrix products those at JAX's default
precision (TF32, bfloat16), of the H100's kernel, which takes no matrix products
but exact float32, the instructions that it issues: a model, nothing that was
measured.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import app, flags

from distrain_jax import spmd
from distrain_jax.inspect import hardware, table

SIZES = flags.DEFINE_list("sizes", ["64", "256", "1024", "2048"], "Of a side.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often each is timed.", 1)
CALLS = flags.DEFINE_integer(
  "calls", 1, "Updates in a round, of each: on an accelerator 20, say.", 1
)
TILE = flags.DEFINE_integer("tile", None, "Elements of a tile; unset: mulo's.")
CPU = flags.DEFINE_bool("cpu", False, "On the CPU, whatever else is there.")

# float32 an element. adamw: 4 arrays read, 3 written. mulo: the gradient, for
# its rows' and columns' squares; 6 arrays (parameter, gradient, 4 averages) for
# the sizes of the features, 4 averages written; the 6 again, the update.
BYTES = {"adamw": 4 * (4 + 3), "mulo": 4 * (1 + (6 + 4) + (6 + 1))}
FLOPS = {"39-input": 2 * (39 * 32 + 32 * 32 + 32 * 2)}
FLOPS["16-input"] = 2 * (16 * 32 + 32 * 32 + 32 * 2)
CHIPS = ("h100", "v5e")
# Instructions of the GPU's kernel, an element, where a thread has 4 of a row:
# a first unit's 257 for all 32, and 736 more, as its machine code (sm_90a, CUDA
# 12.9) has them. Of each its 132 processors issues 128 a cycle, at 1.98 GHz.
KERNEL = {"h100": (32 * 257 + 736) / 4 / (132 * 128 * 1.98e9)}


class Form(NamedTuple):
  """A way to make one update."""

  go: Callable[[], Any]
  temporaries: int | None  # bytes; None: not one program
  off: float | None = None  # from the rule as it is written down


def forms(size: int) -> dict[str, Form]:
  """Every form for one parameter, compiled and run once."""
  import jax
  import optax

  from distrain_jax import learned

  theta = learned.init_theta(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1))
  param, grad = (jax.random.normal(k, (size, size)) for k in keys)
  tile = {} if TILE.value is None else {"tile": TILE.value}
  found = {
    "adamw": optax.adamw(1e-3),
    "tiled": learned.mulo(theta, **tile),
    "kernel": learned.mulo(theta, implementation="pallas", **tile),
    "16-input": learned.mulo(theta, tile=size * size),
    "39-input": learned.mulo(theta, implementation="reference"),
  }
  if jax.default_backend() == "cpu":
    del found["kernel"]  # it is the tiled form there
  made = {name: _compiled(tx, grad, param) for name, tx in found.items()}
  slow = found["39-input"]
  state = slow.init(param)
  made["un-fused"] = Form(lambda: slow.update(grad, state, param), None)
  wanted, _ = made["39-input"].go()
  for name, form in made.items():
    own, _ = jax.block_until_ready(form.go())
    if name != "adamw":
      off = abs(own - wanted).max() / abs(wanted).max()
      made[name] = form._replace(off=float(off))
  return made


def _compiled(tx, grad, param) -> Form:
  import jax

  state = tx.init(param)
  program = jax.jit(tx.update).lower(grad, state, param).compile()
  size = program.memory_analysis().temp_size_in_bytes
  return Form(lambda: program(grad, state, param), size)


def measure(
  made: dict[str, Form], rounds: int, calls: int
) -> dict[str, list[float]]:
  """Seconds an update of each form, round after round."""
  import jax

  times: dict[str, list[float]] = {name: [] for name in made}
  for _ in range(rounds):
    for name, form in made.items():
      began = time.perf_counter()
      often = 1 if form.temporaries is None else calls  # un-fused: slow
      for _ in range(often):
        found = form.go()
      jax.block_until_ready(found)
      times[name].append((time.perf_counter() - began) / often)
  return times


def rows(size: int, made: dict[str, Form], times) -> list[tuple[str, ...]]:
  """The table's lines of one size; ratios are medians over the rounds."""
  found = []
  for name, form in made.items():
    pairs = list(zip(times[name], times["adamw"], times["un-fused"]))
    ns = statistics.median(times[name]) / size**2 * 1e9
    slower = statistics.median(own / adamw for own, adamw, _ in pairs)
    faster = statistics.median(slow / own for own, _, slow in pairs)
    memory = "-"
    if form.temporaries is not None:
      memory = f"{form.temporaries / size**2:.1f}"
    found.append(
      (
        f"{size} x {size}",
        name,
        f"{ns:.2f}",
        f"{slower:.1f}",
        f"{faster:.2f}",
        "-" if form.off is None else f"{form.off:.0e}",
        memory,
      )
    )
  return found


def roofline() -> list[tuple[str, ...]]:
  """What each chip needs at best, picoseconds an element."""
  found = []
  for name in CHIPS:
    chip = hardware.CHIPS[name]
    moved = {k: b / chip.memory_bandwidth * 1e12 for k, b in BYTES.items()}
    found.append((name, "adamw", f"{moved['adamw']:.1f}", "-", "memory"))
    for form, flops in FLOPS.items():
      computed = flops / chip.peak("f32") * 1e12
      bound = "memory" if moved["mulo"] > computed else "products"
      found.append(
        (name, form, f"{moved['mulo']:.1f}", f"{computed:.1f}", bound)
      )
    if name in KERNEL:
      issued = KERNEL[name] * 1e12
      bound = "memory" if moved["mulo"] > issued else "instructions"
      found.append(
        (name, "kernel", f"{moved['mulo']:.1f}", f"{issued:.1f}", bound)
      )
  return found


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  try:
    sizes = [int(x) for x in SIZES.value]
  except ValueError:
    sizes = []
  if not sizes or min(sizes) < 1:
    raise app.UsageError(
      f"--sizes={','.join(SIZES.value)}: whole numbers, e.g. --sizes=64,512."
    )
  if CPU.value:
    spmd.use_cpu_devices(1)
  import jax

  print(
    f"One update on one {jax.devices()[0].device_kind}, {ROUNDS.value} rounds, "
    f"jax {jax.__version__}"
  )
  lines = []
  for size in sizes:
    made = forms(size)
    lines += rows(size, made, measure(made, ROUNDS.value, CALLS.value))
  head = ("leaf", "form", "ns/element", "x adamw", "faster than un-fused")
  print(table.render([*head, "off", "temporaries B/element"], lines))
  print("\nAt best, ps an element:")
  head = ("chip", "form", "memory", "computing", "bound by")
  print(table.render(head, roofline()))


if __name__ == "__main__":
  app.run(main)
