"""What delayed updates hold and send, and what may be done to their states."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import inspect, layout, spmd

spec = importlib.util.spec_from_file_location(
  "halves", Path(__file__).parent / "halves.py"
)
halves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(halves)

pytestmark = pytest.mark.core

KEY, N = halves.KEY, 4
RULE = halves.RULES["adamw"]
LOW = {"wire_dtype": "bfloat16", "param_dtype": "bfloat16"}
FACTORIES = {"dpu": dj.dpu, "weight_prediction": dj.weight_prediction}
by_name = pytest.mark.parametrize("name", FACTORIES)


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
  """Buffers of a few elements have rows; `w` travels alone."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layout, "TILES", (2, 1))
    patch.setattr(layout, "LANES", 1)
    patch.setattr(layout, "ALONE", 12)
    yield


def make(name, loss_fn=halves.loss_fn, tx=RULE.tx, **options):
  plain = {"accumulate": 2, "clip_norm": RULE.clip_norm, "wire_dtype": None}
  return FACTORIES[name](loss_fn, tx, **{**plain, **options})


def begin(run):
  return run.init(KEY, halves.float32(halves.start()))


def steps(run, state, count, first=0):
  for i in range(first, first + count):
    rows = jax.tree.map(np.float32, halves.batch(i))
    state, metrics = run.step(state, rows, KEY)
  return state, metrics


def saved(state):
  """What a checkpoint holds."""
  return jax.tree.map(np.array, state)


@by_name
def test_resumed_equals_uninterrupted_wherever_it_was_saved(name):
  run = dj.simulate(make(name, warmup=1, **LOW), workers=N)
  state, kept = begin(run), []
  for i in range(4):
    kept.append(saved(state))
    state, metrics = steps(run, state, 1, first=i)
  end = (saved(state), metrics, run.params(state))
  for i, state in enumerate(kept):
    state, metrics = steps(run, state, 4 - i, first=i)
    halves.equal((state, metrics, run.params(state)), end)


@by_name
def test_the_state_after_warm_up_is_ddps_on_a_mesh_too(name, mesh):
  run = dj.distribute(make(name, warmup=3), mesh(N))
  ddp = dj.ddp(halves.loss_fn, RULE.tx, accumulate=2, clip_norm=RULE.clip_norm)
  ddp = dj.simulate(ddp, workers=N)
  state, got = steps(run, begin(run), 3)
  plain, expected = steps(ddp, begin(ddp), 3)
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
  state, got = steps(run, state, 1, first=3)
  assert float(got["grad_norm"]) == 0.0
  assert float(state.count) == 2 * N
  halves.near(state.point, plain.params, 2e-6)
  plain, _ = steps(ddp, plain, 1, first=3)
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


@pytest.mark.parametrize("workers", [2, 8])
@by_name
def test_it_holds_4_and_12_over_n_bytes_a_parameter(name, workers, mesh):
  loss_fn, adamw = lambda params, rows, key: (0.0, {}), optax.adamw(1e-3)
  params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}

  def is_held(bytes_each, **options):
    run = dj.distribute(make(name, loss_fn, adamw, **options), mesh(workers))
    held = inspect.bytes_held(run.abstract(KEY, params))
    return 0 < held - bytes_each * 64 * 32 <= 3 * 4  # step, counts

  assert is_held(4 + 12 / workers, **LOW)
  assert is_held(8 + 12 / workers)


@by_name
def test_a_step_sends_what_an_update_of_zero1_does(name, mesh):
  params = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
  rows = {"x": jax.ShapeDtypeStruct((64, 16), jnp.float32)}
  loss_fn = lambda p, rows, key: (jnp.mean((rows["x"] @ p["w"]) ** 2), {})

  def sent(method):
    run = dj.distribute(method, mesh(8))
    return inspect.bytes_sent(run, run.abstract(KEY, params), rows, KEY)

  zero1 = sent(dj.zero1(loss_fn, optax.sgd(0.1), **LOW))
  here = sent(make(name, loss_fn, optax.sgd(0.1), accumulate=4, **LOW))
  assert here.keys() == zero1.keys() == {"reduce_scatter", "all_gather", "psum"}
  one_way = 2 * 512 * 7 / 8  # bfloat16, of eight workers
  for kind in ("reduce_scatter", "all_gather"):
    assert here[kind] == zero1[kind] == one_way
  assert here["psum"] <= zero1["psum"] + 8  # a second norm


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
  state, _ = steps(run, run.init(KEY, model), 3)
  plain, _ = steps(ddp, ddp.init(KEY, model), 3)
  # They depend on the rows alone.
  halves.near(state.model_state, plain.model_state, 2e-6)
  if warmup:
    halves.near(run.params(state), ddp.params(plain), 2e-6)
  few = dj.simulate(run.method, workers=2)
  halves.near(few.params(few.adopt(saved(state))), run.params(state), 2e-6)


@by_name
def test_beside_an_axis_that_shards_the_model_the_numbers_are_the_same(name):
  mesh = spmd.make_mesh({"data": 2, "tensor": 4})
  start = halves.float32(halves.start())
  start = {k: x[..., :4] if x.ndim else x for k, x in start.items()}
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  over = P(None, "tensor")
  specs = {"w": over, "b": P("tensor"), "v": P("tensor"), "gain": P()}
  method, ends = make(name, warmup=1), []
  for run, params in (
    (dj.distribute(method, mesh), jax.tree.map(place, start, specs)),
    (dj.simulate(method, workers=2), start),
  ):
    state, metrics = steps(run, run.init(KEY, params), 3)
    ends.append((run.params(state), metrics, state.point))
    assert run.step.compilations() == 1
    if run.mesh is not None:
      there = state.point["w"].sharding
      assert there.is_equivalent_to(NamedSharding(mesh, over), 2)
  halves.near(*ends, 5e-6)


@by_name
@pytest.mark.parametrize("warmup", [1.5, True, None])
def test_warm_up_is_a_number_of_steps(name, warmup):
  with pytest.raises(ValueError, match=f"{name}: `warmup`.*got {warmup}"):
    make(name, warmup=warmup)


@by_name
def test_an_optimizer_over_norms_is_refused_by_init(name):
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  run = dj.simulate(make(name, tx=tx), workers=2)
  with pytest.raises(ValueError, match=rf"{name} shards.*clip_norm=\.\.\."):
    begin(run)
