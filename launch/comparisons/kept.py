"""Outcomes of many compilations in one JSON file, so that a command goes on."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")


class Job(NamedTuple):
  do: Callable[[], dict[str, Any]]  # returns plain values
  # What its outcome will hold; one that holds other values is done again.
  settings: dict[str, Any]


def compiled(
  file: Path,
  jobs: Mapping[str, Job],
  summary: Callable[[dict[str, Any]], str],
  about: Mapping[str, Any],
) -> dict[str, Any]:
  """Does the jobs that the file lacks; returns all outcomes it then holds.

  Args:
    file: JSON; written after every job, all of it or nothing.
    jobs: by the key of their outcome.
    summary: (outcome) -> a line for whoever waits.
    about: kept beside the outcomes and the packages' versions.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  kept = json.loads(file.read_text()) if file.exists() else {"rows": {}}
  for i, (key, job) in enumerate(jobs.items()):
    old = kept["rows"].get(key)
    if old is not None and {**old, **job.settings} == old:
      continue
    say(f"[{i + 1}/{len(jobs)}] {key} ...")
    began = time.perf_counter()
    kept["rows"][key] = found = job.do()
    say(f"  {summary(found)}, {time.perf_counter() - began:.0f} s")
    fresh = file.with_suffix(".new")
    text = json.dumps(kept | {**about, "versions": versions()}, indent=1)
    fresh.write_text(text + "\n")
    os.replace(fresh, file)
  return kept["rows"]


def overrides(given: list[str]) -> dict[str, Any]:
  """Of FIELD=VALUE each; whole numbers become numbers."""
  pairs = (item.split("=", 1) for item in given)
  return {k: int(v) if v.isdecimal() else v for k, v in pairs}


def versions() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = version(name)
    except PackageNotFoundError:
      continue
  return found


def say(text: str) -> None:
  """Progress, beside the result."""
  print(text, file=sys.stderr, flush=True)
