"""What every method promises, for every method: one table, one contract."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd

pytestmark = pytest.mark.core

N = 4
STEPS = 3
WIDTH = 6  # hidden units: as many as no number of workers here divides


def decays(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


# A new method adds one line: (loss_fn, tx) -> Method with its hardest settings.
METHODS = {
  "ddp": lambda loss_fn, tx: dj.ddp(loss_fn, tx, accumulate=2, clip_norm=0.3),
  "zero1": lambda loss_fn, tx: dj.zero1(
    loss_fn, tx, accumulate=2, clip_norm=0.3
  ),
  "zero1_low": lambda loss_fn, tx: dj.zero1(
    loss_fn,
    tx,
    accumulate=2,
    clip_norm=0.3,
    wire_dtype="bfloat16",
    param_dtype="bfloat16",
  ),
  "zero1_leaves": lambda loss_fn, tx: dj.zero1(
    loss_fn,
    tx,
    accumulate=2,
    clip_norm=0.3,
    wire_dtype="bfloat16",
    param_dtype="bfloat16",
    shard="leaves",
  ),
  "fsdp": lambda loss_fn, tx: dj.fsdp(loss_fn, tx, accumulate=2, clip_norm=0.3),
  "acco": lambda loss_fn, tx: dj.acco(
    loss_fn, tx, accumulate=2, clip_norm=0.3, wire_dtype=None
  ),
  "acco_low": lambda loss_fn, tx: dj.acco(
    loss_fn,
    tx,
    accumulate=2,
    clip_norm=0.3,
    wire_dtype="bfloat16",
    param_dtype="bfloat16",
    estimate_dtype="int8",
    warmup=1,
  ),
  "dpu": lambda loss_fn, tx: dj.dpu(
    loss_fn,
    tx,
    accumulate=2,
    clip_norm=0.3,
    param_dtype="bfloat16",
    warmup=1,
  ),
  "weight_prediction": lambda loss_fn, tx: dj.weight_prediction(
    loss_fn, tx, accumulate=2, clip_norm=0.3, wire_dtype=None
  ),
  "guarded": lambda loss_fn, tx: dj.guard(dj.zero1(loss_fn, tx), spike=3.0),
  "local_sgd": lambda loss_fn, tx: dj.local_sgd(
    loss_fn,
    tx,
    sync_every=2,
    accumulate=2,
    clip_norm=0.3,
    opt_state="averaged",
  ),
  "diloco": lambda loss_fn, tx: dj.diloco(
    loss_fn,
    tx,
    sync_every=3,
    outer_momentum=0.3,
    fragments=2,
    delay=1,
    mix=0.5,
    accumulate=2,
    clip_norm=0.3,
  ),
  "wash": lambda loss_fn, tx: dj.wash(
    loss_fn,
    tx,
    axis="data",
    rate=0.9,
    shuffle_optimizer=True,
    period=2,
    stop_after=100,
    tied=True,
    relative_rate=lambda step: 1.0 - step / 200,
    accumulate=2,
    clip_norm=0.3,
    learning_rates=(1.0, 0.9, 1.1, 0.8, 1.0, 1.2, 0.7, 0.9),
  ),
  "papa": lambda loss_fn, tx: dj.papa(
    loss_fn,
    tx,
    axis="data",
    every=2,
    alpha=0.7,
    relative_rate=lambda step: 1.0 - step / 200,
  ),
  "dart": lambda loss_fn, tx: dj.dart(
    loss_fn,
    tx,
    axis="data",
    joint_steps=1,
    every=2,
    weight=0.5,
    opt_state="averaged",
    clip_norm=0.3,
  ),
}
# Rows of a method that is made for one tree and a number of workers: options.
HALF = {"coverage": 0.5, "accumulate": 2, "clip_norm": 0.3}
LOW = {"wire_dtype": "bfloat16", "param_dtype": "bfloat16"}
SUBNETWORKS = {
  "sdp": {**HALF, "assignment": "shuffled"},
  "sdp_low": {**HALF, **LOW, "shard_optimizer": True},
  "sdp_backward": {**HALF, "masking": "backward"},
}
# Numbers that travel in bfloat16 are summed in another order or precision.
ROUNDING = {
  "zero1_low": 2e-2,
  "zero1_leaves": 2e-2,
  "acco_low": 2e-2,
  "dpu": 2e-2,
  "sdp_low": 2e-2,
}
# What a key picks depends on the order of the leaves.
BY_ORDER = ("wash",)
OPTIMIZERS = {  # made once: ZeRO-1 judges each object once
  "sgd": optax.sgd(0.05),
  "momentum": optax.sgd(0.05, momentum=0.9, nesterov=True),
  "adamw": optax.adamw(
    optax.linear_schedule(0.01, 0.05, transition_steps=4), mask=decays
  ),
}


def make(name, loss_fn, tx, params=None, workers=N):
  """The method of a row; `params` are the toy model's if none are given."""
  if name in METHODS:
    return METHODS[name](loss_fn, tx)
  options = dict(SUBNETWORKS[name])
  if workers == 1:
    options["coverage"] = 1.0  # nobody else could hold the rest
  params = make_params() if params is None else params
  axes = lambda x: tuple("hidden" if n == WIDTH else None for n in x.shape)
  names = jax.tree.map(axes, params)
  return dj.sdp(loss_fn, tx, names=names, shapes=params, **options)


