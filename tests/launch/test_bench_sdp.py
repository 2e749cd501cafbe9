"""The benchmark runs, and prints every case beside the dense step."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "bench_sdp.py"
SMALL = ["--rounds=2", "--steps=1", "--rows=2", "--tokens=16", "--embed=32"]


def bench(*options):
  command = [sys.executable, str(SCRIPT), *options]
  return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_prints_every_level_and_coverage_as_a_ratio_to_the_dense_step():
  done = bench(*SMALL)
  assert done.returncode == 0, done.stderr
  head, *lines = done.stdout.splitlines()
  assert "One worker of 8" in head and "2 rounds of 1 steps" in head
  rows = [line.split() for line in lines[2:]]
  cases = [
    (level, c) for level in ("neuron", "block") for c in ["3/4", "1/2", "1/4"]
  ]
  assert [tuple(row[:2]) for row in rows] == [("dense", "1"), *cases]
  assert rows[0][3:] == ["1.000", "1.000"]
  for row in rows:
    ms, ratio, wanted = map(float, row[2:])
    assert ms > 0 and ratio > 0
    # All but the output layer shrinks with the coverage.
    numerator, _, denominator = row[1].partition("/")
    assert wanted >= int(numerator) / int(denominator or 1)


def test_a_depth_that_workers_cannot_share_is_refused():
  done = bench("--layers=6")
  assert done.returncode == 1
  assert "--layers=6: a multiple of the 8 workers" in done.stdout + done.stderr
