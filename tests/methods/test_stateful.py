"""Models with non-trained state: a hand-written BatchNorm in three ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd, variables

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
N, ROWS, WIDTH = 4, 16, 5
METHODS = {"ddp": dj.ddp, "zero1": dj.zero1}
by_method = pytest.mark.parametrize("name", METHODS)


def make_variables():
  w = jax.random.normal(KEY, (3, WIDTH))
  params = {"w": w, "scale": jnp.ones(WIDTH), "v": jnp.ones(WIDTH)}
  stats = {
    "mean": jnp.zeros(WIDTH),
    "var": jnp.ones(WIDTH),
    "seen": jnp.zeros((), jnp.int32),
  }
  return dj.Variables(params, stats)


def make_batch():
  x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
  x += np.linspace(0, 3, ROWS, dtype=np.float32)[:, None]  # workers differ
  return {"x": x, "y": np.sin(x.sum(1))}


def loss_fn(params, stats, batch, key, axis=None):
  """BatchNorm over this worker's rows, or over all rows of the axis."""
  del key
  hidden = batch["x"] @ params["w"]
  mean, square = hidden.mean(0), (hidden**2).mean(0)
  if axis:
    mean, square = jax.lax.pmean((mean, square), axis)
  var = square - mean**2
  normal = (hidden - mean[None]) / jnp.sqrt(var + 1e-3)[None]
  out = jnp.tanh(normal * params["scale"][None]) @ params["v"]
  new = {
    "mean": 0.9 * stats["mean"] + 0.1 * mean,
    "var": 0.9 * stats["var"] + 0.1 * var,
    "seen": stats["seen"] + 1,
  }
  return jnp.mean((out - batch["y"]) ** 2), ({"out": out.mean()}, new)


def running(hidden, steps=1):
  """Running statistics of rows after some steps, in NumPy."""
  mean, var = np.zeros(WIDTH), np.ones(WIDTH)
  for _ in range(steps):
    mean = 0.9 * mean + 0.1 * hidden.mean(0)
    var = 0.9 * var + 0.1 * hidden.var(0)
  return {"mean": mean, "var": var, "seen": steps}


def workers_running(steps=1):
  """Each worker's own, as a list; w does not move with rate 0."""
  hidden = make_batch()["x"] @ np.asarray(make_variables().params["w"])
  return [running(part, steps) for part in np.split(hidden, N)]


near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def start(name, stats, runner, mesh, tx=None, **options):
  fn = functools.partial(
    loss_fn, axis="data" if stats == "synchronised" else None
  )
  method = METHODS[name](
    dj.stateful(fn, stats=stats), tx or optax.sgd(0.0), **options
  )
  if runner == "simulate":
    return dj.simulate(method, workers=N)
  return dj.distribute(method, mesh(N))


def train(run, steps):
  state = run.init(KEY, make_variables())
  for _ in range(steps):
    state, metrics = run.step(state, make_batch(), KEY)
  return state, metrics


def average(trees):
  return jax.tree.map(lambda *x: np.mean(x, 0), *trees)


@by_method
def test_averaged_statistics_are_the_mean_of_the_workers(name, mesh):
  run = start(name, "averaged", "distribute", mesh)
  state, _ = train(run, 2)
  jax.tree.map(near, state.model_state, average(workers_running(2)))
  assert state.model_state["seen"].dtype == jnp.int32
  jax.tree.map(near, run.params(state).model_state, state.model_state)
  assert run.step.compilations() == 1


@by_method
def test_local_statistics_stay_each_workers_own_until_they_are_read(name, mesh):
  run = start(name, "local", "distribute", mesh)
  state, _ = train(run, 2)
  for w, expected in enumerate(workers_running(2)):
    own = jax.tree.map(lambda x, w=w: x[w], state.model_state)
    jax.tree.map(near, own, expected)
  read = run.params(state)
  assert isinstance(read, dj.Variables)
  jax.tree.map(near, read.model_state, average(workers_running(2)))
  assert run.step.compilations() == 1


@pytest.mark.parametrize("runner", ["simulate", "distribute"])
@by_method
def test_synchronised_batchnorm_equals_one_device_with_the_big_batch(
  name, runner, mesh
):
  tx = optax.sgd(0.1, momentum=0.9)
  run = start(name, "synchronised", runner, mesh, tx)
  state, metrics = train(run, 5)
  model = run.params(state)

  params, stats = make_variables()
  opt_state = tx.init(params)

  @jax.jit
  def step(params, stats, opt_state):
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (_, stats)), grads = grad_fn(params, stats, make_batch(), KEY)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state, loss

  for _ in range(5):
    params, stats, opt_state, loss = step(params, stats, opt_state)
  jax.tree.map(near, model, dj.Variables(params, stats))
  near(metrics["loss"], loss)


@pytest.mark.parametrize(
  ("name", "stats"), [("ddp", "local"), ("zero1", "averaged")]
)
def test_simulated_equals_distributed_with_microbatches(name, stats, mesh):
  results = []
  for runner in ("simulate", "distribute"):
    run = start(name, stats, runner, mesh, optax.sgd(0.1), accumulate=2)
    state, metrics = train(run, 3)
    results.append((run.params(state), state.model_state, metrics))
    assert int(run.params(state).model_state["seen"]) == 6
  jax.tree.map(near, *results)


@pytest.mark.parametrize("stats", ["averaged", "synchronised"])
@by_method
def test_statistics_declared_equal_are_equal_on_all_workers(name, stats, mesh):
  run = start(name, stats, "distribute", mesh)
  method, each = run.method, P("data")
  only_stats = lambda state, batch, key: (
    method.step(state, batch, key)[0].model_state
  )
  fn = spmd.mesh_runner(mesh(N), "data")(
    only_stats, (method.specs, each, P()), each
  )
  batch = spmd.split_rows(make_batch(), N)
  rows = jax.jit(fn)(run.init(KEY, make_variables()), batch, KEY)
  for x in map(np.asarray, jax.tree.leaves(rows)):
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))


@by_method
def test_local_statistics_go_to_other_workers_as_their_mean(name):
  run = start(name, "local", "simulate", None)
  state, _ = train(run, 2)
  few = dj.simulate(run.method, workers=2)
  adopted = few.adopt(state)
  for w in range(2):
    own = jax.tree.map(lambda x, w=w: x[w], adopted.model_state)
    jax.tree.map(near, own, average(workers_running(2)))
  assert adopted.model_state["seen"].dtype == jnp.int32
  few.step(adopted, make_batch(), KEY)


@by_method
def test_variables_and_stateful_losses_come_together(name):
  plain = lambda params, batch, key: (jnp.sum(params), {})
  run = dj.simulate(METHODS[name](plain, optax.sgd(0.1)), workers=2)
  with pytest.raises(TypeError, match=r"Wrap it: stateful\(loss_fn\)"):
    run.init(KEY, make_variables())
  stateful = dj.stateful(loss_fn)
  run = dj.simulate(METHODS[name](stateful, optax.sgd(0.1)), workers=2)
  with pytest.raises(TypeError, match=r"must be Variables.*got dict"):
    run.init(KEY, make_variables().params)


def test_a_pair_that_is_not_variables_is_one_model():
  loss = lambda params, batch, key: (0.0, {})
  assert variables.split(loss, (1, 2)) == ((1, 2), ())


def test_unknown_treatments_are_refused():
  with pytest.raises(
    ValueError, match=r"averaged, local, synchron.*got 'mean'"
  ):
    dj.stateful(loss_fn, stats="mean")