def draw(key):
  """In [0, 1): a key's own bits are random, and compile faster than a draw."""
  return (jax.random.key_data(key)[0] >> 8).astype(jnp.float32) * 2.0**-24


def loss_fn(params, batch, key):
  """A small net with noise; aux w{i} is 1/N of what worker i drew."""
  u, mine = draw(key), batch["worker"][0]
  x = (batch["x"] * (1 + 0.1 * u)).astype(params["w"].dtype)
  hidden = jnp.tanh(x @ params["w"] + params["b"][None])
  error = params["gain"] * (hidden @ params["v"]) - batch["y"]
  draws = {f"w{i}": jnp.where(mine == i, u, 0.0) for i in range(N)}
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error)), **draws}


def make_params(dtype=jnp.float32):
  """Sizes 18, 6, 6 and 1: nothing divides by the workers; one is a scalar."""
  keys = jax.random.split(jax.random.key(1), 2)
  params = {
    "w": jax.random.normal(keys[0], (3, WIDTH)),
    "b": jnp.zeros(WIDTH),
    "v": jax.random.normal(keys[1], (WIDTH,)),
    "gain": jnp.ones(()),
  }
  return jax.tree.map(lambda x: x.astype(dtype), params)


def make_batch(workers=N, rows=16):
  rng = np.random.default_rng(2)
  x = rng.normal(size=(rows, 3)).astype(np.float32)
  worker = np.repeat(np.arange(workers), rows // workers)
  return {"x": x, "y": np.sin(x.sum(1)), "worker": worker}


KEY = functools.partial(jax.random.key, 3)


class Started(NamedTuple):
  name: str
  run: dj.Run
  params: dict
  saved: object  # the state after one step, as a checkpoint holds it
  like: object  # the state's shapes and shardings

  def state(self):
    """A fresh copy of the saved state: a step donates what it is given."""
    put = lambda x, like: jax.device_put(x, like.sharding)
    return jax.tree.map(put, self.saved, self.like)


def start(name, optimizer, mesh):
  method = make(name, loss_fn, OPTIMIZERS[optimizer])
  if mesh is None:
    run = dj.simulate(method, workers=N)
  else:
    run = dj.distribute(method, mesh)
  params = make_params()
  like = run.abstract(KEY(), params)
  state, _ = run.step(run.init(KEY(), params), make_batch(), KEY())
  return Started(name, run, params, jax.tree.map(np.asarray, state), like)


@pytest.fixture(scope="module")
def cases(mesh):
  """(method, optimizer, runner) -> Started, compiled once."""

  @functools.cache
  def case(name, optimizer, runner):
    return start(name, optimizer, mesh(N) if runner == "distribute" else None)

  return case


@pytest.fixture(params=[*METHODS, *SUBNETWORKS])
def name(request):
  return request.param


# On one device; on a mesh, the optimizer with most state.
STARTS = [("simulate", optimizer) for optimizer in OPTIMIZERS]
STARTS += [("distribute", "adamw")]


# Where an optimizer is applied in a way of its own; others share one of these.
EVERY_OPTIMIZER = ("ddp", "zero1", "acco_low", "sdp_low")


STARTED = [
  (name, *start)
  for name in (*METHODS, *SUBNETWORKS)
  for start in STARTS
  if start[1] == "adamw" or name in EVERY_OPTIMIZER
]


@pytest.fixture(params=STARTED, ids="-".join)
def started(request, cases):
  name, runner, optimizer = request.param
  return cases(name, optimizer, runner)


@pytest.fixture(params=["simulate", "distribute"])
def adamw(request, cases, name):
  """Where the optimizer makes no difference, the one with most state."""
  return cases(name, "adamw", request.param)


def steps(run, state, count=STEPS, key=None):
  for _ in range(count):
    state, metrics = run.step(
      state, make_batch(), KEY() if key is None else key
    )
  return state, metrics


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_near(a, b, tolerance):
  def one(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)

  jax.tree.map(one, a, b)


def kinds(tree):
  """Structure, shapes, dtypes."""
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_a_step_keeps_structure_shapes_dtypes_and_shardings(started):
  before = started.run.init(KEY(), started.params)
  assert kinds(before) == kinds(started.like)
  placed = lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim)
  assert jax.tree.all(jax.tree.map(placed, before, started.like))
  after, metrics = started.run.step(before, make_batch(), KEY())
  assert kinds(after) == kinds(started.like)
  assert jax.tree.all(jax.tree.map(placed, after, started.like))
  assert {"loss", "grad_norm", "mae"} <= set(metrics)
  assert all(x.shape == () for x in metrics.values())


