"""Where states and models lie on the axes that a method leaves automatic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import methods, spmd

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
TX = optax.adam(1e-2)
OPTIONS = {  # XLA for CPU aborts on bfloat16 sums over one axis of several
  "acco": {"wire_dtype": None},
  "dpu": {"wire_dtype": None},
  "weight_prediction": {"wire_dtype": None},
  "diloco": {"sync_every": 2},
  **{name: {"axis": "data"} for name in methods.POPULATIONS},
  "papa": {"axis": "data", "tied": False},
}
# Parts of arrays, as sdp's, are not recognised: they lie whole along other axes.
WHOLE = [name for name in methods.OF_A_LOSS if name != "sdp"]
by_name = pytest.mark.parametrize("name", WHOLE)


def loss_fn(params, seen, rows, key):
  del key
  hidden = jnp.tanh(rows["x"] @ params["w"] + params["b"][None])
  error = params["gain"] * (hidden @ params["v"]) - rows["y"]
  return jnp.mean(error**2), ({}, {"mean": 0.9 * seen["mean"] + hidden.mean(0)})


def model():
  w, v = jax.random.split(KEY, 2)
  params = {
    "w": jax.random.normal(w, (4, 8)),
    "b": jnp.zeros(8),
    "v": jax.random.normal(v, (8,)),
    "gain": jnp.ones(()),
  }
  return dj.Variables(params, {"mean": jnp.zeros(8)})


def rows():
  x = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(1))}


def make(name, loss=None, tx=TX):
  loss = dj.stateful(loss_fn) if loss is None else loss
  return methods.FACTORIES[name](loss, tx, **OPTIONS.get(name, {}))


def sharded(axes):
  """A mesh, and a model that is sharded over all of it but the workers."""
  mesh = spmd.make_mesh(axes)
  over = tuple(axes)[1:]
  specs = {"w": P(None, over), "b": P(over), "v": P(over[-1]), "gain": P()}
  specs = dj.Variables(specs, {"mean": P(over)})
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return mesh, jax.tree.map(place, model(), specs)


def assert_where(got, expected):
  def one(x, y):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert x.addressable_shards[0].data.shape == (
      y.addressable_shards[0].data.shape
    )

  jax.tree.map(one, got, expected)


def assert_near(got, expected):
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)
  jax.tree.map(near, got, expected)


def assert_equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def steps(run, given, count=2):
  state = run.init(KEY, given)
  for _ in range(count):
    state, _ = run.step(state, rows(), KEY)
  return state


@pytest.mark.parametrize(
  "axes",
  [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}],
  ids=["two others", "one worker"],
)
@by_name
def test_a_model_is_read_where_the_one_that_was_given_lies(name, axes):
  mesh, given = sharded(axes)
  run = dj.distribute(make(name), mesh)
  read = run.params(run.init(KEY, given))
  assert_where(read, given)
  assert_equal(read, given)


@by_name
def test_so_it_is_after_steps_and_has_the_values_of_one_device(name):
  mesh, given = sharded({"data": 2, "tensor": 4})
  run = dj.distribute(make(name), mesh)
  read = run.params(steps(run, given))
  assert_where(read, given)
  alone = dj.simulate(make(name), workers=2)
  assert_near(read, alone.params(steps(alone, model())))
  assert float(read.params["gain"]) != 1.0
  assert run.step.compilations() == run.params.compilations() == 1


@pytest.mark.parametrize("name", ["zero1", "acco", "fsdp"])
def test_parameters_without_statistics_lie_as_those_with_them(name):
  mesh, given = sharded({"data": 2, "tensor": 4})
  still = lambda params, rows, key: (0.0 * params["w"].sum(), {})
  run = dj.distribute(dj.guard(make(name, still)), mesh)
  read = run.params(run.init(KEY, given.params))
  assert_where(read, given.params)
  assert_equal(read, given.params)


def test_a_model_of_one_array_lies_as_it_did():
  mesh, given = sharded({"data": 2, "tensor": 4})
  still = lambda params, rows, key: (0.0 * params.sum(), {})
  run = dj.distribute(make("acco", still), mesh)
  read = run.params(run.init(KEY, given.params["w"]))
  assert_where(read, given.params["w"])
  assert_equal(read, given.params["w"])


@pytest.mark.parametrize("name", ["ddp", "local_sgd", "fsdp"])
def test_moments_lie_where_the_parameters_of_variables_do(name):
  mesh, given = sharded({"data": 2, "tensor": 4})
  run = dj.distribute(make(name), mesh)
  state = run.init(KEY, given)
  held = lambda tree: [
    x.addressable_shards[0].data.size for x in jax.tree.leaves(tree)
  ]
  for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
    assert sum(held(moments)) == sum(held(state.params))
  assert sum(held(state.params)) < 32 + 8 + 8 + 1


def test_a_model_is_read_from_a_state_that_lies_nowhere():
  mesh, given = sharded({"data": 2, "tensor": 4})
  run = dj.distribute(make("acco"), mesh)
  state = steps(run, given)
  saved = jax.tree.map(np.asarray, state)
  assert_near(run.params(saved), run.params(state))


def test_one_run_takes_models_of_other_structures_and_shapes():
  def total(params, rows, key):
    return sum(x.sum() for x in jax.tree.leaves(params)), {}

  mesh = spmd.make_mesh({"data": 2, "tensor": 4})
  run = dj.distribute(make("zero1", total, optax.sgd(1.0)), mesh)
  place = NamedSharding(mesh, P("tensor"))
  for name, size in [("a", 8), ("b", 8), ("b", 4)]:
    given = jax.device_put({name: jnp.ones(size)}, place)
    state, _ = run.step(run.init(KEY, given), rows(), KEY)
    read = run.params(state)
    assert_where(read, given)
    assert_equal(read, {name: np.zeros(size)})
