"""The state: other numbers of workers, low precision, statistics, a mesh."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sdp import toys

import distrain_jax as dj
from distrain_jax import inspect, spmd
from distrain_jax.methods.sdp import assignments

pytestmark = pytest.mark.core

N, KEY = toys.N, toys.KEY


def kinds(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
  ("level", "masking", "shard"), [case[:3] for case in toys.CASES]
)
def test_to_other_workers_and_back_is_the_same_to_the_bit(
  level, masking, shard
):
  case = toys.case(level, masking, shard)
  # Of two workers, a layer has one holder, who cannot have half its units.
  workers = 8 if level == "both" else 2
  others = dj.simulate(case.run.method, workers=workers)
  there = others.adopt(case.state)
  expected = others.abstract(KEY, toys.float32(toys.start()))
  assert kinds(there) == kinds(expected)
  toys.equal(others.params(there), case.params)
  back = case.run.adopt(toys.numpy(there))
  toys.equal(back, case.state)


def test_a_resharded_run_goes_on():
  case = toys.case("neuron", "forward", True)
  two = dj.simulate(case.run.method, workers=2)
  rows = toys.float32(toys.batch(9))
  state, losses = two.adopt(case.state), []
  for _ in range(8):
    state, metrics = two.step(state, rows, KEY)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  assert int(state.step) == toys.STEPS + 8


def test_labels_that_leave_parameters_out_are_resharded():
  tx = optax.multi_transform(
    {"fast": optax.adam(0.1), "still": optax.set_to_zero()},
    {k: "still" if k in ("s", "v") else "fast" for k in toys.NAMES},
  )
  method = toys.make(tx=tx, shard_optimizer=True)
  four, two = (dj.simulate(method, workers=n) for n in (4, 2))
  state = four.init(KEY, toys.float32(toys.start()))
  state, _ = four.step(state, toys.float32(toys.batch(0)), KEY)
  saved = toys.numpy(state)
  toys.equal(four.adopt(toys.numpy(two.adopt(saved))), saved)
  model = four.params(saved)
  toys.equal(model["v"], np.float32(toys.start()["v"]))


@pytest.mark.parametrize("shard", [False, True])
def test_masters_start_exact_and_parameters_are_their_roundings(shard):
  method = toys.make(
    shard_optimizer=shard, param_dtype="bfloat16", wire_dtype="bfloat16"
  )
  run = dj.simulate(method, workers=N)
  params = toys.float32(toys.start())
  state = run.init(KEY, params)
  masters = toys.numpy(state.masters)
  for k, x in masters.items():  # not rounded on the way
    found = np.unique(x[x != 0])
    np.testing.assert_array_equal(found, np.unique(params[k]))
  for i in range(3):
    state, metrics = run.step(state, toys.float32(toys.batch(i)), KEY)
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    jnp.dtype(jnp.bfloat16)
  }
  assert {x.dtype for x in jax.tree.leaves(state.masters)} == {
    jnp.dtype(jnp.float32)
  }
  moments = [state.opt_state[0].mu, state.opt_state[0].nu]
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(moments))
  if not shard:
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.masters)
    for k, x in rounded.items():
      kept = state.params.held[k]
      toys.equal(
        x if kept is not None else x[0],
        kept if kept is not None else state.params.shared[k],
      )
  exact = toys.Oracle("neuron", "forward", toys.masks("neuron"))
  losses = [exact.step(toys.batch(i))[0] for i in range(3)]
  np.testing.assert_allclose(metrics["loss"], losses[-1], rtol=0.05)
  model = run.params(state)
  assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
  two = dj.simulate(method, workers=2)
  saved = toys.numpy(state)
  toys.equal(run.adopt(toys.numpy(two.adopt(saved))), saved)


def wires(method, mesh):
  """Dtypes of what travels, of messages with more than scalars."""
  run = dj.distribute(method, mesh(N))
  state = run.abstract(KEY, toys.float32(toys.start()))
  closed = run.step.trace(state, toys.float32(toys.batch(0)), KEY).jaxpr
  found = {}

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      name = eqn.primitive.name
      if name.startswith(("psum", "ppermute", "all_", "reduce_scatter")):
        sizes = [x.aval for x in eqn.invars if x.aval.size > 1]
        found.setdefault(name.split("_inv")[0], set()).update(
          str(x.dtype) for x in sizes
        )
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(inner)

  walk(closed.jaxpr)
  return found


def test_gradients_travel_in_the_dtype_that_was_asked_for(mesh):
  found = wires(toys.make(wire_dtype="bfloat16"), mesh)
  assert found["ppermute"] == found["psum"] == {"bfloat16"}
  found = wires(toys.make(), mesh)
  assert found["ppermute"] == found["psum"] == {"float32"}


def averaged(params, model_state, rows, key):
  """A running mean of each hidden unit of the first layer, and of the loss."""
  loss, aux = toys.loss_fn(params, rows, key)
  hidden = jnp.tanh((rows["x"] * params["s"][:1]) @ params["a"][0])
  old = model_state["unit"]
  new = {
    "unit": 0.5 * old + 0.5 * hidden.mean(0),
    "loss": 0.5 * model_state["loss"] + 0.5 * loss,
    "steps": model_state["steps"] + 1,
  }
  return loss, (aux, new)


STATE_NAMES = {"unit": ("mlp",), "loss": (), "steps": ()}


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_statistics_of_units_are_means_over_their_holders(masking):
  params = toys.float32(toys.start())
  stats = {
    "unit": jnp.zeros(toys.M),
    "loss": jnp.zeros(()),
    "steps": jnp.zeros((), jnp.int32),
  }
  model = dj.Variables(params, stats)
  method = dj.sdp(
    dj.stateful(averaged),
    optax.sgd(0.0),
    names=dj.Variables(toys.NAMES, STATE_NAMES),
    shapes=toys.shapes_of(model),
    masking=masking,
  )
  run = dj.simulate(method, workers=N)
  rows = toys.batch(0)
  state = run.init(KEY, model)
  state, metrics = run.step(state, toys.float32(rows), KEY)
  got = run.params(state)
  toys.equal(got.params, params)
  p, units = toys.start(), np.zeros((N, toys.M))
  for w in range(N):
    x = rows["x"][4 * w : 4 * w + 4]
    units[w] = np.tanh((x * p["s"][0]) @ p["a"][0]).mean(0)
  on = (
    toys.masks("neuron")[:, 0] if masking == "forward" else np.ones_like(units)
  )
  expected = 0.5 * (units * on).sum(0) / on.sum(0)
  toys.near(got.model_state["unit"], expected, 1e-6)
  toys.near(got.model_state["loss"], 0.5 * float(metrics["loss"]), 1e-6)
  assert int(got.model_state["steps"]) == 1
  two = dj.simulate(method, workers=2)
  saved = toys.numpy(state)
  toys.equal(run.adopt(toys.numpy(two.adopt(saved))), saved)


@pytest.mark.parametrize(
  ("level", "masking", "shard"),
  [("neuron", "forward", True), ("block", "backward", False)],
)
def test_beside_an_axis_that_shards_the_model_the_numbers_are_the_same(
  level, masking, shard
):
  mesh = spmd.make_mesh({"data": N, "tensor": 2})
  over = {"a": P(None, "tensor"), "c": P(None, None, "tensor")}
  over |= {"s": P(None, "tensor"), "v": P("tensor"), "b": P(), "gain": P()}
  params = toys.float32(toys.start())
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  method = toys.case(level, masking, shard).run.method
  run = dj.distribute(method, mesh)
  state = run.init(KEY, jax.tree.map(place, params, over))
  for i in range(toys.STEPS):
    state, metrics = run.step(state, toys.float32(toys.batch(i)), KEY)
  assert run.step.compilations() == 1
  expected = toys.case(level, masking, shard)
  toys.near(run.params(state), expected.params, 5e-6)
  np.testing.assert_allclose(metrics["loss"], expected.seen[-1, 0], rtol=1e-5)


# Bytes a sampled parameter in float32 with Adam, and one that is shared.
HELD = {
  ("forward", False): (12 / 2, 12),
  ("forward", True): (4 / 2 + 8 / N, 4 + 8 / N),
  ("backward", False): (4 + 8 / 2, 12),
  ("backward", True): (4 + 8 / N, 4 + 8 / N),
}


@pytest.mark.parametrize(("masking", "shard"), HELD)
def test_it_holds_so_many_bytes_a_parameter(masking, shard, mesh):
  loss = lambda params, rows, key: (0.0, {})
  shapes = {
    "w": jax.ShapeDtypeStruct((64, 32), jnp.float32),
    "shared": jax.ShapeDtypeStruct((16, 8), jnp.float32),
  }
  method = dj.sdp(
    loss,
    optax.adam(1e-3),
    names={"w": ("hidden", None), "shared": (None, None)},
    shapes=shapes,
    masking=masking,
    shard_optimizer=shard,
  )
  run = dj.distribute(method, mesh(N))
  held = inspect.bytes_held(run.abstract(KEY, shapes))
  sampled, shared = HELD[masking, shard]
  assert held == sampled * 64 * 32 + shared * 16 * 8 + 4 * 2  # steps, counts


@pytest.mark.parametrize("shard", [False, True])
def test_what_some_numbers_of_workers_share_is_resharded(shard):
  def only_four(family, layers, units, workers):
    if family == "mlp" and workers != 4:
      return None
    return assignments.neurons(layers, units, workers, 0.5)

  shapes = {"a": (8, 3), "b": (6, 2)}
  params = {
    k: np.random.default_rng(0).normal(size=s).astype(np.float32)
    for k, s in shapes.items()
  }
  method = dj.sdp(
    lambda params, rows, key: (sum((x**2).mean() for x in params.values()), {}),
    optax.adam(0.1),
    names={"a": ("mlp", None), "b": ("hidden", None)},
    shapes=params,
    assignment=only_four,
    shard_optimizer=shard,
  )
  four, two = (dj.simulate(method, workers=n) for n in (4, 2))
  state, _ = four.step(
    four.init(KEY, params), {"x": np.zeros(4, np.float32)}, KEY
  )
  saved = toys.numpy(state)
  there = two.adopt(saved)
  assert kinds(there) == kinds(two.abstract(KEY, params))
  toys.equal(two.params(there), four.params(saved))
  toys.equal(four.adopt(toys.numpy(there)), saved)
