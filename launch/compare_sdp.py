r"""What SDP saves of memory, compute and traffic, beside its rivals, as compiled.

  python launch/compare_sdp.py                                   # two hours
  python launch/compare_sdp.py --preset=134M,1B --topology=v5e:2x4,h100:8
  python launch/compare_sdp.py --preset=134M --topology=h100:8 \
    --row=DDP --row='SDP neuron 1/2'

Compiles the training step of configs/fineweb_llama.py for eight devices that
need not be there, with the rows of launch/comparisons/sdp.py: SDP at both
levels and four coverages, DDP with and without recomputation, with dropout and
with stochastic depth, ZeRO-1, FSDP, and dense models as small as a subnetwork.
One micro-batch a step; everything else as in the config. No array is made.

Writes sdp_compiled.json after every compile, so that an interrupted command
goes on where it stopped, and sdp_compiled.png; prints a table for README and
whether each promise holds. To compile anew, delete the file.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from distrain_jax import spmd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.comparisons import kept, sdp_claims, sdp_picture  # noqa: E402
from launch.comparisons import sdp as comparison  # noqa: E402

PRESETS = flags.DEFINE_list("preset", [], "Of the config: 134M, 500M, 1B.")
TOPOLOGIES = flags.DEFINE_list("topology", [], "E.g. v5e:2x4,h100:8.")
BATCH = flags.DEFINE_integer("batch", 1, "Rows of a worker and step.", 1)
ROWS = flags.DEFINE_multi_string("row", None, "One of them; unset: all.")
OUT = flags.DEFINE_string("out", "results", "Folder of the files.")
SET = flags.DEFINE_list(
  "set", [], "FIELD=VALUE of the config in all rows, e.g. model.layers=2."
)

# Where one worker's DDP fits: 1B needs more than the 16 GiB of a v5e.
DEFAULT = (
  ("134M", "h100:8"),
  ("1B", "h100:8"),
  ("134M", "v5e:2x4"),
  ("1B", "v5p:2x2x2"),
)
CONFIG = ROOT / "configs" / "fineweb_llama.py"


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
  file = folder / "sdp_compiled.json"
  about = {"config": "configs/fineweb_llama.py"}
  show(folder, kept.compiled(file, work, summary, about))


def jobs() -> dict[str, kept.Job]:
  """The rows to compile, checked; the baselines first."""
  from distrain_jax.inspect.topologies import topology

  pairs = list(DEFAULT)
  if PRESETS.value or TOPOLOGIES.value:
    presets = PRESETS.value or ["134M", "1B"]
    places = TOPOLOGIES.value or ["v5e:2x4", "h100:8"]
    pairs = [(p, t) for t in places for p in presets]
  found = {}
  for preset, where in pairs:
    c = config(preset, {})
    workers = len(topology(where).devices)
    rows = {r.name: r for r in comparison.rows(c, workers, BATCH.value)}
    for name in ROWS.value or rows:
      if name not in rows:
        raise ValueError(f"--row={name}: one of {', '.join(rows)}.")
      row = rows[name]
      do = functools.partial(one, preset, where, row)
      found[f"{preset} {where} {name}"] = kept.Job(do, told(row))
  return found


def told(row: comparison.Row) -> dict[str, Any]:
  return {**row.told(), "set": SET.value}


def config(preset: str, changes: dict[str, Any]) -> ConfigDict:
  """The config's own, but for one micro-batch, --set and the changes."""
  spec = importlib.util.spec_from_file_location("fineweb_llama", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(preset)
  with c.unlocked():  # config.loss has what its task's loss has
    c.update_from_flattened_dict({**kept.overrides(SET.value), **changes})
  return c


def one(preset: str, where: str, row: comparison.Row) -> dict[str, Any]:
  """Compiles a row; a refusal is an outcome as well."""
  import jax

  from distrain_jax import data, inspect
  from distrain_jax.inspect.topologies import topology
  from distrain_jax.train import experiment

  c = config(preset, row.changes)
  info = data.describe(c.data, vocab=c.model.get("vocab")).info
  found = {"preset": preset, "hardware": where, **told(row)}
  try:
    program = experiment.program(c, info, topology(where).devices)
    report = inspect.compile(program.run, *program.abstract())
  except ValueError as e:
    return found | {"refused": str(e).splitlines()[0]}
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return found | {"refused": sdp_claims.no_room(str(e))}
  return found | comparison.measured(c, program, report)


def summary(found: dict[str, Any]) -> str:
  if "refused" in found:
    return f"refused: {found['refused']}"
  return (
    f"peak {found['peak'] / 1e9:.2f} GB, {found['flops'] / 1e12:.3f} TFLOP, "
    f"{found['wire'] / 1e6:.0f} MB sent"
  )


def show(folder: Path, rows: dict[str, Any]) -> None:
  """Tables and claims of all that is kept, and the picture."""
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for x in rows.values():
    groups.setdefault((x["preset"], x["hardware"]), []).append(x)
  for (preset, where), found in groups.items():
    print(f"\nLlama {preset} on {where}:\n")
    print(sdp_claims.markdown(found))
    print()
    for sentence in sdp_claims.claims(preset, found):
      print(sentence)
  drawn = sdp_picture.save(groups, folder / "sdp_compiled.png")
  print(f"\nwrote {folder}/sdp_compiled.json{' and .png' if drawn else ''}")


if __name__ == "__main__":
  app.run(main)
