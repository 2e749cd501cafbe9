"""What every method promises, for those that take a network in stages.

`test_contract` has the others, which take a loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import petra_networks as nets
import pytest
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd, stages
from distrain_jax.method import Variables

pytestmark = pytest.mark.core

KEY = jax.random.key(3)
ADAMW = optax.adamw(
  optax.linear_schedule(0.01, 0.02, 4),
  mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
)
METHODS = {
  "petra": functools.partial(
    dj.petra, clip_norm=0.3, delay_exponent=0.5, predict=0.5
  ),
  "petra_low": functools.partial(dj.petra, wire_dtype="bfloat16"),
  "pipeline": functools.partial(dj.pipeline, clip_norm=0.3),
}
STAGES, REPLICAS, K = 3, 2, 2
EACH = P("stage", "data")


def network(dtype=jnp.float32):
  """Stem, two reversible blocks with a scalar leaf, a block without any."""
  blocks, params, state = nets.make("rr", stats=True)
  scaled = lambda p, s, x, k: ((x[0] * p["gain"], x[1]), s)
  halved = lambda p, s, x, k: (jax.tree.map(lambda a: a / 2, x), s)
  blocks.insert(2, stages.plain("gain", scaled))
  blocks.insert(4, stages.plain("half", halved))
  params["gain"] = {"gain": jnp.ones(())}
  cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
  model = Variables(cast(params), state)
  return [blocks[:2], blocks[2:4], blocks[4:]], model


def make(name, dtype=jnp.float32, rows=nets.ROWS):
  cut, model = network(dtype)
  x, y = nets.batches(1, rows=rows)
  method = METHODS[name](
    cut,
    ADAMW,
    shapes=model,
    example=(jnp.asarray(x, dtype), y),
    accumulate=K,
    replicas="data",
  )
  return method, model


def batch(dtype=jnp.float32):
  x, y = nets.batches(K * REPLICAS)
  return jnp.asarray(x, dtype), jnp.asarray(y)


@functools.cache
def started(name):
  """(run on a mesh, model, state after some steps as a checkpoint has it)."""
  method, model = make(name)
  devices = jax.devices()[: STAGES * REPLICAS]
  mesh = spmd.make_mesh({"stage": STAGES, "data": REPLICAS}, devices)
  run = dj.distribute(dj.guard(method), mesh)
  state = run.init(KEY, model)
  for _ in range(4):
    state, metrics = run.step(state, batch(), KEY)
  return run, model, jax.device_get(state), jax.device_get(metrics)


def placed(run, model, saved):
  like = run.abstract(KEY, model)
  return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), saved, like)


kinds = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
equal = functools.partial(
  jax.tree.map,
  lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
)
by_name = pytest.mark.parametrize("name", METHODS)


@by_name
def test_a_step_keeps_what_the_state_is_and_compiles_once(name):
  run, model, saved, metrics = started(name)
  like = run.abstract(KEY, model)
  assert kinds(saved) == kinds(like)
  after, _ = run.step(placed(run, model, saved), batch(), KEY)
  where = lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim)
  assert jax.tree.all(jax.tree.map(where, after, like))
  assert run.step.compilations() == 1
  assert {"loss", "grad_norm", "accuracy", "busy"} <= set(metrics)
  assert all(np.shape(x) == () and np.isfinite(x) for x in metrics.values())


@by_name
def test_a_restored_state_goes_on_to_the_same_bits(name):
  run, model, saved, _ = started(name)
  ends = []
  for _ in range(2):
    state = placed(run, model, saved)
    for _ in range(2):
      state, metrics = run.step(state, batch(), KEY)
    ends.append(jax.device_get((state, metrics)))
  equal(*ends)


@by_name
def test_the_model_comes_back_as_it_was_given(name):
  run, model, _, _ = started(name)
  equal(run.params(run.init(KEY, model)), model)


@by_name
def test_a_step_donates_its_state_but_nothing_of_the_callers(name):
  run, model, *_ = started(name)
  state = run.init(KEY, model)
  read = run.params(state)
  run.step(state, batch(), KEY)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves((model, read)))


@pytest.mark.parametrize("name", ["petra", "pipeline"])
def test_what_is_declared_replicated_is_equal_on_all_workers(name):
  method, _ = make(name)
  saved = started(name)[2]
  runner = spmd.vmap_runner(("stage", "data"), (STAGES, REPLICAS))
  every = jax.tree.map(
    lambda spec: EACH, method.specs, is_leaf=lambda x: isinstance(x, P)
  )
  step = runner(method.step, (method.specs, method.rows, P()), (every, EACH))
  rows = spmd.split_rows(batch(), REPLICAS)
  state, metrics = jax.jit(step)(saved.inner, rows, KEY)
  read = runner(method.params, (method.specs,), EACH)
  whole = jax.jit(read)(saved.inner)

  def check(spec, tree):
    def one(x):
      x = np.asarray(x)
      assert x.shape[:2] == (STAGES, REPLICAS)
      if "stage" not in spec:
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
      if "data" not in spec:
        np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))

    jax.tree.map(one, tree)

  is_spec = lambda x: isinstance(x, P)
  jax.tree.map(check, method.specs, state, is_leaf=is_spec)
  check(P(), metrics)
  check(P(), whole)


def test_bfloat16_parameters_stay_so():
  method, model = make("petra", jnp.bfloat16)
  run = dj.simulate(method, workers=STAGES, replicas=REPLICAS)
  state, _ = jax.eval_shape(
    run.step._program._fn, run.abstract(KEY, model), batch(jnp.bfloat16), KEY
  )
  assert kinds(state) == kinds(run.abstract(KEY, model))


def test_training_lowers_the_loss():
  run, model, saved, _ = started("petra")
  state, losses = placed(run, model, saved), []
  for _ in range(25):
    state, metrics = run.step(state, batch(), KEY)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.9 * losses[0]
