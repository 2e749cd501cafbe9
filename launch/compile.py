r"""What a config's training step will cost, on hardware that need not be there.

  python launch/compile.py --config=configs/text.py --topology=v5e:2x4
  python launch/compile.py --config=configs/fineweb_llama.py:134M \
    --topology=v5e:2x4,h100:8 --compare=ddp,zero1
  python launch/compile.py --config=configs/digits.py --devices=8

Compiles the step that launch/train.py would run, for devices that pip's
'distrain-jax[aot]' has compilers of, or for simulated CPU devices. The data
need not be there either: what neither its metadata nor the config say is
assumed, and told. Prints a report, or a row per method, and writes both with a
picture: report.json, report.png. Methods are compared on the same rows in the
same micro-batches: config.method.accumulate is that of the config's own method.
"""

import importlib.metadata
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from distrain_jax import data, inspect, methods, spmd
from distrain_jax.inspect import advisor, picture, report
from distrain_jax.inspect.topologies import topology
from distrain_jax.train import config as configs
from distrain_jax.train import experiment
from distrain_jax.train.flags import parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py")
TOPOLOGY = flags.DEFINE_list(
  "topology", [], "Devices to compile for, e.g. v5e:2x4 or v5e:16x16,h100:8."
)
DEVICES = flags.DEFINE_integer(
  "devices", None, "Instead: so many simulated CPU devices; no times then.", 1
)
COMPARE = flags.DEFINE_list(
  "compare", [], "Methods in place of the config's, e.g. ddp,zero1."
)
OUT = flags.DEFINE_string(
  "out", None, "Folder of the files; unset: runs/compile/CONFIG-TOPOLOGY."
)
flags.mark_flags_as_required(["config"])

PACKAGES = ("distrain-jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin")


class Job(NamedTuple):
  """One program to compile."""

  method: str
  hardware: str
  program: experiment.Program
  micro_batches: int  # of a worker and step


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  c = CONFIG.value
  if bool(TOPOLOGY.value) == (DEVICES.value is not None):
    raise app.UsageError(
      "say what to compile for: --topology=v5e:2x4 (several with commas), or "
      "--devices=8 simulated CPU devices; one of the two."
    )
  spmd.use_cpu_devices(DEVICES.value or 1)  # a TPU here is left in peace
  try:
    told = data.describe(
      c.data, vocab=c.model.get("vocab"), classes=c.model.get("classes")
    )
    work = jobs(c, told.info)
  except (ValueError, ImportError, FileNotFoundError) as e:
    sys.exit(f"{type(e).__name__}: {e}")
  outcomes = [one(job, i, len(work)) for i, job in enumerate(work)]
  show(c, work, outcomes, told.assumed)
  folder = Path(OUT.value or Path("runs/compile", default_name()))
  keep(folder, c, work, outcomes, told)


def jobs(c: ConfigDict, info: data.Info) -> list[Job]:
  """Every topology with every method, checked; nothing is compiled yet."""
  names = list(dict.fromkeys(COMPARE.value)) or [c.method.name]
  for name in names:
    if name not in methods.FACTORIES:
      raise ValueError(
        f"--compare: {name!r} is no method. "
        + configs.suggest(name, methods.FACTORIES)
      )
  micro, found = micro_batches(c, names), []
  for hardware in dict.fromkeys(TOPOLOGY.value or [None]):
    devices = topology(hardware).devices if hardware else None
    for name in names:
      own = by_method(c, name, micro) if COMPARE.value else c
      program = experiment.program(own, info, devices)
      where = hardware or f"cpu:{DEVICES.value}"
      if own.simulate:
        where = f"one of {where}, {own.simulate} simulated"
      found.append(Job(name, where, program, micro))
  return found


def micro_batches(c: ConfigDict, names: list[str]) -> int:
  """How many every method makes of a worker's rows.

  As many as the config's own method, if those of several halves can as well.
  """
  accumulate = c.method.get("accumulate") or 1
  return math.lcm(accumulate * halves(c.method.name), *map(halves, names))


def halves(name: str) -> int:
  return methods.HALVES.get(name, 1)


