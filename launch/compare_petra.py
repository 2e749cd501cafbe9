r"""PETRA's memory, messages and compute beside its rivals', as compiled.

  python launch/compare_petra.py                               # two hours
  python launch/compare_petra.py --network='rev_llama 134M' \
    --topology=h100:8 --row=PETRA --row='1F1B, inputs kept'

Compiles training steps for devices that need not be there, one a stage: the
rows of launch/comparisons/petra.py, PETRA with what each of its buffers keeps,
1F1B, GPipe and the synchronous reversible pipeline with 32 micro-batches a step;
for a chain of 8 equal stages, and two of them of 16 and 32; for a reversible
Llama of 134M parameters; and for a RevNet-50 on ImageNet. No array is made.

Writes petra_compiled.json after every compile, so that an interrupted command
goes on where it stopped, and petra_compiled.png; prints tables for README. To
compile anew, delete the file.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from distrain_jax import spmd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.comparisons import kept, petra_tables  # noqa: E402
from launch.comparisons import petra as comparison  # noqa: E402

NETWORKS = flags.DEFINE_multi_string("network", None, "One; unset: all.")
TOPOLOGIES = flags.DEFINE_list("topology", [], "E.g. v5e:2x4,h100:8.")
ROWS = flags.DEFINE_multi_string("row", None, "One of them; unset: all.")
OUT = flags.DEFINE_string("out", "results", "Folder of the files.")
SET = flags.DEFINE_list(
  "set", [], "FIELD=VALUE of the config in all rows, e.g. model.layers=2."
)

DEFAULT = (
  ("chain", "v5e:2x4"),
  ("chain", "v5e:4x4"),
  ("chain", "v5e:4x8"),
  ("chain", "h100:8"),
  ("chain", "h100:2x8"),
  ("chain", "h100:4x8"),
  ("rev_llama 134M", "v5e:2x4"),
  ("rev_llama 134M", "h100:8"),
  ("revnet50", "h100:8"),
  ("revnet50", "v5e:2x4"),
)
FORWARD = "forward"  # the row of one stage's pass


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  spmd.use_cpu_devices(1)  # what compiles is not here
  try:
    work = jobs()
  except ValueError as e:
    sys.exit(f"{type(e).__name__}: {e}")
  folder = Path(OUT.value)
  rows = kept.compiled(folder / "petra_compiled.json", work, summary, {})
  petra_tables.show(folder, list(rows.values()))


def jobs() -> dict[str, kept.Job]:
  """The rows to compile, checked; a forward pass first, of equal stages."""
  from distrain_jax.inspect.topologies import topology

  for name in NETWORKS.value or ():
    if name not in comparison.NETWORKS:
      known = ", ".join(comparison.NETWORKS)
      raise ValueError(f"--network={name}: one of {known}.")
  chosen = NETWORKS.value or list(comparison.NETWORKS)
  pairs = [pair for pair in DEFAULT if pair[0] in chosen]
  if TOPOLOGIES.value:
    pairs = [(network, t) for t in TOPOLOGIES.value for network in chosen]
  found = {}
  for network, where in pairs:
    count = len(topology(where).devices)
    rows = {r.name: r for r in comparison.rows(network, count)}
    if comparison.equal_stages(network):
      forward = next(iter(rows.values()))._replace(name=FORWARD)
      found |= job(network, where, forward)
    for name in ROWS.value or rows:
      if name not in rows:
        raise ValueError(f"--row={name}: one of {', '.join(rows)}.")
      found |= job(network, where, rows[name])
  return found


def job(network: str, where: str, row: comparison.Row) -> dict[str, kept.Job]:
  do = functools.partial(one, network, where, row)
  return {f"{network} {where} {row.name}": kept.Job(do, {"set": SET.value})}


def one(network: str, where: str, row: comparison.Row) -> dict[str, Any]:
  """Compiles a row; a refusal is an outcome as well."""
  import jax

  from distrain_jax import data
  from distrain_jax.inspect.topologies import topology

  found = {"network": network, "hardware": where, "name": row.name}
  found["set"] = SET.value
  given = kept.overrides(SET.value)
  devices = topology(where).devices
  c = comparison.config(network, row, len(devices), given)
  sizes = {name: c.model.get(name) for name in ("vocab", "classes")}
  built = comparison.build(c, data.describe(c.data, **sizes).info, devices)
  try:
    if row.name == FORWARD:
      return found | {"flops": comparison.forward(built).flops}
    began = time.perf_counter()
    report = comparison.compile(built)
    seconds = round(time.perf_counter() - began, 1)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return found | {"refused": petra_tables.no_room(str(e))}
  measured = comparison.measured(built, row, report)
  return found | measured | {"compile_seconds": seconds}


def summary(found: dict[str, Any]) -> str:
  if "refused" in found:
    return f"refused: {found['refused']}"
  if "flops" in found:
    return f"{found['flops'] / 1e9:.1f} GFLOP forward"
  return (
    f"peak {found['peak'] / 1e9:.2f} GB, "
    f"{found['flops_a_tick'] / 1e9:.1f} GFLOP a tick"
  )


if __name__ == "__main__":
  app.run(main)
