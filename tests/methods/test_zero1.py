"""ZeRO-1 beyond the contract: low precision, padding, other worker counts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
ADAMW = optax.adamw(1e-2, weight_decay=0.1)


def make_params():
  keys = jax.random.split(KEY, 2)
  return {
    "w": jax.random.normal(keys[0], (3, 5)),
    "b": jnp.zeros(5),
    "v": jax.random.normal(keys[1], (5,)),
    "gain": jnp.ones(()),
  }


def loss_fn(params, batch, key):
  del key
  dtype = params["w"].dtype
  hidden = jnp.tanh(batch["x"].astype(dtype) @ params["w"] + params["b"][None])
  error = params["gain"] * (hidden @ params["v"]) - batch["y"].astype(dtype)
  return jnp.mean(error**2), {}


def make_batch(rows=16):
  x = np.random.default_rng(1).normal(size=(rows, 3)).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(1))}


def steps(run, state, count):
  for _ in range(count):
    state, _ = run.step(state, make_batch(), KEY)
  return state


def whole(stacked, like):
  """Leaves (N, ..., m) back to the parameters' shapes, and their padding."""
  flat = jax.tree.map(lambda x: np.asarray(x).ravel(), stacked)
  cut = lambda x, p: x[: p.size].reshape(p.shape)
  padding = jax.tree.map(lambda x, p: x[p.size :], flat, like)
  return jax.tree.map(cut, flat, like), padding


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def gradient(run):
  """What one step of SGD with rate 1 subtracted."""
  params = make_params()
  state = run.init(KEY, params)
  state, metrics = run.step(state, make_batch(), KEY)
  sub = lambda a, b: np.asarray(a - b)
  return jax.tree.map(sub, params, run.params(state)), metrics


def test_a_bfloat16_wire_rounds_gradients_by_little():
  exact, loss = gradient(
    dj.simulate(dj.zero1(loss_fn, optax.sgd(1.0)), workers=4)
  )
  rough, same_loss = gradient(
    dj.simulate(
      dj.zero1(loss_fn, optax.sgd(1.0), wire_dtype="bfloat16"), workers=4
    )
  )
  errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), exact, rough)
  sizes = jax.tree.map(lambda a: np.abs(a).max(), exact)
  assert max(jax.tree.leaves(errors)) > 0
  for error, size in zip(jax.tree.leaves(errors), jax.tree.leaves(sizes)):
    assert error < 2**-6 * max(size, 0.1)  # 4 roundings, and cancellation
  assert float(loss["loss"]) == float(same_loss["loss"])


def test_the_state_says_that_no_parameter_is_held_in_lower_precision():
  run = dj.simulate(dj.zero1(loss_fn, ADAMW, wire_dtype="bfloat16"), workers=4)
  state = steps(run, run.init(KEY, make_params()), 1)
  floating = [x for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
  assert {x.dtype for x in floating} == {jnp.dtype(jnp.float32)}
  assert state.masters is None


@pytest.fixture(scope="module")
def low():
  method = dj.zero1(loss_fn, ADAMW, param_dtype="bfloat16")
  return dj.simulate(method, workers=4)


def test_masters_start_exact_and_parameters_are_their_roundings(low):
  params = make_params()
  state = low.init(KEY, params)
  masters, padding = whole(state.masters, params)
  assert_equal(masters, params)  # not rounded on the way
  state = steps(low, state, 5)
  masters, padding = whole(state.masters, params)
  assert {x.dtype for x in jax.tree.leaves(masters)} == {np.dtype("float32")}
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters)
  assert_equal(rounded, state.params)
  assert_equal(rounded, low.params(state))
  assert not any(x.any() for x in jax.tree.leaves(padding))
  moments = [state.opt_state[0].mu, state.opt_state[0].nu]
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(moments))


def towards_zero(w, batch, key):
  del key
  return jnp.mean(batch["x"].astype(w.dtype) * jnp.sum(w * w)) / 2, {}


def test_masters_learn_where_bfloat16_alone_stands_still():
  batch = {"x": np.ones(4, np.float32)}
  ends = {}
  for kind in ("pure", "masters"):
    start, dtype = jnp.ones(6), None
    if kind == "pure":
      start = start.astype(jnp.bfloat16)
    else:
      dtype = jnp.bfloat16
    method = dj.zero1(towards_zero, optax.sgd(1e-3), param_dtype=dtype)
    run = dj.simulate(method, workers=4)
    state = run.init(KEY, start)
    for _ in range(100):
      state, _ = run.step(state, batch, KEY)
    ends[kind] = np.asarray(run.params(state), np.float32)
  np.testing.assert_array_equal(ends["pure"], 1.0)  # 1 - 1e-3 rounds to 1
  np.testing.assert_allclose(ends["masters"], 0.999**100, rtol=5e-3)