def test_no_step_compiles_again(started):
  steps(started.run, started.run.init(KEY(), started.params))
  assert started.run.step.compilations() == 1


def test_simulated_equals_distributed(cases, name):
  results = []
  for runner in ("simulate", "distribute"):
    case = cases(name, "adamw", runner)
    state, metrics = steps(case.run, case.run.init(KEY(), case.params))
    results.append((case.run.params(state), metrics))
  assert_near(*results, tolerance=ROUNDING.get(name, 2e-6))


def test_a_restored_run_equals_an_uninterrupted_one_bit_for_bit(started):
  state = started.run.init(KEY(), started.params)
  state, _ = steps(started.run, state, count=1)
  assert_equal(state, started.saved)  # so two runs from one key are equal
  uninterrupted = steps(started.run, state, count=2)
  resumed = steps(started.run, started.state(), count=2)
  assert_equal(resumed, uninterrupted)
  assert started.run.step.compilations() == 1


def test_training_lowers_the_loss(started):
  state, first = steps(started.run, started.state(), count=1)
  _, last = steps(started.run, state, count=15)
  assert float(last["loss"]) < float(first["loss"])


def every_worker(method, specs):
  """Prefix of specs under which each worker's own value comes back."""
  each = lambda spec: P(method.axis)
  return jax.tree.map(each, specs, is_leaf=lambda x: isinstance(x, P))


@pytest.mark.parametrize("runner", ["simulate", "distribute"])
def test_what_is_declared_replicated_is_equal_on_all_workers(
  runner, cases, mesh, name
):
  case = cases(name, "adamw", runner)
  method, each, same = case.run.method, P("data"), P()
  if runner == "simulate":
    make = spmd.vmap_runner("data", N)
  else:
    make = spmd.mesh_runner(mesh(N), "data")
  step = jax.jit(
    make(
      method.step,
      (method.specs, each, same),
      (every_worker(method, method.specs), each),
    )
  )
  batch = spmd.split_rows(make_batch(), N)
  state, metrics = step(case.state(), batch, KEY())
  model = jax.jit(make(method.params, (method.specs,), each))(case.state())

  def rows_equal(x):
    assert x.shape[0] == N
    for row in np.asarray(x)[1:]:
      np.testing.assert_array_equal(row, np.asarray(x)[0])

  def check(spec, tree):
    if not spec:
      jax.tree.map(rows_equal, tree)

  is_spec = lambda x: isinstance(x, P)
  jax.tree.map(check, method.specs, state, is_leaf=is_spec)
  jax.tree.map(rows_equal, (metrics, model))


def test_a_step_donates_its_state_but_nothing_of_the_callers(adamw):
  params = make_params()
  state = adamw.run.init(KEY(), params)
  model = adamw.run.params(state)
  after, _ = adamw.run.step(state, make_batch(), KEY())
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves((params, model)))
  assert_equal(params, make_params())
  assert not any(x.is_deleted() for x in jax.tree.leaves(after))


def test_another_key_gives_another_result(adamw):
  _, one = steps(adamw.run, adamw.state(), count=1)
  _, two = steps(adamw.run, adamw.state(), count=1, key=jax.random.key(4))
  assert float(one["loss"]) != float(two["loss"])


def test_abstract_computes_nothing_and_equals_what_init_returns(adamw):
  shapes = jax.eval_shape(make_params)  # no array anywhere
  like = adamw.run.abstract(KEY(), shapes)
  assert kinds(like) == kinds(adamw.run.init(KEY(), make_params()))


def test_keys_differ_by_worker_and_step(cases, name):
  drawn = {}
  for runner in ("simulate", "distribute"):
    run, rows = cases(name, "adamw", runner).run, []
    state = run.init(KEY(), make_params())
    for _ in range(STEPS):
      state, metrics = run.step(state, make_batch(), KEY())
      rows.append([N * float(metrics[f"w{i}"]) for i in range(N)])
    drawn[runner] = np.array(rows)  # (STEPS, N)
  assert len(np.unique(drawn["simulate"].round(5))) == STEPS * N
  np.testing.assert_array_equal(drawn["simulate"], drawn["distribute"])


