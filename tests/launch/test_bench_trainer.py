"""The benchmark runs, and prints its three rows in one table."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "bench_trainer.py"


def test_prints_step_trainer_and_loader_side_by_side():
  command = [sys.executable, str(SCRIPT), "--devices=2", "--rounds=2"]
  command += ["--steps=3", f"--config={ROOT}/configs/digits.py"]
  command += ["--config.compilation_cache="]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  head, *lines = done.stdout.splitlines()
  assert "2 cpu devices" in head and "2 rounds of 3 steps" in head
  rows = {line[:12].strip(): line[12:].split() for line in lines[2:]}
  assert list(rows) == ["bare step", "trainer", "data loader"]
  for row in rows.values():
    best, median, *rest = map(float, row)
    assert 0 < best <= median and len(rest) == 4
  for ratio in (2, 3, 5):
    assert rows["bare step"][ratio] == "1.0000"
