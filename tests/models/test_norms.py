"""Normalisation layers against Flax's, and BatchNorm across workers."""

import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models.norms import BatchNorm, GroupNorm, layer_norm

X = np.float32(np.random.default_rng(1).normal(3, 2, (8, 3, 3, 6)))


def started(layer):
  rng = np.random.default_rng(0)
  init = lambda: layer.init(jax.random.key(0), X, False)
  draw = lambda a: 1 + rng.random(a.shape, np.float32)
  return jax.tree.map(draw, nn.meta.unbox(jax.eval_shape(init)))


def run(layer, variables, x, *train):
  """The result, and the collections that changed."""
  apply = lambda v, x: layer.apply(v, x, *train, mutable=["batch_stats"])
  return jax.device_get(jax.jit(apply)(variables, x))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_equals_flax(train):
  variables = started(BatchNorm("conv_out"))
  flax = nn.BatchNorm(not train, momentum=0.9, use_fast_variance=False)
  ours = run(BatchNorm("conv_out"), variables, X, train)
  jax.tree.map(close, ours, run(flax, variables, X))


@pytest.mark.parametrize("size, groups", [(2, 3), (6, 1), (4, 3), (16, 3)])
def test_group_norm_equals_flax_with_the_nearest_number_of_groups(size, groups):
  layer = GroupNorm("conv_out", size=size)
  variables = started(layer)
  flax = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False)
  close(run(layer, variables, X)[0], run(flax, variables, X)[0])


def test_whole_groups_can_be_left_out_without_changing_the_others():
  layer, kept = GroupNorm("inner_0", size=2), np.array([0, 1, 4, 5])
  variables = started(layer)
  fewer = jax.tree.map(lambda a: a[kept], variables)
  y, _ = run(layer, fewer, X[..., kept])
  close(y, run(layer, variables, X)[0][..., kept], 1e-6)


def test_statistics_survive_a_large_mean():
  layer, x = BatchNorm("conv_out"), 1e4 + X
  variables = started(layer)
  y, _ = run(layer, variables, x, True)
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
  scale, bias = (variables["params"][name] for name in ("scale", "bias"))
  close(y, exact * scale + bias, 5e-3)


@pytest.mark.parametrize("workers", [2, 4])
def test_synchronised_statistics_equal_one_worker_with_the_whole_batch(workers):
  alone, together = BatchNorm("c"), BatchNorm("c", axis_name="data")
  variables = started(alone)

  def loss(layer, variables, x):
    y, changes = layer.apply(variables, x, True, mutable=["batch_stats"])
    return jnp.sin(y * x).mean(), (y, changes["batch_stats"])

  def worker(x):  # the gradient of the local loss, then reduced
    measure = jax.value_and_grad(loss, 1, has_aux=True)
    (value, (y, stats)), grads = measure(together, variables, x)
    return jax.lax.pmean((value, grads["params"]), "data"), (y, stats)

  shares = X.reshape(workers, -1, *X.shape[1:])
  workers_fn = jax.jit(jax.vmap(worker, axis_name="data"))
  means, (y, stats) = jax.device_get(workers_fn(shares))
  measure = jax.jit(jax.value_and_grad(loss, 1, has_aux=True), static_argnums=0)
  (value, (expected, expected_stats)), grads = measure(alone, variables, X)
  close(y.reshape(X.shape), expected)
  for k in range(workers):
    mine = jax.tree.map(operator.itemgetter(k), (means, stats))
    jax.tree.map(close, mine, ((value, grads["params"]), expected_stats))


def test_the_axis_is_not_needed_for_init_or_evaluation():
  layer = BatchNorm("conv_out", axis_name="data")
  variables = started(layer)
  assert layer.apply(variables, X, False).shape == X.shape


def test_layer_norm_survives_a_large_mean_and_returns_the_config_s_dtype():
  config = models.ViTConfig(norm_eps=1e-5, dtype="bfloat16")
  layer, rng = layer_norm(config, "final_norm"), np.random.default_rng(0)
  boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), X))["params"]
  assert {n: box.names for n, box in boxed.items()} == {
    "scale": ("embed",),
    "bias": ("embed",),
  }
  params = {name: 1 + rng.random(6, np.float32) for name in boxed}
  x = 1e4 + X
  exact = np.asarray(x, np.float64)
  exact = exact - exact.mean(-1, keepdims=True)
  exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
  wanted = exact * params["scale"] + params["bias"]
  y = layer.apply({"params": params}, x)
  assert y.dtype == jnp.bfloat16
  close(y.astype(jnp.float32), wanted, 2e-2)
