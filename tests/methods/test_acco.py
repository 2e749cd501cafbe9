"""ACCO's numbers: DDP's where both halves agree, else a NumPy loop's."""

import functools
import math

import halves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import layout

pytestmark = pytest.mark.core

KEY = halves.KEY
ROUNDS = 300
by_rule = pytest.mark.parametrize("rule", halves.RULES)
small_tiles = halves.small_tiles()


def make(rule, **options):
  options = {"clip_norm": halves.RULES[rule].clip_norm, **options}
  options = {"wire_dtype": None, **options}
  return dj.acco(halves.loss_fn, halves.RULES[rule].tx, **options)


@functools.cache
def simulated(rule, workers=4, **options):
  return dj.simulate(make(rule, **options), workers=workers)


def step(run, state, i):
  batch = jax.tree.map(np.float32, halves.batch(i))
  return run.step(state, batch, KEY)


def metrics_of(metrics):
  return tuple(float(metrics[k]) for k in ("loss", "mae", "grad_norm"))


def assert_ddp(run, rule, k, rounds):
  """Every micro-batch of a step the same: so is the gradient in both halves."""
  ddp = dj.ddp(
    halves.loss_fn,
    halves.RULES[rule].tx,
    clip_norm=halves.RULES[rule].clip_norm,
  )
  ddp = dj.simulate(ddp, workers=1)
  state, plain = halves.begin(run), halves.begin(ddp)
  for i in range(rounds):
    micro = jax.tree.map(np.float32, halves.batch(i, 6))
    rows = halves.repeated(micro, run.workers * 2 * k)
    state, _ = run.step(state, rows, KEY)
    plain, _ = ddp.step(plain, micro, KEY)
    halves.near(run.params(state), ddp.params(plain), 2e-5)
    halves.near(state.estimate, ddp.params(plain), 2e-5)


def test_the_tiles_are_so_small_that_every_buffer_is_cut():
  for workers in (1, 2, 4, 8):
    tree = halves.start()
    flat = layout.make_layout(tree, workers)
    buffers = flat.pack(flat.rows(tree), 2)
    assert min(x.shape[1] for x in buffers.values()) >= 2
    assert len(buffers) == 2


@pytest.mark.parametrize(
  ("rule", "slices", "reduction"),
  [
    ("sgd", 0, "reduce_scatter"),
    ("momentum", 1, "all_to_all"),
    ("adamw", 2, "reduce_scatter"),
  ],
)
def test_the_same_gradient_in_both_halves_is_ddp(rule, slices, reduction):
  k = max(1, 2 * slices)
  run = simulated(rule, accumulate=k, slices=slices, reduction=reduction)
  assert_ddp(run, rule, k, ROUNDS)


@pytest.mark.parametrize("reduction", ["reduce_scatter", "all_to_all"])
def test_so_it_is_on_a_mesh(reduction, mesh):
  method = make("adamw", accumulate=4, slices=2, reduction=reduction)
  assert_ddp(dj.distribute(method, mesh(4)), "adamw", 4, 20)


def assert_oracle(run, rule, workers, k, rounds=12):
  oracle, state = halves.Acco(rule), halves.begin(run)
  norms = []
  for i in range(rounds):
    state, metrics = step(run, state, i)
    expected = oracle.round(halves.batch(i), workers, k)
    halves.near(metrics_of(metrics), expected)
    halves.near(run.params(state), oracle.now.params)
    halves.near(halves.whole(state.shard.masters), oracle.before.params)
    halves.near(state.estimate, oracle.point)
    norms.append(expected[-1])
  most = halves.RULES[rule].clip_norm
  assert most is None or 0 < np.mean(np.array(norms[1:]) > most) < 1
  if rule == "adamw":
    adam = state.shard.opt_state[0]
    halves.near(halves.whole(adam.mu), oracle.before.m)
    halves.near(halves.whole(adam.nu), oracle.before.v)
    assert (np.asarray(adam.count) == rounds - 1).all()
  assert jax.tree.all(
    jax.tree.map(lambda x: not x.any(), halves.padding(state.shard.masters))
  )


@pytest.mark.parametrize(
  ("rule", "workers", "k", "slices", "reduction"),
  [
    ("sgd", 8, 1, 0, "reduce_scatter"),
    ("sgd", 2, 4, 1, "all_to_all"),
    ("momentum", 4, 2, 1, "reduce_scatter"),
    ("momentum", 1, 3, 1, "reduce_scatter"),
    ("adamw", 4, 4, 2, "reduce_scatter"),
    ("adamw", 8, 3, 0, "all_to_all"),
  ],
)
def test_every_round_equals_the_oracle(rule, workers, k, slices, reduction):
  run = simulated(
    rule, workers, accumulate=k, slices=slices, reduction=reduction
  )
  assert_oracle(run, rule, workers, k)


def test_so_it_does_on_a_mesh(mesh):
  method = make("adamw", accumulate=3, slices=1)
  assert_oracle(dj.distribute(method, mesh(8)), "adamw", 8, 3)


def mean_gradient(params, micro):
  sums = halves.micro_sums(jax.tree.map(np.float64, params), micro)
  return {k: g / sums.count for k, g in sums.grads.items()}