def test_padding_stays_zero_and_out_of_the_norm():
  params, moments = make_params(), []
  method = dj.zero1(loss_fn, optax.adamw(0.1), clip_norm=0.1)
  run = dj.simulate(method, workers=8)
  batch = make_batch(24)
  state, metrics = run.step(run.init(KEY, params), batch, KEY)
  grads = jax.jit(jax.grad(lambda p: loss_fn(p, batch, KEY)[0]))(params)
  norm = math.sqrt(
    sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads))
  )
  np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  for moments in (state.opt_state[0].mu, state.opt_state[0].nu):
    moment, padding = whole(moments, params)
    assert not any(x.any() for x in jax.tree.leaves(padding))
    assert all(x.any() for x in jax.tree.leaves(moment))


def test_padding_that_an_optimizer_moves_reaches_nothing():
  def pull(updates, state, params):
    move = lambda g, p: -0.1 * (g + p - 1.0)  # moves zeros too
    return jax.tree.map(move, updates, params), state

  # Its first moment of nothing is not nothing: yogi starts from 1e-6.
  tx = optax.chain(
    optax.scale_by_yogi(), optax.GradientTransformation(lambda p: (), pull)
  )
  results = []
  for factory in (dj.ddp, functools.partial(dj.zero1, param_dtype="float32")):
    run = dj.simulate(factory(loss_fn, tx), workers=8)
    results.append(run.params(steps(run, run.init(KEY, make_params()), 5)))
  near = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(near, *results)


def test_masks_and_labels_see_the_parameters_paths_and_ranks():
  seen = []

  def label(params):
    seen.append(jax.tree.map(lambda x: x.ndim, params))
    return {"w": "slow", "b": "fast", "v": "fast", "gain": "still"}

  tx = optax.multi_transform(
    {
      "slow": optax.sgd(0.01),
      "fast": optax.adam(0.1),
      "still": optax.set_to_zero(),
    },
    label,
  )
  results = []
  for factory in (dj.ddp, dj.zero1):
    run = dj.simulate(factory(loss_fn, tx), workers=4)
    results.append(run.params(steps(run, run.init(KEY, make_params()), 5)))
  near = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(near, *results)
  assert float(results[0]["gain"]) == 1.0
  assert all(ranks["w"] == 2 and ranks["v"] == 1 for ranks in seen)


@pytest.mark.parametrize(
  "options",
  [{}, {"param_dtype": "bfloat16"}],
  ids=["float32", "masters"],
)
def test_eight_workers_to_four_and_back_is_the_same_to_the_bit(options):
  method = dj.zero1(loss_fn, ADAMW, clip_norm=0.5, **options)
  eight, four = (dj.simulate(method, workers=n) for n in (8, 4))
  state = steps(eight, eight.init(KEY, make_params()), 3)
  saved = jax.tree.map(np.asarray, state)
  there = four.adopt(saved)
  like = four.abstract(KEY, make_params())
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(like)
  back = eight.adopt(there)
  assert_equal(back, saved)
  # Training goes on as if nothing had happened, on either number.
  expected = eight.params(steps(eight, back, 3))
  got = four.params(steps(four, four.adopt(saved), 3))
  # The loss of each half of the rows is summed in another order.
  tolerance = 2e-2 if options else 1e-6
  near = lambda a, b: np.testing.assert_allclose(
    np.float32(a), np.float32(b), atol=tolerance
  )
  jax.tree.map(near, got, expected)


def test_a_state_from_distributed_workers_goes_on_simulated(mesh):
  method = dj.zero1(loss_fn, ADAMW)
  real, toy = dj.distribute(method, mesh(8)), dj.simulate(method, workers=2)
  state = steps(real, real.init(KEY, make_params()), 2)
  saved = jax.tree.map(np.asarray, state)
  expected = real.params(steps(real, state, 2))
  got = toy.params(steps(toy, toy.adopt(saved), 2))
  near = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(near, got, expected)


def test_an_optimizer_over_norms_is_refused_by_init():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  run = dj.simulate(dj.zero1(loss_fn, tx), workers=2)
  with pytest.raises(ValueError, match=r"zero1 shards.*clip_norm=\.\.\."):
    run.init(KEY, make_params())


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"accumulate": 0}, "zero1: `accumulate`.*got 0"),
    ({"clip_norm": 0.0}, r"zero1: `clip_norm`.*got 0\.0"),
    ({"wire_dtype": "int8"}, "zero1: `wire_dtype`.*got 'int8'"),
    ({"param_dtype": jnp.int32}, "zero1: `param_dtype`"),
    ({"param_dtype": "bfloat17"}, "zero1: `param_dtype`.*got 'bfloat17'"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    dj.zero1(loss_fn, ADAMW, **options)
