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
  assert metadata["update_norm"] == metadata["eps_scaling"] == ""
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


def test_options_of_the_rule_are_the_configs_and_kept():
  code = """
from configs.mulo import tiny, velo
from launch import meta_train
c = tiny.get_config("quick")
c.update_norm, c.eps_scaling = "rms", "fan_in"
rule, _ = meta_train.architecture(c)
print(rule.update_norm, rule.eps_scaling)
kept = meta_train.about(c, 1)
print(kept["update_norm"], kept["eps_scaling"])
rule, _ = meta_train.architecture(tiny.get_config())
print(rule.update_norm, rule.eps_scaling)
c = velo.get_config()
print(meta_train.about(c, 1)["param_scale_mult"], "update_norm" in kept)
for c, value in (c, "rms"), (tiny.get_config(), "l2"):
  c.update_norm = value
  try:
    meta_train.architecture(c)
  except ValueError as e:
    print(e)
"""
  done = python("-c", code, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  *lines, of_velo, unknown = done.stdout.splitlines()
  assert lines == ["rms fan_in", "rms fan_in", "None None", "False True"]
  says = "config.update_norm='{}' is '' or, of small_fc alone, rms."
  assert [of_velo, unknown] == [says.format("rms"), says.format("l2")]


def test_meta_testing_refuses_what_does_not_fit_and_loses_nothing(tmp_path):
  key = jax.random.key(0)
  theta = learned.init_theta(key)
  for name, mup in (("with", "absolute"), ("without", "none")):
    more = {"step_mult": "0.5", "update_norm": "rms"} if mup == "none" else {}
    learned.save_theta(tmp_path / name, theta, {"mup": mup, **more})
  learned.save_theta(tmp_path / "velo", learned.init_velo_theta(key, 2, 2))
  code = """
import json
from pathlib import Path
from absl import app
from launch import meta_test as m

def says(f, *args):
  try:
    print(f(*args))
  except (app.UsageError, ValueError) as e:
    print(e)

print(m.find("with", True).options, m.find("without", False).options)
print(sorted(m.find(None, False).options))
says(m.find, "without", True)
says(m.find, "with", False)
says(m.find, "velo", True)

made = {"mulo": {"sha256": "a"}, "seeds": 1, "steps": 4, "jax": "1"}
row = lambda **losses: {"new": "", "losses": losses}
rows = {
  "MLP, 16 wide": row(adamw=[1.0]),
  "MLP, 32 wide": row(adamw=[2.0], mulo=[1.5, 2.5]),
}
rows["MLP, 32 wide"]["losses"]["adamw, best rate"] = 0.1
file = Path("mulo.json")
print(m.kept(file, made))
file.write_text(json.dumps(made | {"results": rows}))
before = file.read_bytes()
print(m.kept(file, made) == rows)
says(m.kept, file, made | {"mulo": {"sha256": "b"}, "seeds": 3})
print(file.read_bytes() == before)
file.write_text(json.dumps({"results": {}}))
print(m.kept(file, made))
print(m.table(rows))
m.draw(rows, Path("mulo.png"))
"""
  done = python("-c", code, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  wanted = [
    "{} {'step_mult': 0.5, 'update_norm': 'rms'}",
    "['exp_mult', 'feature_eps', 'step_mult']",
    "--theta=without was made without muP; --theta wants one that was made "
    "under it. Give it as --twin.",
    "--twin=with was made under muP; --twin wants one that was made without "
    "it. Give it as --theta.",
    "--theta=velo: `theta` lacks ['adafactor_decays', 'b0', 'b1', 'b2', "
    "'momentum_decays', 'rms_decays', 'w0', 'w1', 'w2'] and has unk",
    "{}",
    "True",
    "mulo.json has results that were made with other mulo, seeds (seeds=1, "
    "steps=4, jax=1), and they would be lost. Give another folder w",
    "True",
    "{}",
    "| task | new | adamw | mulo |",
    "|---|---|---|---|",
    "| MLP, 16 wide |  | 1.000 | – |",
    "| MLP, 32 wide |  | 2.000 | 2.000 ± 0.707 |",
  ]
  assert [x[: len(y)] for x, y in zip(lines, wanted, strict=True)] == wanted
  assert "with --out=FOLDER, or move the file away" in done.stdout
  assert (tmp_path / "mulo.png").read_bytes()[:4] == b"\x89PNG"


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
