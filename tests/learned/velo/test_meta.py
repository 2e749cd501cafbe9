"""Meta-training of VeLO: the same loop, and what is new about it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from distrain_jax import learned
from distrain_jax.learned import meta

ROOT = Path(__file__).resolve().parents[3]
KEY = jax.random.key(0)
SETTINGS = meta.Settings(2, 3, 0.01, 4, 9)
RULE = learned.VeloRule(lstm=4, step_mult=0.01, param_scale_mult=False)


@pytest.fixture(scope="module")
def task():
  """A kernel alone, which compiles soon."""

  def loss(params, batch, key):
    del key
    return jnp.mean((batch @ params["w"] - 1.0) ** 2)

  return meta.Task(
    name="line",
    init=lambda key: {"w": jax.random.normal(key, (4, 3))},
    loss=loss,
    batch=lambda data, key: data + jax.random.normal(key, (5, 4)),
    data=jnp.ones((1, 4)),
    normalise=lambda loss: jnp.minimum(loss, 100.0),
    mup={"w": 0.5},
  )


@pytest.fixture(scope="module")
def theta():
  return jax.jit(lambda key: learned.init_velo_theta(key, 4, 2))(KEY)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_runs_and_resumed_equals_uninterrupted(task, theta, tmp_path):
  # As one vector, whose noise compiles three times faster than a dict's.
  flat, as_dict = ravel_pytree(theta)
  inner = meta.training(task, RULE)
  step = lambda flat, *args: inner.step(as_dict(flat), *args)
  problem = inner._replace(step=step)
  trainer = meta.trainer([problem], optax.adam(0.01), SETTINGS)

  def run(state, steps):
    for _ in range(steps):
      state, metrics = trainer.step(state, (task.data,), KEY)
    return state, metrics

  path = tmp_path / "state.npz"
  start = trainer.init(flat, KEY)
  whole, metrics = run(start, 4)
  assert np.isfinite(metrics["meta_loss"]) and metrics["grad_norm"] > 0
  half, _ = run(trainer.init(flat, KEY), 2)
  meta.save(path, half)
  like = trainer.init(flat, jax.random.key(9))
  resumed, _ = run(meta.restore(path, like), 2)
  equal(resumed, whole)
  assert (whole.theta != flat).all()
  # In a pair, both are told how long their trajectory will be.
  (pairs,) = whole.pairs
  told = pairs.states.opt_state.num_steps
  np.testing.assert_array_equal(told, np.stack([pairs.length] * 2, 1))
  counts = pairs.states.opt_state.count
  assert (counts <= np.asarray(pairs.age)[:, None]).all()


def test_a_training_problem_is_velo(task, theta):
  problem = meta.training(task, RULE)
  state = problem.told(jax.jit(problem.reset)(KEY), jnp.asarray(20))
  new, loss = jax.jit(problem.step)(theta, state, task.data, KEY)

  @jax.jit
  def by_hand(params):
    for_batch, for_loss = jax.random.split(KEY)
    batch = task.batch(task.data, for_batch)
    loss, grads = jax.value_and_grad(task.loss)(params, batch, for_loss)
    tx = learned.velo(theta, num_steps=20, mup=task.mup, step_mult=0.01)
    updates, _ = tx.update(grads, tx.init(params), params, value=loss)
    return optax.apply_updates(params, updates), loss

  wanted, wanted_loss = by_hand(state.params)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7)
  jax.tree.map(near, new.params, wanted)
  moved = np.abs(wanted["w"] - state.params["w"]).max()
  assert moved > 1e-6


def config(code):
  """What a program prints that has the config `c` and the launcher."""
  program = f"""
from configs.mulo import velo
from launch import meta_train
c = velo.get_config("quick")
{code}
"""
  env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": ""}
  command = [sys.executable, "-W", "ignore", "-c", program]
  return subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
  )


def test_the_config_says_which_architecture():
  done = config("""
import jax
rule, init = meta_train.architecture(c)
print(rule.lstm, rule.param_scale_mult, rule.interp_mult)
print(jax.eval_shape(init, jax.random.key(0))["bank_b0"].shape)
c.architecture = "lstm"
meta_train.architecture(c)
""")
  assert done.stdout.split("\n")[:2] == ["4 False 100.0", "(2, 4)"]
  assert "config.architecture='lstm' is small_fc" in done.stderr


@pytest.mark.full
def test_the_launcher_meta_trains_velo(tmp_path):
  done = config(f"""
from pathlib import Path
meta_train.train_theta(c, Path({str(tmp_path)!r}))
""")
  assert done.returncode == 0, done.stderr
  assert "2/2 meta-loss" in done.stdout
  theta, metadata = learned.load_theta(tmp_path / "theta.safetensors")
  assert metadata["architecture"] == "velo" and metadata["lstm"] == "4"
  assert learned.check_velo_theta("test", theta) == (4, 2)
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert line["losses"].keys() == {"teacher_16"}
