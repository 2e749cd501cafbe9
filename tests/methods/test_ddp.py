"""DDP beyond the contract: what is averaged, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

KEY = jax.random.key(0)


def mean_loss(w, batch, key):
  """Gradient: the mean of x. The optimizer below subtracts it."""
  del key
  return jnp.mean(batch["x"] @ w), {"first": batch["x"][:, 0].mean()}


def test_one_step_of_sgd_subtracts_the_mean_over_all_rows():
  x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
  run = dj.simulate(dj.ddp(mean_loss, optax.sgd(1.0)), workers=4)
  state, metrics = run.step(run.init(KEY, jnp.zeros(3)), {"x": x}, KEY)
  np.testing.assert_allclose(run.params(state), -x.mean(0), rtol=1e-5)
  np.testing.assert_allclose(metrics["first"], x[:, 0].mean(), rtol=1e-5)
  norm = np.linalg.norm(x.mean(0))
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert float(metrics["loss"]) == 0.0


def test_the_norm_is_reported_before_clipping_and_obeyed_after():
  x = np.tile(np.float32([3.0, 4.0]), (4, 1))
  method = dj.ddp(mean_loss, optax.sgd(1.0), clip_norm=0.5)
  run = dj.simulate(method, workers=2)
  state, metrics = run.step(run.init(KEY, jnp.zeros(2)), {"x": x}, KEY)
  assert float(metrics["grad_norm"]) == 5.0
  np.testing.assert_allclose(run.params(state), [-0.3, -0.4], rtol=1e-6)


def test_clipping_looks_at_the_averaged_gradient_not_at_a_workers_own():
  x = np.float32([[100.0], [-100.0], [1.0], [1.0]])  # the mean is 0.5
  method = dj.ddp(mean_loss, optax.sgd(1.0), clip_norm=0.75)
  run = dj.simulate(method, workers=4)
  state, _ = run.step(run.init(KEY, jnp.zeros(1)), {"x": x}, KEY)
  np.testing.assert_allclose(run.params(state), [-0.5], rtol=1e-6)


def test_an_optimizer_that_needs_the_whole_tree_is_welcome():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(1e-2))
  run = dj.simulate(dj.ddp(mean_loss, tx), workers=2)
  state = run.init(KEY, jnp.ones(3))
  state, _ = run.step(state, {"x": np.ones((4, 3), np.float32)}, KEY)
  assert np.all(np.asarray(run.params(state)) < 1.0)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"accumulate": 0}, "ddp: `accumulate`.*got 0"),
    ({"clip_norm": -1.0}, r"ddp: `clip_norm`.*got -1\.0"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    dj.ddp(mean_loss, optax.sgd(1.0), **options)