def test_one_worker_whose_keys_are_those_of_the_first_of_many(
  name, mesh, cases
):
  method = make(name, loss_fn, OPTIMIZERS["adamw"], workers=1)
  batch, results = make_batch(workers=1), []
  for run in (dj.simulate(method, workers=1), dj.distribute(method, mesh(1))):
    state = run.init(KEY(), make_params())
    state, first = run.step(state, batch, KEY())
    state, metrics = run.step(state, batch, KEY())
    assert run.step.compilations() == 1
    results.append((run.params(state), metrics))
  assert_near(*results, tolerance=ROUNDING.get(name, 2e-6))
  many = cases(name, "adamw", "simulate").run
  _, of_many = many.step(many.init(KEY(), make_params()), make_batch(), KEY())
  np.testing.assert_allclose(first["w0"], N * of_many["w0"], rtol=1e-6)


def test_bfloat16_parameters_stay_so_and_learn(name, mesh):
  method = make(name, loss_fn, OPTIMIZERS["adamw"])
  run = dj.distribute(method, mesh(N))
  params = make_params(jnp.bfloat16)
  state, first = steps(run, run.init(KEY(), params), count=1)
  state, last = steps(run, state, count=8)
  assert kinds(run.params(state)) == kinds(params)
  assert float(last["loss"]) < float(first["loss"])
  assert run.step.compilations() == 1


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["kernel", "rest"],
  meta_fields=["activation"],
)
class Node:
  """Like an Equinox module: arrays, and something static that is not one."""

  def __init__(self, kernel, rest, activation=jnp.tanh):
    self.kernel, self.rest, self.activation = kernel, rest, activation


class Pair(NamedTuple):
  left: object
  right: object


def foreign(p):
  """The same parameters as a mixture of containers, with a hole in it."""
  return Node(Pair([p["w"], {"b": p["b"]}], None), (p["v"], p["gain"]))


def named(leaves):
  """The parameters from the leaves of `foreign`, in order."""
  return dict(zip(("w", "b", "v", "gain"), leaves))


def native(node):
  (w, rest), (v, gain) = node.kernel.left, node.rest
  return {"w": w, "b": rest["b"], "v": v, "gain": gain}


def test_any_pytree_of_parameters_trains_alike(name, cases):
  def foreign_loss(node, batch, key):
    assert node.activation is jnp.tanh
    return loss_fn(native(node), batch, key)

  like = foreign(make_params())
  method = make(name, foreign_loss, OPTIMIZERS["adamw"], like)
  run = dj.simulate(method, workers=N)
  state, _ = steps(run, run.init(KEY(), foreign(make_params())))
  if name in BY_ORDER:
    listed = lambda x, batch, key: foreign_loss(foreign(named(x)), batch, key)
    start = jax.tree.leaves(foreign(make_params()))
    known = dj.simulate(make(name, listed, OPTIMIZERS["adamw"]), workers=N)
  else:
    start, known = make_params(), cases(name, "adamw", "simulate").run
  expected, _ = steps(known, known.init(KEY(), start))
  model, expected = run.params(state), known.params(expected)
  expected = named(expected) if name in BY_ORDER else expected
  assert jax.tree.structure(model) == jax.tree.structure(foreign(expected))
  # The same but for the order of the sums in the gradient's norm.
  assert_near(native(model), expected, ROUNDING.get(name, 2e-6))


def test_a_model_of_one_scalar_trains(name):
  # A subnetwork cannot have a part of a scalar: it has one beside its units.
  units = jnp.ones(WIDTH) if name in SUBNETWORKS else None
  params = {"scalar": jnp.ones(()), "units": units}

  def loss(params, batch, key):
    error = params["scalar"] * batch["x"] - 1.0
    rest = jax.tree.leaves(params["units"])
    return jnp.mean(error**2) + sum(jnp.mean(x**2) for x in rest), {}

  # Late gradients swing about the minimum for long where this rate is high.
  method = make(name, loss, optax.adam(0.01), params, workers=8)
  run = dj.simulate(method, workers=8)
  state = run.init(KEY(), params)
  batch = {"x": np.full(32, 2.0, np.float32)}
  for _ in range(120):
    state, _ = run.step(state, batch, KEY())
  scalar = run.params(state)["scalar"]
  assert scalar.shape == ()
  np.testing.assert_allclose(np.float32(scalar), 0.5, atol=0.02)
