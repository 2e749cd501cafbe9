"""The benchmark runs, and prints every method beside independent training."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "bench_wash.py"
SMALL = ["--model=mlp", "--rounds=2", "--steps=1", "--rows=2", "--width=0.1"]


@pytest.mark.full
def test_prints_every_method_as_a_ratio_to_independent_training():
  done = subprocess.run(
    [sys.executable, str(SCRIPT), *SMALL],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  names = [
    line.rsplit("  ", 1)[0].split("  ")[0].strip() for line in lines[2:7]
  ]
  assert names[0] == "independent" and lines[2].split()[2] == "1.000"
  assert names[1:3] == ["wash, rate 0.01", "wash and optimizer, rate 0.01"]
  assert "mlp of width 0.1, 2 members of 2 images a step, 2 rounds" in lines[-1]
