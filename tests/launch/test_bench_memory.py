"""What the compiler predicts is what Linux sees a run allocate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "bench_memory.py"


def bench(*options):
  return subprocess.run(
    [sys.executable, str(SCRIPT), *options],
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.full
def test_a_run_allocates_what_its_compiled_step_predicts(tmp_path):
  programs, out = ["llama/ddp/1", "llama/zero1/8"], tmp_path / "memory.json"
  done = bench(f"--programs={','.join(programs)}", "--steps=2", f"--out={out}")
  assert done.returncode == 0, done.stderr
  rows = json.loads(out.read_text())["programs"]
  assert [row["program"] for row in rows] == programs
  for row, line in zip(rows, done.stdout.splitlines()[2:]):
    name, *numbers = line.split()
    state, predicted, real, ratio = (float(n.replace(",", "")) for n in numbers)
    assert name == row["program"]
    assert (state, predicted, real) == tuple(
      round(row[k] / 1e6, 1) for k in ("state", "predicted", "real")
    )
    # Below 1 something predicted was never there; the 2 to 5 % above are
    # kernels' scratch and threads, of hundreds of MB.
    assert 0.98 < ratio < 1.12
    assert abs(ratio - row["real"] / row["predicted"]) < 1e-3
    assert 0 < row["state"] < row["predicted"]
  one, eight = (row["state"] for row in rows)
  size = one / 12  # parameters, mu and nu of float32
  assert abs(eight / (8 * 4 * size + 8 * size) - 1) < 0.01


def test_a_program_that_is_not_one_is_refused_before_anything_runs():
  for program in ("llama/ddp", "llama/adam/x"):
    done = bench(f"--programs={program}")
    assert done.returncode == 1
    assert (
      f"'{program}' is not MODEL/METHOD/DEVICES" in done.stdout + done.stderr
    )
