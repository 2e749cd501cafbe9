"""Outcomes of many compilations in one JSON file, so that a command goes on."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")


def compiled(
  file: Path,
  jobs: Mapping[str, Callable[[], dict[str, Any]]],
  summary: Callable[[dict[str, Any]], str],
  about: Mapping[str, Any],
) -> dict[str, Any]:
  """Does the jobs whose keys the file lacks; returns all that it then holds.

  Args:
    file: JSON; written after every job, all of it or nothing.
    jobs: key -> what does the job, and returns plain values.
    summary: (outcome) -> a line for whoever waits.
    about: kept beside the outcomes and the packages' versions.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  kept = json.loads(file.read_text()) if file.exists() else {"rows": {}}
  for i, (key, job) in enumerate(jobs.items()):
    if key in kept["rows"]:
      continue
    say(f"[{i + 1}/{len(jobs)}] {key} ...")
    began = time.perf_counter()
    kept["rows"][key] = found = job()
    say(f"  {summary(found)}, {time.perf_counter() - began:.0f} s")
    fresh = file.with_suffix(".new")
    text = json.dumps(kept | {**about, "versions": versions()}, indent=1)
    fresh.write_text(text + "\n")
    os.replace(fresh, file)
  return kept["rows"]


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
