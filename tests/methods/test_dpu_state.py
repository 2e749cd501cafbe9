"""What delayed updates hold and send, and what may be done to their states."""

import halves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

KEY, N = halves.KEY, 4
RULE = halves.RULES["adamw"]
FACTORIES = {"dpu": dj.dpu, "weight_prediction": dj.weight_prediction}
by_name = pytest.mark.parametrize("name", FACTORIES)
small_tiles = halves.small_tiles(rows=2)


def make(name, loss_fn=halves.loss_fn, tx=RULE.tx, **options):
  plain = {"accumulate": 2, "clip_norm": RULE.clip_norm, "wire_dtype": None}
  return FACTORIES[name](loss_fn, tx, **{**plain, **options})


@by_name
def test_the_state_after_warm_up_is_ddps_on_a_mesh_too(name, mesh):
  run = dj.distribute(make(name, warmup=3), mesh(N))
  ddp = dj.ddp(halves.loss_fn, RULE.tx, accumulate=2, clip_norm=RULE.clip_norm)
  ddp = dj.simulate(ddp, workers=N)
  state, got = halves.steps(run, halves.begin(run), 3)
  plain, expected = halves.steps(ddp, halves.begin(ddp), 3)
  halves.near(got, expected, 2e-6)
  halves.near(state.point, plain.params, 2e-6)
  halves.near(halves.whole(state.shard.masters), plain.params, 2e-6)
  adam, plains = state.shard.opt_state[0], plain.opt_state[0]
  halves.near(halves.whole(adam.mu), plains.mu, 2e-6)
  halves.near(halves.whole(adam.nu), plains.nu, 2e-6)
  assert (np.asarray(adam.count) == 3).all()
  assert float(state.count) == 0.0
  assert not any(np.any(x) for x in jax.tree.leaves(state.grads))
  # Delayed from here on: nothing has arrived, and this gradient waits.
  state, got = halves.steps(run, state, 1, first=3)
  assert float(got["grad_norm"]) == 0.0
  assert float(state.count) == 2 * N
  halves.near(state.point, plain.params, 2e-6)
  plain, _ = halves.steps(ddp, plain, 1, first=3)
  halves.near(run.params(state), plain.params, 2e-6)


def tagged(params, rows, key):
  """The gradient is the tag of the step, wherever it is taken."""
  return params * rows["tag"].mean(), {}


@by_name
def test_a_step_calls_the_optimizer_once_and_predicts_with_a_second_call(name):
  rates = lambda count: count + 1.0  # tells which call of tx it was
  method = make(name, tagged, optax.sgd(rates), clip_norm=None, accumulate=1)
  run = dj.simulate(method, workers=N)
  state, theta = run.init(KEY, jnp.zeros(())), 0.0
  for tag in range(1, 8):
    rows = {"tag": np.full(N, tag, np.float32)}
    state, _ = run.step(state, rows, KEY)
    done, arrived = tag - 1, tag - 1  # updates, and the tag of the last
    theta -= done * arrived
    assert float(state.shard.masters.ravel()[0]) == theta
    ahead = (done + 1) * arrived if name == "weight_prediction" else 0
    assert float(state.point) == theta - ahead
    assert (np.asarray(jax.tree.leaves(state.shard.opt_state)) == done).all()
    assert float(run.params(state)) == theta - (done + 1) * tag
    np.testing.assert_array_equal(state.grads, np.full(N, tag))  # no other's


def acco_off_its_theta(a, rounds):
  """(theta~ - theta, theta) after each round of a quadratic, from apart."""

  def loss(w, rows, key):
    return a * w**2 / 2 + 0 * rows["x"].mean(), {}

  run = dj.simulate(dj.acco(loss, optax.sgd(1.0), wire_dtype=None), workers=1)
  rows = {"x": np.zeros(2, np.float32)}
  state, _ = run.step(run.init(KEY, jnp.ones(())), rows, KEY)
  state = state._replace(
    reduced=jax.tree.map(lambda x: x + 0.3, state.reduced),
    estimate=state.estimate - 0.3,
  )
  seen = []
  for _ in range(rounds):
    theta = float(run.params(state))
    seen.append((float(state.estimate) - theta, theta))
    state, _ = run.step(state, rows, KEY)
  return np.array(seen)


@pytest.mark.parametrize("a", [0.4, 1.9])
def test_an_estimate_off_theta_comes_back_by_minus_half_the_curvature(a):
  off, _ = acco_off_its_theta(a, 8).T
  assert abs(off[0]) > 0.1
  np.testing.assert_allclose(off[1:] / off[:-1], -a / 2, rtol=2e-2)


@by_name
@pytest.mark.parametrize(("stats", "warmup"), [("averaged", 4), ("local", 0)])
def test_statistics_pass_through_the_steps_as_ddps_do(name, stats, warmup):
  def fn(params, seen, rows, key):
    loss, aux = halves.loss_fn(params, rows, key)
    return loss, (aux, {"mean": 0.9 * seen["mean"] + rows["x"].mean(0)})

  loss_fn = dj.stateful(fn, stats=stats)
  run = dj.simulate(make(name, loss_fn, warmup=warmup), workers=N)
  ddp = dj.ddp(loss_fn, RULE.tx, accumulate=2, clip_norm=RULE.clip_norm)
  ddp = dj.simulate(ddp, workers=N)
  model = dj.Variables(
    halves.float32(halves.start()), {"mean": jnp.zeros(halves.INPUTS)}
  )
  state, _ = halves.steps(run, run.init(KEY, model), 3)
  plain, _ = halves.steps(ddp, ddp.init(KEY, model), 3)
  # They depend on the rows alone.
  halves.near(state.model_state, plain.model_state, 2e-6)
  if warmup:
    halves.near(run.params(state), ddp.params(plain), 2e-6)
  few = dj.simulate(run.method, workers=2)
  halves.near(
    few.params(few.adopt(halves.saved(state))), run.params(state), 2e-6
  )
