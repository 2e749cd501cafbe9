"""`simulate` and `distribute`: whichever mesh, sharding or batch comes in."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd
from distrain_jax.method import Method

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
TX = optax.adam(1e-2)
KINDS = [AxisType.Auto, AxisType.Explicit]


def loss_fn(params, batch, key):
  del key
  hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
  return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2), {}


# For tests that ask nothing of the method.
DDP = dj.ddp(loss_fn, optax.sgd(0.01, momentum=0.9))


def make_params():
  keys = jax.random.split(KEY, 2)
  return {
    "w": jax.random.normal(keys[0], (4, 8)),
    "b": jnp.zeros(8),
    "v": jax.random.normal(keys[1], (8,)),
  }


def make_batch(rows=16):
  x = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(1))}


@pytest.fixture(params=[dj.ddp, dj.zero1], ids=["ddp", "zero1"])
def method(request):
  return request.param(loss_fn, TX)


def train(run, params, steps=3):
  state = run.init(KEY, params)
  for _ in range(steps):
    state, metrics = run.step(state, make_batch(), KEY)
  return state, metrics


def assert_near(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), a, b
  )


@pytest.fixture(scope="module")
def simulated():
  """What two workers get on one device, without any mesh."""
  run = dj.simulate(dj.ddp(loss_fn, TX), workers=2)
  state, metrics = train(run, make_params())
  return run.params(state), metrics


def tensor_mesh(kind):
  return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)


def sharded_params(mesh):
  """w and b over `tensor`, v on every device."""
  specs = {"w": P(None, "tensor"), "b": P("tensor"), "v": P()}
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return jax.tree.map(place, make_params(), specs)


@pytest.mark.parametrize(
  ("factory", "kind", "current"),
  [
    (dj.ddp, AxisType.Auto, False),
    (dj.ddp, AxisType.Auto, True),
    (dj.ddp, AxisType.Explicit, False),
    (dj.ddp, AxisType.Explicit, True),
    (dj.zero1, AxisType.Auto, False),
    (dj.zero1, AxisType.Explicit, True),
  ],
)
def test_parameters_sharded_over_another_axis_stay_so(
  factory, kind, current, simulated
):
  """`current`: the caller has made this mesh the current one."""
  method = factory(loss_fn, TX)
  mesh = tensor_mesh(kind)
  with jax.set_mesh(mesh) if current else contextlib.nullcontext():
    run = dj.distribute(method, mesh)
    params = sharded_params(mesh)
    like = run.abstract(KEY, params)
    state, metrics = train(run, params)
    model = run.params(state)
  assert run.step.compilations() == 1
  assert_near((model, metrics), simulated)
  same = lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim)
  assert jax.tree.all(jax.tree.map(same, state, like))
  over_tensor = jax.NamedSharding(spmd.auto_mesh(mesh), P(None, "tensor"))
  for tree in (state.params, model):
    assert tree["w"].sharding.is_equivalent_to(over_tensor, 2)
  if method.name == "ddp":  # moments lie where parameters do
    for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
      assert moments["w"].sharding.is_equivalent_to(over_tensor, 2)
      assert moments["w"].addressable_shards[0].data.shape == (4, 2)


def test_an_axis_of_one_worker_beside_a_sharded_one(method):
  mesh = spmd.make_mesh({"data": 1, "fsdp": 8})
  params = jax.tree.map(
    lambda x: (
      jax.device_put(x, NamedSharding(mesh, P("fsdp")))
      if x.shape == (8,)
      else x
    ),
    make_params(),
  )
  run = dj.distribute(method, mesh)
  state, metrics = train(run, params)
  assert run.step.compilations() == 1
  alone = dj.simulate(method, workers=1)
  expected = train(alone, make_params())
  assert_near(
    (run.params(state), metrics), (alone.params(expected[0]), expected[1])
  )
  assert state.params["v"].addressable_shards[0].data.shape == (1,)


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
def test_a_simulation_ignores_the_mesh_that_a_caller_has_set(kind, simulated):
  with jax.set_mesh(tensor_mesh(kind)):
    run = dj.simulate(dj.ddp(loss_fn, TX), workers=2)
    state, metrics = train(run, jax.tree.map(np.asarray, make_params()))
    assert_near((run.params(state), metrics), simulated)


@pytest.mark.parametrize("where", ["another device", "another mesh"])
def test_parameters_that_lie_elsewhere_are_brought(where, mesh):
  if where == "another device":
    params = jax.device_put(make_params(), jax.devices()[7])
  else:
    params = jax.device_put(make_params(), NamedSharding(mesh(8), P()))
  expected = make_params()
  for run in (
    dj.simulate(DDP, workers=2),
    dj.distribute(DDP, mesh(2)),
  ):
    state = run.init(KEY, params)
    jax.tree.map(np.testing.assert_array_equal, run.params(state), expected)


@pytest.mark.parametrize("runner", ["simulate", "distribute"])
def test_parameters_that_lie_there_already_are_copied(runner, mesh):
  if runner == "simulate":
    run, place = dj.simulate(DDP, workers=2), jax.devices()[0]
  else:
    run = dj.distribute(DDP, mesh(2))
    place = NamedSharding(mesh(2), P())
  params = jax.device_put(make_params(), place)
  run.step(run.init(KEY, params), make_batch(), KEY)  # donates the state
  jax.tree.map(np.testing.assert_array_equal, params, make_params())


def test_names_of_axes_that_this_mesh_has_not_are_dropped():
  theirs = jax.make_mesh(
    (2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  params = make_params()
  params["w"] = jax.device_put(
    params["w"], NamedSharding(theirs, P(None, "model"))
  )
  run = dj.distribute(DDP, tensor_mesh(AxisType.Auto))
  state, _ = train(run, params, steps=1)
  assert state.params["w"].sharding.is_fully_replicated


@pytest.mark.parametrize("workers", [1, 8])
def test_parameters_sharded_over_the_workers_own_axis_are_gathered(
  workers, method
):
  mesh = spmd.make_mesh({"data": workers, "tensor": 8 // workers})
  params = make_params()
  params["v"] = jax.device_put(params["v"], NamedSharding(mesh, P("data")))
  run = dj.distribute(method, mesh)
  state = run.init(KEY, params)
  assert state.params["v"].sharding.is_fully_replicated
  for _ in range(2):
    state, _ = run.step(state, make_batch(), KEY)
  assert run.step.compilations() == 1


def test_replication_said_in_other_words_compiles_no_second_step(method, mesh):
  in_words = lambda x: NamedSharding(mesh(2), P(*[None] * x.ndim))
  params = jax.tree.map(lambda x: jax.device_put(x, in_words(x)), make_params())
  run = dj.distribute(method, mesh(2))
  train(run, params, steps=2)
  assert run.step.compilations() == 1


def test_abstract_says_where_everything_will_be(method, mesh):
  run = dj.distribute(method, mesh(4))
  like = run.abstract(KEY, jax.eval_shape(make_params))
  state = run.init(KEY, make_params())

  def same(x, s):
    assert (x.shape, x.dtype) == (s.shape, s.dtype)
    assert x.sharding.is_equivalent_to(s.sharding, x.ndim)

  jax.tree.map(same, state, like)


def test_a_step_of_a_loss_without_key_lowers_from_abstract_values(method, mesh):
  run = dj.distribute(method, mesh(4))
  like = run.abstract(KEY, jax.eval_shape(make_params))
  batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch()))
  key = jax.eval_shape(lambda: jax.random.key(0))
  assert "stablehlo" in run.step.lower(like, batch, key).as_text()
  assert run.step.compilations() == 0


def test_put_places_each_workers_rows_on_its_device(mesh):
  run = dj.distribute(DDP, mesh(4))
  batch = make_batch()
  placed = run.put(batch)
  assert placed["x"].sharding.spec == P("data")
  np.testing.assert_array_equal(placed["x"], batch["x"])
  first = placed["x"].addressable_shards[0]
  np.testing.assert_array_equal(first.data, batch["x"][:4])
  state = run.init(KEY, make_params())
  state, _ = run.step(state, placed, KEY)
  again, _ = run.step(run.init(KEY, make_params()), batch, KEY)
  assert_near(state, again)
  simulated = dj.simulate(DDP, workers=4)
  np.testing.assert_array_equal(simulated.put(batch)["x"], batch["x"])


def test_put_refuses_rows_that_do_not_divide_among_the_workers(mesh):
  run = dj.distribute(DDP, mesh(4))
  with pytest.raises(ValueError, match=r"batch\['x'\].*the 4\s+workers"):
    run.put(make_batch(rows=10))


def test_without_donation_the_old_state_stays(mesh):
  for run in (
    dj.simulate(DDP, workers=2, donate=False),
    dj.distribute(DDP, mesh(2), donate=False),
  ):
    state = run.init(KEY, make_params())
    once, again = (run.step(state, make_batch(), KEY) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_a_state_of_numpy_arrays_is_taken_beside_an_automatic_axis():
  run = dj.distribute(DDP, tensor_mesh(AxisType.Auto))
  state, _ = train(run, make_params(), steps=1)
  saved = jax.tree.map(np.asarray, state)
  expected, _ = run.step(state, make_batch(), KEY)
  got, _ = run.step(saved, make_batch(), KEY)
  assert_near(got, expected)


def total(params, batch, key):
  del batch, key
  return sum(x.sum() for x in jax.tree.leaves(params)), {}


@pytest.mark.parametrize(
  ("rows", "accumulate", "says"),
  [
    (10, 1, r"batch\['x'\] has shape \(10, 4\).*multiple of the 4 workers"),
    (8, 3, r"batch\['x'\] has shape \(2, 4\) on each worker.*accumulate=3"),
    (0, 1, r"batch\['x'\] has shape \(0, 4\)"),
  ],
)
@pytest.mark.parametrize("runner", ["simulate", "distribute"])
def test_a_batch_that_does_not_divide_is_refused(
  rows, accumulate, says, runner, mesh
):
  method = dj.ddp(total, optax.sgd(0.1), accumulate=accumulate)
  if runner == "simulate":
    run = dj.simulate(method, workers=4)
  else:
    run = dj.distribute(method, mesh(4))
  state = run.init(KEY, {"w": jnp.ones(3)})
  with pytest.raises(ValueError, match=says):
    run.step(state, {"x": np.zeros((rows, 4), np.float32)}, KEY)


def test_a_mesh_without_the_methods_axis_is_refused(mesh):
  method = dj.zero1(total, TX, axis="worker")
  says = r"zero1 works on the axis 'worker', but the mesh has \{'data': 4\}"
  with pytest.raises(ValueError, match=says) as e:
    dj.distribute(method, mesh(4))
  assert "axis='data'" in str(e.value)


@pytest.mark.parametrize("bad", [0, -2, 2.5, "4", None])
def test_simulated_workers_are_a_whole_number_from_one(bad):
  with pytest.raises(ValueError, match=f"`workers`.*got {bad!r}"):
    dj.simulate(dj.ddp(total, TX), workers=bad)


def test_another_axis_name_works(mesh):
  method = dj.zero1(total, optax.sgd(0.1), axis="worker")
  named = spmd.make_mesh({"worker": 2}, jax.devices()[:2])
  for run in (dj.simulate(method, workers=2), dj.distribute(method, named)):
    state, _ = train(run, {"w": jnp.ones(3)}, steps=1)
    np.testing.assert_allclose(run.params(state)["w"], 0.9)


def test_one_model_per_worker_means_nothing_to_methods_that_share_one(method):
  run = dj.simulate(method, workers=2)
  with pytest.raises(ValueError, match=f"{method.name}: all workers start"):
    run.init(KEY, make_params(), per_worker=True)


def population():
  """Members that never speak; each may start from its own model."""

  def step(w, batch, key):
    del batch, key
    return w + 1 + jax.lax.axis_index("data"), {"loss": jnp.zeros(())}

  return Method(
    name="population",
    axis="data",
    init=lambda key, w: w,
    step=step,
    params=lambda w: jax.lax.pmean(w, "data"),
    specs=P("data"),
    population=True,
  )


@pytest.mark.parametrize("runner", ["simulate", "distribute"])
def test_members_of_a_population_start_from_their_own_models(runner, mesh):
  if runner == "simulate":
    run = dj.simulate(population(), workers=4)
  else:
    run = dj.distribute(population(), mesh(4))
  batch = {"x": np.zeros(4)}
  starts = jnp.arange(8.0).reshape(4, 2)
  state, _ = run.step(run.init(KEY, starts, per_worker=True), batch, KEY)
  assert not starts.is_deleted()
  np.testing.assert_array_equal(state, starts + np.arange(1, 5)[:, None])
  np.testing.assert_array_equal(run.params(state), np.mean(state, 0))
  shared = run.init(KEY, starts[1])
  np.testing.assert_array_equal(shared, np.tile(starts[1], (4, 1)))
  with pytest.raises(ValueError, match=r"shape \(3, 2\).*the 4 workers"):
    run.init(KEY, starts[:3], per_worker=True)


def test_a_method_that_cannot_change_its_workers_says_so():
  run = dj.simulate(population(), workers=4)
  with pytest.raises(ValueError, match="cannot change its number of workers"):
    run.adopt(np.zeros((8, 2)))


def test_an_adopted_state_goes_from_mesh_to_mesh(method, mesh):
  many, few = (dj.distribute(method, mesh(n)) for n in (8, 4))
  state, _ = train(many, make_params(), steps=2)
  saved = jax.tree.map(np.asarray, state)
  adopted = few.adopt(state)
  like = few.abstract(KEY, make_params())

  def same(x, s):
    assert (x.shape, x.dtype) == (s.shape, s.dtype)
    assert x.sharding.is_equivalent_to(s.sharding, x.ndim)

  jax.tree.map(same, adopted, like)
  further, _ = few.step(adopted, make_batch(), KEY)
  # Stepping donated the adopted state and not what it was made from.
  jax.tree.map(np.testing.assert_array_equal, state, saved)
  expected, _ = many.step(state, make_batch(), KEY)
  assert_near(few.params(further), many.params(expected))
  assert few.step.compilations() == 1


def test_an_adopted_state_keeps_its_sharding_over_other_axes(method):
  mesh = tensor_mesh(AxisType.Auto)
  run = dj.distribute(method, mesh)
  state = run.init(KEY, sharded_params(mesh))
  adopted = run.adopt(state)
  same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
  assert jax.tree.all(jax.tree.map(same, adopted, state))
  run.step(adopted, make_batch(), KEY)  # donates what is adopted's alone
  assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_simulated_on_a_mesh_its_arrays_lie_there_and_are_those_of_devices():
  on = lambda devices: spmd.make_mesh({"data": -1}, devices)
  method = dj.zero1(loss_fn, TX)
  here = dj.simulate(method, workers=4, mesh=on(jax.devices()[3:4]))
  there = dj.distribute(method, on(jax.devices()[:4]))
  (state, _), (wanted, _) = (train(run, make_params()) for run in (here, there))
  assert_near(state, wanted)
  for x, y in zip(*map(jax.tree.leaves, (state, wanted))):
    assert x.sharding.device_set == {jax.devices()[3]} and x.shape == y.shape
  with pytest.raises(ValueError, match=r"on one device, but `mesh` has 2"):
    dj.simulate(method, workers=4, mesh=on(jax.devices()[:2]))
  with pytest.raises(ValueError, match=r"works on the axis 'data', but"):
    one = spmd.make_mesh({"rows": 1}, jax.devices()[:1])
    dj.simulate(method, workers=4, mesh=one)
