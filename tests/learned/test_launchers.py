"""Meta-training and the benchmark, as they are started."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from distrain_jax import learned

ROOT = Path(__file__).resolve().parents[2]

# Twice in one process, which compiles once: the second goes on from the end.
TWICE = """
import sys
from pathlib import Path
from absl import flags
from distrain_jax import spmd
spmd.use_cpu_devices(2)
from launch import meta_train
flags.FLAGS(sys.argv)
for _ in range(2):
  meta_train.train_theta(meta_train.CONFIG.value, Path("run"))
"""


def python(*command, cwd):
  command = [sys.executable, "-W", "ignore", *command]
  env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
  env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  return subprocess.run(
    command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300
  )


def test_meta_training_saves_draws_and_goes_on(tmp_path):
  config = f"--config={ROOT}/configs/mulo/tiny.py:quick"
  done = python("-c", TWICE, config, "--workdir=run", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("2/2 meta-loss") == 1
  assert done.stdout.count("theta: run/theta.safetensors") == 2
  theta, metadata = learned.load_theta(tmp_path / "run" / "theta.safetensors")
  assert metadata["meta_steps"] == "2" and metadata["mup"] == "absolute"
  assert all(np.isfinite(x).all() for x in theta.values())
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  (line,) = map(json.loads, lines)
  assert line["step"] == 2 and line["losses"].keys() == {"teacher_32"}
  png = (tmp_path / "run" / "meta_loss.png").read_bytes()
  assert png[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["cpu", "cpu:sp", "paper", "paper:s"])
def test_configs_have_the_fields_of_the_tiny_one(name):
  code = (
    "import importlib, sys; file, _, arg = sys.argv[1].partition(':');"
    "get = lambda m: importlib.import_module(f'configs.mulo.{m}').get_config;"
    "c, tiny = get(file)(arg or None), get('tiny')();"
    "assert c.keys() == tiny.keys();"
    "print(len(c.tasks), c.mup, c.pairs, c.truncation)"
  )
  done = python("-c", code, name, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  wanted = {
    "cpu": "4 True 4 20",
    "cpu:sp": "4 False 4 20",
    "paper": "3 True 8 50",
    "paper:s": "1 True 8 50",
  }
  assert done.stdout.strip() == wanted[name]


def test_the_benchmark_prints_every_form_beside_adamw():
  script = str(ROOT / "launch" / "bench_optimizer.py")
  done = python(script, "--sizes=8", "--rounds=2", "--cpu", cwd=ROOT)
  assert done.returncode == 0, done.stderr
  _, head, _, *lines = done.stdout.splitlines()
  assert head.split()[:2] == ["leaf", "form"]
  rows = [line.split() for line in lines[:5]]
  forms = ["adamw", "tiled", "16-input", "39-input", "un-fused"]
  assert [row[3] for row in rows] == forms
  assert all(float(row[4]) > 0 for row in rows)
  assert rows[0][5] == "1.0" and rows[-1][6] == "1.00"
  assert sum("h100" in line for line in lines) == 4


@pytest.mark.full
def test_meta_testing_writes_a_table_of_all_optimizers(tmp_path):
  theta = learned.init_theta(jax.random.key(0))
  learned.save_theta(tmp_path / "theta", theta, {"step_mult": "0.01"})
  script = str(ROOT / "launch" / "meta_test.py")
  options = ["--theta=theta", "--twin=theta", "--steps=4", "--seeds=2"]
  options += ["--task=MLP, teacher", "--out=."]
  done = python(script, *options, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "mulo.json").read_text())
  (row,) = found["results"].values()
  learned_ones = {"mulo", "lo_sp"}
  tuned = {f"{n}, tuned" for n in ("adamw", "mup_adamw", "sgd")}
  assert learned_ones | tuned <= row["losses"].keys()
  assert all(len(row["losses"][name]) == 2 for name in learned_ones | tuned)
  assert "| MLP, teacher | data |" in done.stdout


def test_sizes_that_are_none_are_refused():
  script = str(ROOT / "launch" / "bench_optimizer.py")
  done = python(script, "--sizes=64,x", cwd=ROOT)
  assert done.returncode == 1
  assert "--sizes=64,x: whole numbers" in done.stdout + done.stderr
