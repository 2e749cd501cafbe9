"""The benchmark predicts a config's step and takes it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "bench_step.py"
CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}"


def bench(*options):
  command = [sys.executable, str(SCRIPT), *options]
  return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_prints_and_keeps_what_was_predicted_and_measured(tmp_path):
  out = tmp_path / "step.json"
  few = ["--rounds=2", "--steps=1", "--devices=2", f"--out={out}"]
  done = bench(CONFIG, *few, "--config.method.name=zero1")
  assert done.returncode == 0, done.stderr
  title, _, _, ms, gb = done.stdout.splitlines()
  assert "zero1, 2 workers, batch 128, on 2 x cpu" in title
  found = json.loads(out.read_text())
  assert len(found["rounds_seconds"]) == 2
  assert min(found["rounds_seconds"]) > 0
  seconds = found["measured_seconds"]
  assert ms.split() == ["ms", "a", "step", "-", f"{1e3 * seconds:,.2f}", "-"]
  # A worker's arguments alone: parameters, and a half of two moments.
  assert found["predicted_bytes"] > 26_122 * 4 * 2
  assert found["measured_bytes"] is None and gb.split()[2:] == ["-", "-"]


def test_a_config_that_cannot_be_is_refused_by_its_own_message():
  done = bench(CONFIG, "--devices=3")
  assert done.returncode == 1
  assert "ValueError: config.batch_size=128 is the global" in done.stderr
