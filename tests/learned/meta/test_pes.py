"""Meta-gradients against an analytic toy, and the attribution of losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.learned.meta import Problem, Settings, attribute, pes

KEY = jax.random.key(0)
LENGTH, K = 18, 5


def shrinking():
  """s <- s (1 - theta) from s = 1; the loss is s squared."""
  reset = lambda key: jnp.ones(())

  def step(theta, state, data, key):
    del data, key
    return state * (1 - theta), state**2

  return Problem(reset, step)


def analytic(theta):
  """d/dtheta of the mean of (1 - theta)^2t, t = 0 ... LENGTH - 1."""
  t = np.arange(LENGTH)
  return float(np.mean(-2 * t * (1 - theta) ** (2 * t - 1)))


def estimate(estimator, theta, pairs=8192, truncations=18, sigma=0.002):
  """Mean gradient and its standard error: LENGTH truncations are K of them."""
  settings = Settings(pairs, K, sigma, LENGTH, LENGTH, estimator)
  problem = shrinking()
  run = jax.vmap(pes.truncation(problem, settings), (None, 0, None, None))

  @jax.jit
  def mean(key):
    # From the start of a trajectory: after 18 truncations of 5 all pairs have
    # been through the same 5 whole trajectories.
    start = lambda i: pes.start_pair(
      problem, theta, settings, i, jax.random.fold_in(key, i)
    )
    pair = jax.vmap(start)(jnp.arange(pairs))
    pair = pair._replace(age=jnp.zeros(pairs, jnp.int32))

    def one(pair, i):
      grads, pair, _ = run(theta, pair, (), jax.random.fold_in(key, i))
      return pair, grads

    return jnp.mean(jax.lax.scan(one, pair, jnp.arange(truncations))[1], 0)

  got = np.asarray(mean(KEY), np.float64)
  return got.mean(), got.std() / np.sqrt(pairs)


@pytest.mark.parametrize(
  ("estimator", "theta"),
  [("pes", 0.05), ("pes", -0.05), ("noise_reuse", -0.05)],
)
def test_the_gradient_is_that_of_the_whole_trajectory(estimator, theta):
  got, error = estimate(estimator, jnp.asarray(theta))
  wanted = analytic(theta)
  assert error < 0.04 * abs(wanted)
  assert abs(got - wanted) < 3 * error + 2e-3 * abs(wanted)


def test_truncations_by_themselves_miss_most_of_it():
  got, _ = estimate("truncated", jnp.asarray(0.05))
  assert abs(got) < 0.5 * abs(analytic(0.05))


def oracle(d, ended, a, old, new, sigma, estimator):
  """Step by step, for one number of theta."""
  total, fresh = 0.0, False
  for gap, end in zip(d, ended):
    if estimator == "ancestor" and end:
      fresh = True  # the last loss already counts as of the new trajectory
    noise = new if fresh else old
    if not fresh and estimator in ("pes", "ancestor"):
      noise = old + a
    total += gap * noise
    fresh = fresh or end
  grad = total / len(d) / (2 * sigma**2)
  if estimator in ("truncated", "noise_reuse"):
    return grad, a
  if estimator == "pes" and ended[-1]:
    return grad, 0.0
  return grad, new if any(ended) else a + old


@pytest.mark.parametrize("estimator", pes.ESTIMATORS)
def test_losses_are_attributed_as_the_oracle_does(estimator):
  rng = np.random.default_rng(0)
  fn = functools.partial(attribute, sigma=0.1, estimator=estimator)
  fn = jax.jit(fn)
  masks = [np.zeros(6, bool), np.ones(6, bool)]
  masks += [np.eye(6, dtype=bool)[0], np.eye(6, dtype=bool)[5]]
  masks += [rng.random(6) < 0.3 for _ in range(12)]
  for ended in masks:
    losses = rng.normal(size=(2, 6)).astype(np.float32)
    a, old, new = (np.float32(x) for x in rng.normal(size=3))
    if estimator != "noise_reuse":
      new = old
    got = fn(losses, ended, a, old, new)
    wanted = oracle(losses[0] - losses[1], ended, a, old, new, 0.1, estimator)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_exchanging_the_signs_leaves_the_gradient():
  rng = np.random.default_rng(0)
  losses = rng.normal(size=(2, 6)).astype(np.float32)
  ended = np.array([0, 0, 1, 0, 0, 0], bool)
  a, noise = jnp.asarray(0.3), jnp.asarray(-0.2)
  got = attribute(losses, ended, a, noise, noise, sigma=0.1)[0]
  turned = attribute(losses[::-1], ended, -a, -noise, -noise, sigma=0.1)[0]
  assert float(got) == float(turned) != 0


def recording():
  """Keeps what each step and reset was given; its loss ignores theta."""

  def reset(key):
    draw = jax.random.uniform(key)
    return {"start": draw, "seen": jnp.zeros(()), "theta": jnp.zeros(())}

  def step(theta, state, data, key):
    seen = state["seen"] + jax.random.uniform(key)
    new = {**state, "seen": seen, "theta": theta}
    return new, seen + state["start"]

  return Problem(reset, step)


def test_both_signs_share_batches_and_starts_and_the_gradient_is_zero():
  settings = Settings(1, 7, 0.1, 3, 5)
  theta = jnp.asarray(2.0)
  start = jax.jit(
    lambda i: pes.start_pair(recording(), theta, settings, i, KEY)
  )
  pair = start(0)
  run = jax.jit(pes.truncation(recording(), settings))
  for i in range(3):
    grad, pair, _ = run(theta, pair, (), jax.random.fold_in(KEY, i))
    assert float(grad) == 0.0
    states = pair.states
    for name in ("start", "seen"):
      assert float(states[name][0]) == float(states[name][1])
    if int(pair.age):
      np.testing.assert_allclose(jnp.mean(states["theta"]), 2.0, rtol=1e-6)
      assert float(states["theta"][0]) != float(states["theta"][1])


def test_lengths_are_log_uniform_and_within_bounds():
  settings = Settings(min_length=100, max_length=1000)
  draw = jax.jit(jax.vmap(lambda k: pes.draw_length(k, settings)))
  drawn = np.asarray(draw(jax.random.split(KEY, 4000)))
  assert drawn.min() >= 100 and drawn.max() <= 1000
  assert abs(np.mean(drawn < 316) - 0.5) < 0.05


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"pairs": 0}, "`pairs`.*got 0"),
    ({"sigma": 0.0}, r"`sigma`.*got 0\.0"),
    ({"min_length": 9, "max_length": 8}, "`max_length`=8 is below"),
    ({"estimator": "es"}, "pes, ancestor, truncated.*'es'"),
  ],
)
def test_wrong_settings_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    pes.check_settings(Settings(**options))
