"""A worker's own gradient, and what a loss_fn must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distrain_jax as dj
from distrain_jax import gradients

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
W = np.array([0.5, -1.0, 2.0], np.float32)


def loss_fn(w, batch, key):
  out = jnp.tanh(batch["x"] @ w)
  return jnp.mean(out**2), {"out": out.mean(), "positive": (out > 0).mean()}


@pytest.mark.parametrize("k", [2, 3, 12])
def test_accumulated_equals_one_big_batch(k):
  batch = {"x": X}
  whole = gradients.gradient_fn(loss_fn)(W, (), batch, KEY)
  parts = gradients.gradient_fn(loss_fn, k)(W, (), batch, KEY)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    parts,
    whole,
  )
  assert parts.grads.dtype == W.dtype


def test_the_gradient_is_that_of_finite_differences():
  g = gradients.gradient_fn(loss_fn, 3)(W, (), {"x": X}, KEY).grads

  def loss(w):  # float64, in NumPy
    return np.mean(np.tanh(X.astype(np.float64) @ w) ** 2)

  steps = 1e-6 * np.eye(3)
  slopes = [(loss(W + e) - loss(W - e)) / 2e-6 for e in steps]
  np.testing.assert_allclose(g, slopes, rtol=1e-4)


def test_microbatch_i_gets_the_key_folded_with_i():
  def loss(w, batch, key):
    return jnp.sum(w) * jax.random.uniform(key), {}

  g = gradients.gradient_fn(loss, 3)(W, (), {"x": X}, KEY)
  draws = [jax.random.uniform(jax.random.fold_in(KEY, i)) for i in range(3)]
  np.testing.assert_allclose(g.grads, np.full(3, np.mean(draws)), rtol=1e-6)


def test_model_state_passes_through_the_microbatches_in_order():
  def fn(w, model_state, batch, key):
    last = {"sum": 10 * model_state["sum"] + batch["i"][0].astype(float)}
    return jnp.sum(w), ({}, last)

  batch = {"i": np.repeat(np.arange(1, 4), 2)}
  g = gradients.gradient_fn(dj.stateful(fn), 3)(
    W, {"sum": jnp.zeros(())}, batch, KEY
  )
  assert float(g.model_state["sum"]) == 123.0


def test_a_loss_without_state_carries_an_empty_one():
  assert gradients.gradient_fn(loss_fn, 2)(W, (), {"x": X}, KEY)[3] == ()


def test_bfloat16_gradients_keep_their_dtype():
  w = W.astype(jnp.bfloat16)
  for k in (1, 3):
    g = gradients.gradient_fn(loss_fn, k)(w, (), {"x": X}, KEY)
    assert g.grads.dtype == jnp.bfloat16


def test_microbatches_are_cut_in_order():
  batch = {"x": np.arange(12).reshape(6, 2), "y": np.arange(6)}
  micro = gradients.microbatches(batch, 3)
  assert micro["x"].shape == (3, 2, 2)
  np.testing.assert_array_equal(micro["y"], [[0, 1], [2, 3], [4, 5]])


@pytest.mark.parametrize("shape", [(5, 2), ()])
def test_rows_that_do_not_cut_into_microbatches_are_refused(shape):
  with pytest.raises(ValueError, match=r"\['x'\] has shape.*accumulate=3"):
    gradients.microbatches({"x": np.zeros(shape)}, 3)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", None, True])
def test_accumulate_is_a_whole_number_from_one(bad):
  with pytest.raises(ValueError, match=f"m: `accumulate`.*got {bad!r}"):
    gradients.check_accumulate("m", bad)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "1"])
def test_clip_norm_is_above_zero(bad):
  with pytest.raises(ValueError, match=f"m: `clip_norm`.*got {bad!r}"):
    gradients.check_clip_norm("m", bad)


def test_clipping_scales_to_the_norm_and_never_up():
  scale = gradients.clip_scale
  assert float(scale(jnp.float32(4.0), 1.0)) == 0.25
  assert float(scale(jnp.float32(0.5), 1.0)) == 1.0
  assert float(scale(jnp.float32(0.0), 1.0)) == 1.0
  assert float(scale(jnp.float32(1e9), None)) == 1.0


def test_the_norm_is_taken_in_float32_over_all_leaves():
  tree = {"a": jnp.full(10000, 0.01, jnp.bfloat16), "b": jnp.full((), 2.0)}
  expected = 10000 * float(jnp.bfloat16(0.01)) ** 2 + 4
  np.testing.assert_allclose(gradients.squared_norm(tree), expected, rtol=1e-5)
  assert float(gradients.squared_norm({})) == 0.0


@pytest.mark.parametrize(
  ("returns", "error", "says"),
  [
    (lambda x: x.mean(), TypeError, r"must return \(loss, aux\)"),
    (lambda x: (x, {}), ValueError, r"scalar loss.*shape \(12,\)"),
    (lambda x: (x.mean(), x.mean()), TypeError, "dict of scalars"),
    (lambda x: (x.mean(), {"x": x}), TypeError, r"dict of scalars.*\(12,\)"),
    (lambda x: (x.mean(), {}, {}), TypeError, r"must return \(loss, aux\)"),
  ],
)
def test_what_a_loss_fn_must_return_is_said(returns, error, says):
  loss = lambda w, batch, key: returns(batch["x"] @ w)
  with pytest.raises(error, match=says):
    gradients.gradient_fn(loss)(W, (), {"x": X}, KEY)


def test_what_a_stateful_loss_must_return_is_said():
  fn = lambda w, model_state, batch, key: (jnp.sum(w), {})
  with pytest.raises(TypeError, match=r"\(loss, \(aux, model_state\)\)"):
    gradients.gradient_fn(dj.stateful(fn))(W, {}, {"x": X}, KEY)


def test_late_zeros_are_zeros_whatever_they_wait_for():
  shapes = {
    "a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
    "b": jax.ShapeDtypeStruct((), jnp.int32),
    "c": jnp.ones(4),
  }
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  late = jax.jit(lambda after: gradients.late_zeros(shapes, after))
  for after in (0.0, -1e30, np.inf, -np.inf, np.nan):
    zeros = late(jnp.float32(after))
    assert kinds(zeros) == kinds(shapes)
    assert not any(x.any() for x in jax.tree.leaves(zeros))
  assert kinds(gradients.late_zeros(shapes, None)) == kinds(shapes)


def test_the_compiler_cannot_make_late_zeros_early():
  shape = jax.ShapeDtypeStruct((1000,), jnp.float32)

  text = lambda late: (
    jax.jit(lambda x: gradients.late_zeros(shape, x if late else None))
    .lower(jnp.float32(1.0))
    .compile()
    .as_text()
  )
  # Folded away, nothing would be left to compare.
  assert "compare" in text(True) and "compare" not in text(False)


def test_sums_start_from_no_microbatch_and_grow_by_one():
  one = gradients.microbatch_fn(loss_fn)
  micro = gradients.microbatches({"x": X}, 3)
  sums = gradients.zeros(one, W, (), micro, KEY, jnp.float32(2.0))
  assert not any(x.any() for x in jax.tree.leaves(sums))
  for i in range(3):
    sums = gradients.add_microbatch(one, sums, W, micro, i, KEY)
  means = jax.tree.map(lambda x: x / 3, sums)
  expected = gradients.gradient_fn(loss_fn, 3)(W, (), {"x": X}, KEY)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), means, expected
  )
