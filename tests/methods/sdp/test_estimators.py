"""Means over holders as estimators of a gradient, and the rescaling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax import models

pytestmark = pytest.mark.core

N, KEY = 8, jax.random.key(0)


def holds(w, unit, holders):
  """Cyclic windows of eight units on eight workers."""
  return (unit - w) % N < holders


def step(loss, params, names, rows, **options):
  """Parameters minus those after one step of gradient descent, and metrics."""
  shapes = toys.shapes_of(params)
  method = dj.sdp(loss, optax.sgd(1.0), names=names, shapes=shapes, **options)
  run = dj.simulate(method, workers=N)
  state, metrics = run.step(run.init(KEY, params), rows, KEY)
  moved = jax.tree.map(
    lambda a, b: a - np.asarray(b), params, run.params(state)
  )
  return moved, metrics


@pytest.mark.parametrize("holders", [2, 4])
def test_backward_masks_estimate_the_gradient_with_n_over_r_of_its_variance(
  holders,
):
  draws, mean = 20_000, 0.7  # of each unit
  g = np.random.default_rng(0).normal(mean, 1, (N, N, draws))
  g = g.astype(np.float32)
  loss = lambda params, rows, key: (jnp.sum(params["w"] * rows["g"][0]), {})
  moved, _ = step(
    loss,
    {"w": np.zeros((N, draws), np.float32)},
    {"w": ("hidden", None)},
    {"g": g},
    coverage=holders / N,
    masking="backward",
  )
  estimate, dense = moved["w"], g.mean(0)
  error = 5 / np.sqrt(N * draws * holders)  # five standard deviations
  assert abs(estimate.mean() - mean) < error
  assert abs(dense.mean() - mean) < error
  np.testing.assert_allclose(
    estimate.var() / dense.var(), N / holders, rtol=0.03
  )
  by_all = np.zeros_like(dense)
  for w in range(N):
    for unit in range(N):
      by_all[unit] += holds(w, unit, holders) * g[w, unit] / N
  np.testing.assert_allclose(by_all, holders / N * estimate, atol=1e-6)


def quadratic(params, rows, key):
  """w'Aw / 2 of the units that are there; their numbers are a parameter."""
  there = jax.lax.stop_gradient(params["unit"]).astype(int)
  a = rows["a"][0][there][:, there]
  return params["w"] @ a @ params["w"] / 2, {}


@functools.cache
def of_quadratic(holders):
  names = {"unit": ("hidden",), "w": ("hidden",)}

  def run(a, w):
    params = {"unit": np.arange(N, dtype=np.float32), "w": w}
    rows = {"a": np.tile(a, (N, 1, 1))}
    return step(quadratic, params, names, rows, coverage=holders / N)[0]["w"]

  return run


@pytest.mark.parametrize("holders", [1, 3, 8])
def test_forward_masks_shrink_what_two_units_do_together(holders):
  rng = np.random.default_rng(1)
  w = rng.normal(size=N).astype(np.float32)
  a = rng.normal(size=(N, N)).astype(np.float32)
  a = a + a.T
  expected = np.zeros(N)
  for j in range(N):
    for k in range(N):
      both = sum(
        holds(i, j, holders) and holds(i, k, holders) for i in range(N)
      )
      expected[j] += both / holders * a[j, k] * w[k]
  run = of_quadratic(holders)
  np.testing.assert_allclose(run(a, w), expected, rtol=1e-5, atol=1e-6)
  diagonal = np.diag(np.diag(a))
  np.testing.assert_allclose(run(diagonal, w), diagonal @ w, rtol=1e-5)


OUTPUTS = {"h": ("hidden",), "u": ("hidden", None)}


def linear(params, rows, key):
  """Its outputs are sums over hidden units."""
  out = params["h"] @ params["u"]
  return out.sum(), {f"out{i}": x for i, x in enumerate(out)}


@pytest.mark.parametrize("holders", [1, 2, 4])
def test_scaled_in_training_the_masked_outputs_average_to_the_dense_one(
  holders,
):
  rng = np.random.default_rng(2)
  params = {
    "h": rng.normal(size=N).astype(np.float32),
    "u": rng.normal(size=(N, 2)).astype(np.float32),
  }
  options = {"coverage": holders / N, "shapes": toys.shapes_of(params)}
  make = functools.partial(
    dj.sdp, linear, optax.sgd(0.0), names=OUTPUTS, **options
  )
  dense, rows = params["h"] @ params["u"], {"x": np.zeros(N, np.float32)}
  for rescale, factor, kept in (
    ("train", 1.0, 1.0),
    ("none", holders / N, 1.0),
    ("test", holders / N, holders / N),
  ):
    run = dj.simulate(make(rescale=rescale), workers=N)
    state, metrics = run.step(run.init(KEY, params), rows, KEY)
    out = [metrics[f"out{i}"] for i in range(2)]
    np.testing.assert_allclose(out, factor * dense, rtol=1e-5)
    model = run.params(state)  # only what sums over the units is scaled
    np.testing.assert_array_equal(model["h"], params["h"])
    np.testing.assert_allclose(model["u"], kept * params["u"], rtol=1e-6)


@pytest.mark.parametrize(("level", "factor"), [("block", 2.0), ("both", 4.0)])
def test_blocks_write_more_while_others_are_absent_or_less_in_the_whole(
  level, factor
):
  params, rows = toys.float32(toys.start()), toys.float32(toys.batch(0))
  kept = toys.case(level, "forward", False)
  losses = []
  for w in range(toys.N):
    mine = toys.of_worker(kept.begun.params, w)
    mine = {**mine, "c": factor * mine["c"]}
    share = jax.tree.map(lambda x: np.split(x, toys.N)[w], rows)  # noqa: B023
    losses.append(toys.loss_fn(mine, share, KEY)[0])
  method = toys.make(level, rescale="train", writers=toys.WRITERS)
  run = dj.simulate(method, workers=toys.N)
  state = run.init(KEY, params)
  toys.equal(run.params(state), params)  # nothing is scaled in evaluation
  _, metrics = run.step(state, rows, KEY)
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
  method = toys.make(level, rescale="test", writers=toys.WRITERS)
  run = dj.simulate(method, workers=toys.N)
  model = run.params(run.init(KEY, params))
  expected = {**params, "c": params["c"] / factor}
  toys.near(model, expected, 1e-6)


def test_our_models_say_which_parameters_write():
  model = models.create("llama", vocab=8, embed=8, layers=2, heads=2, mlp=8)
  example = jnp.zeros((1, 4), jnp.int32)
  method = dj.sdp(
    toys.loss_fn,
    optax.sgd(0.1),
    names=models.logical_names(model, example),
    shapes=models.abstract(model, example).params,
    level="block",
    rescale="test",
    writers=models.branch_writers(model, example),
  )
  run = dj.simulate(method, workers=2)
  params = models.init(model, KEY, example).params
  got = run.params(run.init(KEY, params))
  for part, name in (("attention", "out"), ("feed_forward", "down")):
    params["blocks"][part][name] = params["blocks"][part][name] / 2
  toys.equal(got, params)
