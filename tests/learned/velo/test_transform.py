"""velo as an optax transform: where it goes, what it keeps, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import learned
from distrain_jax.learned.velo import step as velo_module

KEY = jax.random.key(0)
TOTAL = 50


@pytest.fixture(scope="module")
def theta():
  return jax.jit(lambda key: learned.init_velo_theta(key, 6, 3))(KEY)


def make_params(dtype=jnp.float32):
  keys = jax.random.split(KEY, 2)
  return {
    "w": jax.random.normal(keys[0], (4, 6)).astype(dtype),
    "b": jax.random.normal(keys[1], (6,)).astype(dtype),
  }


def make(theta, **options):
  return learned.velo(theta, num_steps=TOTAL, **options)


def first_step(tx, params, grads=None):
  """The first update, compiled."""
  grads = params if grads is None else grads
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))
  return update(grads, tx.init(params), params)


def near(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def plain(theta):
  params = make_params()
  return first_step(make(theta), params)[0], params


def size(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_sign_schedule_decay_and_a_chain(theta, plain):
  updates, params = plain
  assert size(updates) > 1e-5
  bare = learned.scale_by_velo(theta, num_steps=TOTAL)
  rate = optax.linear_schedule(0.5, 0.0, 10)
  tx = optax.chain(make(theta, learning_rate=rate, weight_decay=0.1))
  both = optax.with_extra_args_support(optax.chain(optax.identity(), bare))

  def step(params):
    of = lambda tx: tx.update(params, tx.init(params), params, value=1.0)[0]
    return of(both), of(tx)

  rule, whole = jax.jit(step)(params)
  near(jax.tree.map(jnp.negative, rule), updates, 1e-8)
  wanted = jax.tree.map(lambda u, p: 0.5 * (u - 0.1 * p), updates, params)
  near(whole, wanted)


def test_multipliers_scale_updates_and_mup_drops_the_tensors_size(theta):
  params = {"w": make_params()["w"]}
  kinds = (
    make(theta, mup=1.0),
    make(theta, mup=0.25),
    make(theta, mup=1.0, param_scale_mult=True),
  )

  @jax.jit
  def step(params):
    one = lambda tx: tx.update(params, tx.init(params), params, value=1.0)
    return [one(tx) for tx in kinds]

  (one, state), (quarter, same), (sized, _) = step(params)
  near(jax.tree.map(lambda x: 0.25 * x, one), quarter, 1e-9)
  equal(state, same)
  rms = jnp.sqrt(1e-9 + jnp.mean(params["w"] ** 2))
  np.testing.assert_allclose(sized["w"], rms * one["w"], rtol=1e-5)


def test_compiles_once_and_scans(theta):
  params, tx, count = make_params(), make(theta), 0

  def step(carry, g):
    nonlocal count
    count += 1
    params, state = carry
    updates, state = tx.update(g, state, params, value=jnp.sum(g["b"]), lr=0)
    return (optax.apply_updates(params, updates), state), None

  one = jax.jit(step)
  carry = params, tx.init(params)
  grads = [params, jax.tree.map(jnp.ones_like, params), params]
  for g in grads:
    carry, _ = one(carry, g)
  assert count == 1
  stack = jax.tree.map(lambda *x: jnp.stack(x), *grads)
  scanned, _ = jax.lax.scan(step, (params, tx.init(params)), stack)
  near(carry, scanned)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(carry) == kinds((params, tx.init(params)))
  assert int(carry[1][0].count) == 3


def test_vmap_over_theta(theta, plain):
  updates, params = plain
  other = jax.tree.map(lambda x: 0.5 * x, theta)
  both = jax.tree.map(lambda *x: jnp.stack(x), theta, other)

  def step(theta):
    tx = make(theta)
    return tx.update(params, tx.init(params), params, value=1.0)[0]

  got = jax.jit(jax.vmap(step))(both)
  near(jax.tree.map(lambda x: x[0], got), updates)
  assert float(jnp.abs(got["w"][0] - got["w"][1]).max()) > 1e-6


def test_stacked_layers_are_tensors_of_their_own(theta):
  keys = jax.random.split(KEY, 2)
  params = {"w": jax.random.normal(keys[0], (2, 3, 4)), "g": jnp.ones(2)}
  grads = {
    "w": jax.random.normal(keys[1], (3, 2, 3, 4)),
    "g": jax.random.normal(keys[1], (3, 2)),
  }
  at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  apart = lambda tree: [at(tree, 0), at(tree, 1)]
  steps = [[x[:, 0], x[:, 1]] for x in grads.values()]
  steps = [dict(zip(grads, x)) for x in zip(*steps)]

  def last_of_three(tx, params, grads):
    step = lambda state, g: tx.update(g, state, params, value=1.0)[::-1]
    state, updates = jax.lax.scan(step, tx.init(params), grads)
    return at(updates, -1), state

  run = jax.jit(last_of_three, static_argnums=0)
  got, state = run(make(theta, stacked=1), params, grads)
  wanted, _ = run(make(theta), apart(params), steps)
  assert state[0].hidden.shape == (4, 6)
  near(apart(got), wanted, 1e-7)
  assert size(wanted) > 1e-5


def test_bfloat16_parameters_and_accumulators(theta, plain):
  low, tx = make_params(jnp.bfloat16), make(theta)
  got, state = first_step(tx, low)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
  kept = jax.tree.leaves(state[0].moments)
  assert {x.dtype for x in kept} == {jnp.dtype("float32")}
  wide = jax.tree.map(lambda x: x.astype("f4"), got)
  near(wide, plain[0], 0.02 * size(plain[0]))
  tx = make(theta, accumulator_dtype=jnp.bfloat16)
  got, state = first_step(tx, plain[1])
  kept = jax.tree.leaves(state[0].moments)
  assert {x.dtype for x in kept} == {jnp.dtype("bfloat16")}
  near(got, plain[0], 1e-8)  # the first step reads averages not rounded yet


def test_what_is_no_number_counts_as_zero_and_infinity_is_cut(theta, plain):
  _, params = plain
  cases = []
  for bad, wanted in ((np.nan, 0.0), (np.inf, 1000.0)):
    put = lambda x: {**params, "w": params["w"].at[1, 1].set(x)}
    cases.append((put(bad), put(wanted)))
  tx = make(theta)
  update, state = jax.jit(tx.update), tx.init(params)
  for spoilt, mended in cases:
    got = update(spoilt, state, params, value=jnp.nan)
    equal(got, update(mended, state, params, value=jnp.nan))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got[0]))


def test_trees_with_holes_and_without_leaves(theta, plain):
  params = plain[1]
  tx = make(theta, mup={"w": 1.0, "b": 1.0})
  alone, _ = first_step(tx, {"w": params["w"], "b": None})
  masked = optax.masked(tx, {"w": True, "b": False})
  got, _ = first_step(masked, params)
  near(got["w"], alone["w"], 1e-8)
  assert alone["b"] is None
  equal(got["b"], params["b"])
  tx = make(theta)
  for empty in ({}, (), jnp.zeros((0, 3))):
    got, state = tx.update(empty, tx.init(empty), empty, value=1.0)
    assert jax.tree.structure(got) == jax.tree.structure(empty)
    assert int(state[0].count) == 1 and state[0].hidden.shape == (0, 6)


def test_sharded_parameters_give_the_same_update(theta, mesh):
  params, tx = jax.random.normal(KEY, (16, 8)), make(theta, tile=16)
  wanted, _ = first_step(make(theta), params)
  sharded = jax.device_put(params, NamedSharding(mesh(8), P("data")))
  got, state = first_step(tx, sharded)
  near(got, wanted, 1e-7)
  assert len(state[0].moments.m.sharding.device_set) == 8


@pytest.mark.full
def test_temporaries_stay_below_64_bytes_an_element(theta):
  x, tx = jax.ShapeDtypeStruct((4096, 4096), jnp.float32), make(theta)
  step = lambda g, s, p: tx.update(g, s, p, value=1.0)
  step = jax.jit(step, donate_argnums=(0, 1))
  compiled = step.lower(x, jax.eval_shape(tx.init, x), x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * 4096**2


def test_theta_is_saved_and_read_to_the_bit(theta, tmp_path):
  path = tmp_path / "theta.safetensors"
  learned.save_theta(path, theta, {"architecture": "velo"})
  got, metadata = learned.load_theta(path)
  equal(theta, got)
  assert metadata == {"architecture": "velo"} and got.keys() == theta.keys()
  whole = path.read_bytes()
  path.write_bytes(whole[:-8])
  with pytest.raises(ValueError, match=r"not a safetensors file of theta"):
    learned.load_theta(path)


def test_wrong_theta_is_refused(theta):
  with pytest.raises(
    ValueError, match=r"no weights of VeLO's.*init_velo_theta"
  ):
    make(None)
  turned = {**theta, "own_w": theta["own_w"].T}
  with pytest.raises(ValueError, match=r"'own_w'.*\(6, 30\), wanted \(30, 6\)"):
    make(turned)
  few = {k: v for k, v in theta.items() if k != "rate_b"}
  with pytest.raises(ValueError, match=r"lacks \['rate_b'\].*unknown \['c'\]"):
    make({**few, "c": 1})
  with pytest.raises(ValueError, match=r"muLO's numbers, which mulo\(theta\)"):
    make(learned.init_theta(KEY))
  with pytest.raises(ValueError, match=r"VeLO's numbers, which velo\(theta\)"):
    learned.mulo(theta)
  with pytest.raises(ValueError, match=r"dict of the arrays.*got str"):
    make("velo.safetensors")
  with pytest.raises(ValueError, match=r"lstm=0, bank=3"):
    learned.init_velo_theta(KEY, 0, 3)


def test_a_missing_loss_or_missing_parameters_are_refused(theta):
  tx, params = make(theta), make_params()
  state = tx.init(params)
  says = (
    r"missing is value\..*tx\.update\(grads, state, params, value=loss\), in a "
    "training loop of your own: the methods of this package do not pass"
  )
  with pytest.raises(ValueError, match=says):
    tx.update(params, state, params)
  with pytest.raises(ValueError, match=r"missing is params\."):
    tx.update(params, state, value=1.0)
  with pytest.raises(ValueError, match=r"one number; got .* \(2,\).*mean"):
    tx.update(params, state, params, value=jnp.ones(2))


def test_trees_and_states_that_do_not_fit_are_refused(theta):
  params = make_params()
  with pytest.raises(ValueError, match=r"mup: .*nothing for \['b'\]"):
    make(theta, mup={"w": 0.5}).init(params)
  with pytest.raises(ValueError, match=r"stacked.*got 2 for params\['b'\]"):
    make(theta, stacked=2).init(params)
  state = velo_module.velo_init({"w": params["w"]})
  call = lambda: velo_module.velo_step(
    theta, {"w": params["w"]}, state, {"w": params["w"]}, value=1.0
  )
  with pytest.raises(
    ValueError, match=r"LSTM of 512 units.*theta's LSTM has 6"
  ):
    call()


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"num_steps": 0}, r"`num_steps`.*got 0"),
    ({"num_steps": 10.5}, r"`num_steps`.*got 10\.5"),
    ({"num_steps": None}, r"`num_steps`.*got None"),
    ({"step_mult": 0.0}, r"`step_mult`.*got 0\.0"),
    ({"interp_mult": -1}, "`interp_mult`.*got -1"),
    ({"tile": -1}, "`tile`.*got -1"),
    ({"precision": "low"}, "`precision`.*'low'"),
    ({"accumulator_dtype": jnp.int8}, "`accumulator_dtype`.*int8"),
  ],
)
def test_wrong_options_are_refused(theta, options, says):
  with pytest.raises(ValueError, match=says):
    learned.velo(theta, **{"num_steps": TOTAL, **options})
