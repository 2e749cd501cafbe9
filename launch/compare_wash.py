r"""What WASH sends and holds, beside its neighbours, as compiled.

  python launch/compare_wash.py                                  # an hour
  python launch/compare_wash.py --model=resnet50 --topology=h100:8 \
    --row=ensemble --row='WASH 0.001'

Compiles the training step of configs/fineweb_llama.py (134M) and
configs/imagenet_resnet50.py for eight members on devices that need not be
there, with the rows of launch/comparisons/wash.py. No array is made.

Writes wash_compiled.json after every compile, so that an interrupted command
goes on where it stopped; prints a table for README and whether each promise
holds. To compile anew, delete the file.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from distrain_jax import spmd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.comparisons import kept  # noqa: E402
from launch.comparisons import wash as comparison  # noqa: E402

MODELS = flags.DEFINE_list("model", list(comparison.MODELS), "Some of them.")
TOPOLOGIES = flags.DEFINE_list("topology", ["h100:8", "v5e:2x4"], "Devices.")
ROWS = flags.DEFINE_multi_string("row", None, "One of them; unset: all.")
OUT = flags.DEFINE_string("out", "results", "Folder of the file.")
SET = flags.DEFINE_list(
  "set", [], "FIELD=VALUE of the config in all rows, e.g. model.layers=2."
)


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  spmd.use_cpu_devices(1)  # what compiles is not here
  try:
    work = jobs()
  except ValueError as e:
    sys.exit(f"{type(e).__name__}: {e}")
  file = Path(OUT.value) / "wash_compiled.json"
  rows = kept.compiled(file, work, summary, {})
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for x in rows.values():
    groups.setdefault((x["of"], x["hardware"]), []).append(x)
  for (model, where), found in groups.items():
    print(f"\n{model} on {where}:\n\n{comparison.markdown(found)}\n")
    print("\n".join(comparison.claims(found)))
  print(f"\nwrote {file}")


def jobs() -> dict[str, kept.Job]:
  """The rows to compile; checked."""
  rows = {row.name: row for row in comparison.rows()}
  for name in ROWS.value or ():
    if name not in rows:
      raise ValueError(f"--row={name}: one of {', '.join(rows)}.")
  for model in MODELS.value:
    if model not in comparison.MODELS:
      known = ", ".join(comparison.MODELS)
      raise ValueError(f"--model={model}: one of {known}.")
  more = " ".join(["", *SET.value])
  return {
    f"{model} {where} {name}{more}": kept.Job(
      functools.partial(one, model, where, rows[name]),
      # Rows without what lives during the exchange are older.
      {"set": SET.value, "buffers": True},
    )
    for where in TOPOLOGIES.value
    for model in MODELS.value
    for name in ROWS.value or rows
  }


def one(model: str, where: str, row: comparison.Row) -> dict[str, Any]:
  """Compiles a row; a refusal for want of memory is an outcome as well."""
  import jax

  from distrain_jax import data, inspect
  from distrain_jax.inspect.topologies import topology
  from distrain_jax.train import experiment

  devices = topology(where).devices
  c = comparison.config(model, row, len(devices))
  c.update_from_flattened_dict(kept.overrides(SET.value))
  info = data.describe(
    c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
  ).info
  found = {"of": model, "hardware": where, "name": row.name}
  found |= {"set": SET.value, "buffers": True}
  program = experiment.program(c, info, devices)
  try:
    report = inspect.compile(
      program.run, *program.abstract(), with_buffers=True
    )
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return found | {"refused": str(e).splitlines()[0]}
  return found | comparison.measured(c, program, report)


def summary(found: dict[str, Any]) -> str:
  if "refused" in found:
    return f"refused: {found['refused']}"
  return (
    f"{found['wire_bytes'] / 1e6:.3f} MB sent, temporaries "
    f"{found['memory']['temporaries'] / 1e6:.0f} MB"
  )


if __name__ == "__main__":
  app.run(main)