def test_sgds_estimate_is_off_by_half_the_rate_times_the_halves_difference():
  run = simulated("sgd", accumulate=2)
  state, moved = halves.begin(run), []
  for i in range(6):
    early, late = halves.halves_of(halves.batch(i), 4, 2)
    at_estimate = mean_gradient(state.estimate, early)  # g~
    at_theta = mean_gradient(run.params(state), late)  # g
    state, _ = step(run, state, i)
    for k, theta in run.params(state).items():
      off = np.asarray(state.estimate[k]) - np.asarray(theta)
      expected = 0.1 / 2 * (at_theta[k] - at_estimate[k])
      np.testing.assert_allclose(off, expected, atol=2e-6)
      moved.append(np.abs(expected).max())
  assert min(moved) > 1e-4


def slope(params, rows, key):
  """A gradient of 1 everywhere."""
  return jnp.sum(params) + 0.0 * rows["x"].mean(), {}


@pytest.mark.parametrize("workers", [1, 4])
def test_the_rate_is_at_its_floor_when_the_tokens_are_spent(workers):
  each, budget = 4, 64  # rows a worker and step, and of the whole run
  total = budget // (each * workers)
  rates = optax.linear_schedule(1.0, 0.25, total)
  run = dj.simulate(dj.acco(slope, optax.sgd(rates)), workers=workers)
  state = run.init(KEY, jnp.zeros(3))
  rows, seen = {"x": np.ones((each * workers, 1), np.float32)}, []
  for _ in range(total + 2):
    before = np.asarray(run.params(state))
    state, _ = run.step(state, rows, KEY)
    seen.append(before - np.asarray(run.params(state)))
  # The estimates between the commits took no step of the schedule.
  expected = [float(rates(i)) for i in range(total + 2)]
  np.testing.assert_allclose(seen, np.array(expected)[:, None] * np.ones(3))
  assert expected[total] == expected[total + 1] == 0.25 < expected[total - 1]


def assert_switch_from_ddp(run, warmup, rounds=7):
  """DDP for `warmup` steps, from there on what ACCO does from DDP's state."""
  rule = "adamw"
  ddp = dj.ddp(
    halves.loss_fn,
    halves.RULES[rule].tx,
    accumulate=2,
    clip_norm=halves.RULES[rule].clip_norm,
  )
  ddp = dj.simulate(ddp, workers=4)
  oracle, state, plain = halves.Acco(rule), halves.begin(run), halves.begin(ddp)
  for i in range(warmup):
    state, got = step(run, state, i)
    plain, expected = step(ddp, plain, i)
    halves.near(metrics_of(got), metrics_of(expected), 2e-6)
    halves.near(run.params(state), ddp.params(plain), 2e-6)
    halves.near(state.estimate, ddp.params(plain), 2e-6)
    adam, plains = state.shard.opt_state[0], plain.opt_state[0]
    halves.near(halves.whole(adam.mu), plains.mu, 2e-6)
    halves.near(halves.whole(adam.nu), plains.nu, 2e-6)
    assert (np.asarray(adam.count) == i + 1).all()
    both = halves.together(
      *(
        halves.micro_sums(oracle.point, x)
        for x in halves.halves_of(halves.batch(i), 4, 1)
      )
    )
    oracle.now, _ = oracle.now.moved(both)
    oracle.point = oracle.now.params
  for i in range(warmup, rounds):
    state, got = step(run, state, i)
    halves.near(metrics_of(got), oracle.round(halves.batch(i), 4, 1))
    halves.near(run.params(state), oracle.now.params)
    halves.near(state.estimate, oracle.point)


def test_warm_up_steps_are_ddps_and_acco_goes_on_from_them():
  assert_switch_from_ddp(simulated("adamw", warmup=3), 3)


def test_so_they_are_on_a_mesh(mesh):
  run = dj.distribute(make("adamw", warmup=3), mesh(4))
  assert_switch_from_ddp(run, 3)


def tagged(params, rows, key):
  """The gradient of a micro-batch is 1 at its tag, and 0 elsewhere."""
  return params[rows["tag"][0]], {}


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("estimate_dtype", [None, "int8"])
def test_every_gradient_is_used_once_and_none_is_lost(warmup, estimate_dtype):
  workers, k, rounds = 3, 2, 5
  each = workers * 2 * k
  method = dj.acco(
    tagged,
    optax.sgd(1.0),
    accumulate=k,
    warmup=warmup,
    estimate_dtype=estimate_dtype,
  )
  run = dj.simulate(method, workers=workers)
  state = run.init(KEY, jnp.zeros(each * rounds))
  for i in range(rounds):
    tags = np.arange(each * i, each * (i + 1))
    state, _ = run.step(state, {"tag": tags}, KEY)
    used = np.zeros(each * rounds)
    used[: each * (i + 1)] = 1 / each
    np.testing.assert_allclose(run.params(state), -used, rtol=1e-6)
    pending = 0 if i < warmup else each / 2
    assert float(state.count) == float(state.reduced_count) == pending
    assert math.isclose(np.sum(state.grads), pending)
