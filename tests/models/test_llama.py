"""The decoder against NumPy, and against itself in its other forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models.options import REMAT

SMALL = models.LlamaConfig(
  vocab=11, embed=12, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=10
)
B, T = 2, 7


def build(config=SMALL, seed=0):
  """A model, and parameters far enough from 0 that every part matters."""
  model, rng = models.Llama(config), np.random.default_rng(seed)
  tokens = rng.integers(0, config.vocab, (B, T)).astype(np.int32)
  shapes = models.abstract(model, tokens).params
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes)
  return model, params, tokens


@pytest.fixture(scope="module")
def small():
  return build()


def run(model, params, tokens):
  return np.asarray(jax.jit(model.apply)({"params": params}, tokens))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def layer(params, k):
  return jax.tree.map(lambda x: x[k], params["blocks"])


# The oracle: float64, loops over rows and heads, rotations as complex numbers.


def oracle_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def oracle_rotate(x, theta):  # (t, d)
  t, d = x.shape
  turns = np.outer(np.arange(t), theta ** (-2 * np.arange(d // 2) / d))
  pairs = (x[:, : d // 2] + 1j * x[:, d // 2 :]) * np.exp(1j * turns)
  return np.concatenate([pairs.real, pairs.imag], axis=-1)


def oracle_attention(x, p, c):  # (t, e)
  t, out = len(x), np.zeros_like(x)
  for head in range(c.heads):
    shared, own = divmod(head, c.heads // c.kv_heads)
    query = oracle_rotate(x @ p["query"][:, shared, own], c.rope_theta)
    key = oracle_rotate(x @ p["key"][:, shared], c.rope_theta)
    value = x @ p["value"][:, shared]
    for now in range(t):
      scores = key[: now + 1] @ query[now] / np.sqrt(c.head_dim)
      shares = np.exp(scores - scores.max())
      mixed = shares @ value[: now + 1] / shares.sum()
      out[now] += mixed @ p["out"][shared, own]
  return out


def oracle(params, tokens, c):
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  logits = []
  for row in np.asarray(tokens):
    x = params["embedding"][row]
    for k in range(c.layers):
      p = layer(params, k)
      y = oracle_norm(x, p["attention_norm"]["scale"], c.norm_eps)
      x = x + oracle_attention(y, p["attention"], c)
      y = oracle_norm(x, p["feed_forward_norm"]["scale"], c.norm_eps)
      f = p["feed_forward"]
      gate = y @ f["gate"]
      x = x + (gate / (1 + np.exp(-gate)) * (y @ f["up"])) @ f["down"]
    x = oracle_norm(x, params["final_norm"]["scale"], c.norm_eps)
    logits.append(x @ params["output"])
  return np.stack(logits)


def test_logits_equal_a_numpy_decoder(small):
  model, params, tokens = small
  logits = run(model, params, tokens)
  close(logits, oracle(params, tokens, SMALL), 2e-5)


def test_a_token_changes_no_logits_before_it(small):
  model, params, tokens = small
  changed = tokens.copy()
  changed[:, 4] = (tokens[:, 4] + 1) % SMALL.vocab
  before = run(model, params, tokens)
  after = run(model, params, changed)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(before - after)[:, 4:].max(-1) > 1e-4).all()


def test_grouped_queries_equal_full_attention_with_repeated_keys(small):
  model, params, tokens = small
  attention = dict(params["blocks"]["attention"])
  queries = SMALL.heads // SMALL.kv_heads
  n, e, k, q, d = attention["query"].shape
  attention["query"] = attention["query"].reshape(n, e, k * q, 1, d)
  attention["out"] = attention["out"].reshape(n, k * q, 1, d, e)
  for name in ("key", "value"):
    attention[name] = np.repeat(attention[name], queries, axis=2)
  blocks = params["blocks"] | {"attention": attention}
  full = models.Llama(dataclasses.replace(SMALL, kv_heads=SMALL.heads))
  close(
    run(full, params | {"blocks": blocks}, tokens),
    run(model, params, tokens),
  )


def test_scanned_blocks_equal_unrolled_ones(small):
  model, params, tokens = small
  unrolled = models.Llama(dataclasses.replace(SMALL, scan=False))
  flat = {name: value for name, value in params.items() if name != "blocks"}
  flat |= {f"block_{k}": layer(params, k) for k in range(SMALL.layers)}
  fresh = models.abstract(unrolled, tokens).params
  assert jax.tree.structure(fresh) == jax.tree.structure(flat)
  close(
    run(unrolled, flat, tokens),
    run(model, params, tokens),
    1e-6,
  )


@pytest.fixture(scope="module")
def differentiated():
  """Loss and gradients by remat policy, on parameters shared by all."""
  # Dropout is on: what is recomputed must drop the same units.
  config = dataclasses.replace(SMALL, dropout=0.3, layers=2)
  _, params, tokens = build(config)
  batch, key = {"tokens": tokens, "targets": tokens[:, ::-1]}, jax.random.key(9)

  @functools.cache
  def measure(remat, scan):
    model = models.Llama(dataclasses.replace(config, remat=remat, scan=scan))
    given = params
    if not scan:
      given = {name: p for name, p in params.items() if name != "blocks"}
      given |= {f"block_{k}": layer(params, k) for k in range(config.layers)}
    loss_fn = models.language_model_loss(model)
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    return grad_fn(given, batch, key)

  return measure


@pytest.mark.parametrize(
  "remat, scan",
  [
    ("full", True),
    ("dots_with_no_batch_dims", True),
    ("full", False),
  ],
)
def test_remat_changes_no_loss_and_no_gradient(differentiated, remat, scan):
  exact = differentiated("none", scan)
  jax.tree.map(close, differentiated(remat, scan), exact)


def test_each_remat_policy_stores_less_than_the_next(small):
  _, params, tokens = small

  def stored(remat):  # bytes between forward and backward pass
    model = models.Llama(dataclasses.replace(SMALL, remat=remat))
    forward = lambda p: jax.jit(model.apply)({"params": p}, tokens)
    vjp = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp))

  policies = ("full", "dots_with_no_batch_dims", "dots", "none")
  assert policies == tuple(sorted(REMAT, key=policies.index))
  sizes = [stored(remat) for remat in policies]
  assert sizes == sorted(set(sizes))


def test_a_tied_output_layer_is_the_embedding(small):
  model, params, tokens = small
  tied = models.Llama(dataclasses.replace(SMALL, tied=True))
  fresh = models.abstract(tied, tokens).params
  assert "output" not in fresh
  shared = {name: value for name, value in params.items() if name != "output"}
  untied = params | {"output": params["embedding"].T}
  close(
    run(tied, shared, tokens),
    run(model, untied, tokens),
    1e-6,
  )


def test_computing_in_bfloat16_keeps_float32_parameters_and_logits(small):
  model, params, tokens = small
  half = models.Llama(dataclasses.replace(SMALL, dtype="bfloat16"))
  loss = lambda p: jnp.square(half.apply({"params": p}, tokens)).mean()
  grads = jax.eval_shape(jax.grad(loss), params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  logits, exact = run(half, params, tokens), run(model, params, tokens)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_param_dtype_is_the_dtype_of_new_parameters():
  model = models.create("llama", param_dtype="bfloat16")
  params = models.abstract(model, jnp.zeros((1, 2), jnp.int32))
  dtypes = {x.dtype for x in jax.tree.leaves(params)}
  assert dtypes == {jnp.dtype("bfloat16")}


def test_dropout_needs_training_and_follows_its_key(small):
  _, params, tokens = small
  model = models.Llama(dataclasses.replace(SMALL, dropout=0.5))

  @functools.partial(jax.jit, static_argnames="train")
  def draw(seed, train):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, tokens, train=train, rngs=rngs)

  assert (draw(0, True) == draw(0, True)).all()
  assert (draw(0, True) != draw(1, True)).any()
  assert (draw(0, False) == draw(1, False)).all()


def test_new_weights_have_their_spread_differ_by_layer_and_predict_nothing():
  model = models.create("llama", preset="tiny", layers=8)
  tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
  params = models.init(model, jax.random.key(0), tokens).params
  blocks = jax.tree.map(np.asarray, params["blocks"])
  for part in ("attention", "feed_forward"):
    for name, weight in blocks[part].items():
      branch_end = name in ("out", "down")
      expected = 0.02 / 4 if branch_end else 0.02  # 4 = sqrt(2 * 8 layers)
      np.testing.assert_allclose(weight.std(), expected, rtol=0.02)
      assert (weight[0] != weight[1]).mean() > 0.999
  loss_fn = jax.jit(models.language_model_loss(model))
  batch = {"tokens": tokens, "targets": tokens}
  loss, _ = loss_fn(params, batch, jax.random.key(2))
  assert abs(loss - np.log(256)) < 0.1
