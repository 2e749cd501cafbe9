"""mulo as an optax transform: where it goes, what it keeps, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import learned
from distrain_jax.learned import storage

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def theta():
  return jax.jit(learned.init_theta)(KEY)


def make_params(dtype=jnp.float32):
  keys = jax.random.split(KEY, 2)
  return {
    "w": jax.random.normal(keys[0], (8, 16)).astype(dtype),
    "b": jax.random.normal(keys[1], (16,)).astype(dtype),
  }


def ones_like(tree):
  return jax.tree.map(jnp.ones_like, tree)


def near(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def plain(theta):
  """The update of a first step, under jit, and the parameters."""
  params, tx = make_params(), learned.mulo(theta)
  return jax.jit(tx.update)(params, tx.init(params), params)[0], params


def test_scale_by_mulo_is_mulo_without_its_sign(theta, plain):
  tx = learned.scale_by_mulo(theta)
  updates, params = plain
  got, _ = jax.jit(tx.update)(params, tx.init(params), params)
  equal(jax.tree.map(jnp.negative, got), updates)


def test_in_a_chain_masked_and_by_label(theta, plain):
  updates, params = plain
  mup = {"w": 0.5, "b": 1.0}  # of all parameters, whatever part is seen
  mulo = learned.mulo(theta, mup=mup)
  chain = optax.chain(mulo, optax.scale(2.0))
  masked = optax.masked(mulo, {"w": True, "b": False})
  labels = optax.multi_transform(
    {"learned": mulo, "sgd": optax.sgd(1.0)}, {"w": "learned", "b": "sgd"}
  )
  step = lambda tx: jax.jit(tx.update)(params, tx.init(params), params)[0]
  near(step(chain), {"w": updates["w"], "b": 2 * updates["b"]})
  near(step(masked), {"w": updates["w"] / 2, "b": params["b"]})
  near(step(labels), {"w": updates["w"] / 2, "b": -params["b"]})


def test_a_normalised_step_has_the_size_of_its_multiplier(theta):
  params = make_params()
  tx = learned.mulo(theta, mup=0.5, step_mult=0.1, update_norm="rms")
  got, _ = jax.jit(tx.update)(params, tx.init(params), params)
  for x in jax.tree.leaves(got):
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(x * x)), 0.05, rtol=1e-4)


def test_a_schedule_and_weight_decay_come_on_top(theta, plain):
  updates, params = plain
  rate = optax.linear_schedule(0.5, 0.0, 10)
  tx = learned.mulo(theta, learning_rate=rate, weight_decay=0.1)
  got, _ = jax.jit(tx.update)(params, tx.init(params), params)
  wanted = jax.tree.map(lambda u, p: 0.5 * (u - 0.1 * p), updates, params)
  near(got, wanted)


def test_compiles_once_and_scans(theta):
  params, tx, count = make_params(), learned.mulo(theta), 0

  def step(carry, g):
    nonlocal count
    count += 1
    params, state = carry
    updates, state = tx.update(g, state, params, value=jnp.sum(g["b"]))
    return (optax.apply_updates(params, updates), state), None

  one = jax.jit(step)
  carry = params, tx.init(params)
  grads = [make_params(), ones_like(params), make_params()]
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
  other = jax.jit(learned.init_theta)(jax.random.key(1))
  both = jax.tree.map(lambda *x: jnp.stack(x), theta, other)

  def step(theta):
    tx = learned.mulo(theta)
    return tx.update(params, tx.init(params), params)[0]

  got = jax.jit(jax.vmap(step))(both)
  near(jax.tree.map(lambda x: x[0], got), updates)
  assert float(jnp.abs(got["w"][0] - got["w"][1]).max()) > 1e-4


def test_bfloat16_parameters_and_accumulators(theta, plain):
  low, tx = make_params(jnp.bfloat16), learned.mulo(theta)
  got, state = jax.jit(tx.update)(low, tx.init(low), low)
  assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("bfloat16")}
  kept = jax.tree.leaves(state[0].moments)
  assert {x.dtype for x in kept} == {jnp.dtype("float32")}
  size = float(jnp.abs(plain[0]["w"]).max())
  near(jax.tree.map(lambda x: x.astype("f4"), got), plain[0], 0.02 * size)
  tx = learned.mulo(theta, accumulator_dtype=jnp.bfloat16)
  got, state = jax.jit(tx.update)(plain[1], tx.init(plain[1]), plain[1])
  kept = jax.tree.leaves(state[0].moments)
  assert {x.dtype for x in kept} == {jnp.dtype("bfloat16")}
  near(got, plain[0])  # the first step reads averages that are not rounded yet


def test_what_is_not_finite_in_a_gradient_counts_as_zero(theta):
  params, tx = make_params(), learned.mulo(theta)
  update, state = jax.jit(tx.update), tx.init(params)
  spoilt, zeroed = make_params(), make_params()
  for i, bad in enumerate((np.nan, np.inf, -np.inf)):
    spoilt["w"] = spoilt["w"].at[i, i].set(bad)
    zeroed["w"] = zeroed["w"].at[i, i].set(0)
  equal(update(spoilt, state, params), update(zeroed, state, params))
  tx = learned.mulo(theta, nan_to_num=False)
  got, _ = jax.jit(tx.update)(spoilt, tx.init(params), params)
  assert np.isnan(got["w"]).any()


def test_trees_with_holes_and_without_leaves(theta, plain):
  updates, params = plain
  tx = learned.mulo(theta, mup={"w": 1.0, "b": 1.0})
  holes = {"w": params["w"], "b": None}
  got, _ = jax.jit(tx.update)(holes, tx.init(holes), holes)
  near(got, {"w": updates["w"], "b": None})
  tx = learned.mulo(theta)
  for empty in ({}, (), jnp.zeros((0, 3))):
    got, state = tx.update(empty, tx.init(empty), empty)
    assert jax.tree.structure(got) == jax.tree.structure(empty)
    assert int(state[0].count) == 1


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")])
def test_sharded_parameters_give_the_same_update(theta, plain, mesh, spec):
  updates, params = plain
  where = NamedSharding(mesh(8), spec)
  put = lambda x: jax.device_put(x, where) if x.ndim == 2 else x
  sharded, tx = jax.tree.map(put, params), learned.mulo(theta, tile=64)
  got, _ = jax.jit(tx.update)(sharded, tx.init(sharded), sharded)
  near(got, updates)


def test_theta_is_saved_and_read_to_the_bit(theta, tmp_path):
  path = tmp_path / "theta.safetensors"
  learned.save_theta(path, theta, {"step_mult": 0.01})
  got, metadata = learned.load_theta(path)
  equal(theta, got)
  assert metadata == {"step_mult": "0.01"}
  safetensors = pytest.importorskip("safetensors.numpy")
  equal(theta, safetensors.load_file(path))


def test_a_file_that_is_no_theta_is_refused(theta, tmp_path):
  path = tmp_path / "theta.safetensors"
  learned.save_theta(path, theta)
  whole = path.read_bytes()
  for cut in (4, 100, len(whole) - 8):
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"not a safetensors file of theta"):
      learned.load_theta(path)


def test_wrong_theta_is_refused(theta):
  transposed = {**theta, "w0": theta["w0"].T}
  with pytest.raises(ValueError, match=r"'w0'.*\(32, 39\), wanted \(39, 32\)"):
    learned.mulo(transposed)
  few = {k: v for k, v in theta.items() if k != "b2"}
  with pytest.raises(ValueError, match=r"lacks \['b2'\].*unknown \['c'\]"):
    learned.mulo({**few, "c": 1})
  with pytest.raises(ValueError, match=r"dict of the arrays.*got str"):
    learned.mulo("mulo.safetensors")


def test_multipliers_that_do_not_match_are_refused(theta):
  params = make_params()
  for mup, says in (
    ({"w": 0.5}, r"mup: .*nothing for \['b'\]"),
    ({"w": 0.5, "b": 1.0, "c": 1.0}, r"parameters have no \['c'\]"),
  ):
    tx = learned.mulo(theta, mup=mup)
    with pytest.raises(ValueError, match=says):
      tx.init(params)
  with pytest.raises(ValueError, match=r"stacked.*got 2 for params\['b'\]"):
    learned.mulo(theta, stacked=2).init(params)


def test_epsilons_cannot_follow_a_multiplier_of_zero(theta):
  tx = learned.mulo(theta, mup={"w": 0.0, "b": 1.0}, eps_scaling="fan_in")
  with pytest.raises(ValueError, match=r"that of params\['w'\] is 0\.0"):
    tx.init(make_params())


def test_missing_parameters_are_refused(theta):
  tx, params = learned.mulo(theta), make_params()
  with pytest.raises(ValueError, match=r"reads the parameters.*tx\.update"):
    tx.update(params, tx.init(params))


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"step_mult": 0.0}, r"`step_mult`.*got 0\.0"),
    ({"tile": -1}, "`tile`.*got -1"),
    ({"implementation": "cuda"}, "tiled, reference, pallas.*'cuda'"),
    ({"precision": "low"}, "`precision`.*'low'"),
    ({"update_norm": "l2"}, "`update_norm`.*'l2'"),
    ({"eps_scaling": "width"}, "`eps_scaling`.*'width'"),
    ({"accumulator_dtype": jnp.int8}, "`accumulator_dtype`.*int8"),
  ],
)
def test_wrong_options_are_refused(theta, options, says):
  with pytest.raises(ValueError, match=says):
    learned.mulo(theta, **options)


def test_weights_that_are_not_shipped_say_what_to_do(monkeypatch):
  none = {True: "absent.safetensors", False: "absent.safetensors"}
  monkeypatch.setattr(storage, "SHIPPED", none)
  with pytest.raises(ValueError, match=r"no weights are shipped.*load_theta"):
    learned.mulo(mup=1.0)