def by_method(c: ConfigDict, name: str, micro: int) -> ConfigDict:
  """The same config with another method, less the options it has not."""
  c = c.copy_and_resolve_references()
  accumulate = micro // halves(name)
  if accumulate != (c.method.get("accumulate") or 1):
    say(f"{name} with accumulate={accumulate}: {micro} micro-batches, as all")
  c.method.accumulate = accumulate
  c.method.name = name
  valid = configs.options_of(methods.FACTORIES[name])
  for option, value in c.method.items():
    if option not in ("name", *valid) and value is not None:
      say(f"{name} has no option {option}: compared without it")
      c.method[option] = None
  return c


def one(job: Job, i: int, total: int) -> inspect.Report | advisor.Refusal:
  """Compiles a program; a compiler that refuses is an outcome as well."""
  import jax

  say(f"[{i + 1}/{total}] compiling {job.method} for {job.hardware} ...")
  started = time.perf_counter()
  try:
    found = inspect.compile(job.program.run, *job.program.abstract())
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    say(f"[{i + 1}/{total}] no room")
    return advisor.Refusal(job.method, job.hardware, first_line(e))
  say(f"[{i + 1}/{total}] done in {time.perf_counter() - started:.0f} s")
  return found._replace(hardware=job.hardware)


def show(c: ConfigDict, work: list[Job], outcomes, assumed) -> None:
  """What the command is for, on the terminal."""
  reports = [x for x in outcomes if isinstance(x, inspect.Report)]
  if len(outcomes) == len(reports) == 1:
    print(reports[0])
  else:
    print(f"{source()}, global batch {c.batch_size}. {cut(c, work)}")
    print("Per device:\n")
    print(advisor.compare(outcomes))
    chips = {r.chip.name: r.chip for r in reports if r.chip}
    for chip in chips.values():
      print(f"\n{report.assumptions(chip)}")
  for sentence in assumed:
    print(f"\nAssumed: {sentence}.")


def cut(c: ConfigDict, work: list[Job]) -> str:
  """What all programs have in common, in words."""
  micro, names = work[0].micro_batches, dict.fromkeys(x.method for x in work)
  workers = {x.hardware: x.program.run.workers for x in work}
  sizes = (
    f"{micro} of {c.batch_size // (n * micro)} rows on {hardware}"
    for hardware, n in workers.items()
  )
  parts = (
    f"; {name}: {micro // halves(name)} in each half"
    for name in names
    if halves(name) > 1
  )
  return f"A worker's micro-batches a step: {', '.join(sizes)}{''.join(parts)}."


def keep(folder: Path, c: ConfigDict, work, outcomes, told) -> None:
  """report.json and report.png."""
  folder.mkdir(parents=True, exist_ok=True)
  kept = {
    "config_file": source(),
    "config": json.loads(c.to_json_best_effort()),
    "data": told.info._asdict(),
    "assumed": told.assumed,
    "micro_batches": work[0].micro_batches,
    "versions": versions(),
    "reports": [x.to_json() for x in outcomes],
  }
  (folder / "report.json").write_text(json.dumps(kept, indent=2) + "\n")
  print(f"\nreport: {folder}/report.json")
  reports = [x for x in outcomes if isinstance(x, inspect.Report)]
  if reports:
    picture.save(reports, folder / "report.png", title=title(c))
    print(f"picture: {folder}/report.png")


def title(c: ConfigDict) -> str:
  return f"One training step of {source()}, global batch {c.batch_size}"


def source() -> str:
  """configs/NAME.py[:argument], as given."""
  return config_flags.get_config_filename(flags.FLAGS["config"])


def default_name() -> str:
  """fineweb_llama-134M-v5e-2x4, of config and topologies."""
  file, _, argument = source().partition(".py")
  devices = [] if DEVICES.value is None else [f"cpu:{DEVICES.value}"]
  parts = [Path(file).name, argument.lstrip(":"), *TOPOLOGY.value, *devices]
  return re.sub(r"[^\w.]+", "-", "-".join(filter(None, parts)))


def versions() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def first_line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return lines[0].removeprefix("RESOURCE_EXHAUSTED: ")


def say(text: str) -> None:
  """Progress, beside the result."""
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
