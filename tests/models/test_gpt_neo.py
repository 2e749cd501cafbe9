"""GPT-Neo's properties; its numbers are compared in test_huggingface.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models import gpt_neo

SMALL = models.GPTNeoConfig(
  vocab=11, positions=9, embed=12, layers=4, heads=3, mlp=10, window=3
)
B, T = 2, 9


def build(config=SMALL, seed=0):
  """A model, and parameters far enough from 0 that every part matters."""
  model, rng = models.GPTNeo(config), np.random.default_rng(seed)
  tokens = rng.integers(0, config.vocab, (B, T)).astype(np.int32)
  shapes = models.abstract(model, tokens).params
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  return model, jax.tree.map(draw, shapes), tokens


@pytest.fixture(scope="module")
def small():
  return build()


@functools.cache
def compiled(model):
  return jax.jit(model.apply)


def run(model, params, tokens):
  return np.asarray(compiled(model)({"params": params}, tokens))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def with_kind(params, kind, change):
  """The parameters with one kind of layers changed."""
  changed = jax.tree.map(change, params["blocks"][kind])
  return params | {"blocks": params["blocks"] | {kind: changed}}


def influence(model, params, tokens, at):
  """(t,): how far the logits move when the token there is another one."""
  other = tokens.copy()
  other[:, at] = (tokens[:, at] + 1) % model.config.vocab
  moved = run(model, params, other) - run(model, params, tokens)
  return np.abs(moved).max((0, 2))


def test_a_token_changes_no_logits_before_it_and_all_from_it_on(small):
  moved = influence(*small, at=4)
  assert (moved[:4] == 0).all()
  assert (moved[4:] > 1e-4).all()


def test_of_local_layers_alone_no_token_reaches_beyond_their_windows(small):
  model, params, tokens = small
  # Two local layers of 3 tokens see 2 back each. The global ones add nothing.
  local = with_kind(params, "global", np.zeros_like)
  moved = influence(model, local, tokens, at=1)
  assert (moved[[0, 6, 7, 8]] == 0).all()
  assert (moved[1:6] > 1e-5).all()
  # Global layers see everything.
  whole = with_kind(params, "local", np.zeros_like)
  assert (influence(model, whole, tokens, at=1)[1:] > 1e-5).all()


def test_scores_are_not_scaled(small):
  """With 1 / sqrt(d) the queries would have to be sqrt(d) larger."""
  _, params, _ = small
  attention = gpt_neo.Attention(SMALL, None)
  own = jax.tree.map(lambda a: a[0], params["blocks"]["global"]["attention"])
  x = np.random.default_rng(1).normal(size=(1, 4, 12)).astype(np.float32)
  heads = lambda name: np.einsum("te,ekd->ktd", x[0], own[name])
  scores = heads("query") @ heads("key").swapaxes(1, 2)
  scores = np.where(np.tri(4, dtype=bool), scores, -np.inf)
  shares = np.exp(scores - scores.max(-1, keepdims=True))
  shares /= shares.sum(-1, keepdims=True)
  wanted = np.einsum("ktd,kde->te", shares @ heads("value"), own["out"])
  got = attention.apply({"params": own}, x)[0]
  close(got, wanted + own["out_bias"])


def unrolled(params, layers):
  """Stacked parameters as those of a model without scan."""
  kinds = params["blocks"]["global"], params["blocks"]["local"]
  flat = {name: value for name, value in params.items() if name != "blocks"}
  for k in range(layers):
    own = functools.partial(lambda i, a: a[i], k // 2)
    flat[f"block_{k}"] = jax.tree.map(own, kinds[k % 2])
  return flat


def test_scanned_pairs_equal_unrolled_layers(small):
  model, params, tokens = small
  plain = models.GPTNeo(dataclasses.replace(SMALL, scan=False))
  flat = unrolled(params, SMALL.layers)
  fresh = models.abstract(plain, tokens).params
  assert jax.tree.structure(fresh) == jax.tree.structure(flat)
  close(run(plain, flat, tokens), run(model, params, tokens))


def test_remat_changes_no_loss_and_no_gradient():
  # Dropout is on: what is recomputed must drop the same units.
  config = dataclasses.replace(SMALL, dropout=0.3, layers=2)
  _, params, tokens = build(config)
  batch, key = {"tokens": tokens, "targets": tokens[:, ::-1]}, jax.random.key(9)

  def measure(remat):
    model = models.GPTNeo(dataclasses.replace(config, remat=remat))
    loss_fn = models.language_model_loss(model)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
      params, batch, key
    )

  jax.tree.map(close, measure("full"), measure("none"))


def test_each_layer_is_recomputed_by_itself(small):
  _, params, tokens = small

  def stored(remat):  # bytes between forward and backward pass
    model = models.GPTNeo(dataclasses.replace(SMALL, remat=remat))
    forward = lambda p: jax.jit(model.apply)({"params": p}, tokens)
    vjp = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp))

  sizes = [stored(r) for r in ("full", "dots_with_no_batch_dims", "none")]
  assert sizes == sorted(set(sizes))


def test_fewer_pairs_heads_and_hidden_units_are_those_left_out_zeroed(small):
  model, params, tokens = small
  names = models.logical_names(model, tokens)
  kept = {"layers": [1], "heads": [0, 2], "mlp": [1, 2, 5, 7]}

  def gather(array, axes):
    for axis, name in enumerate(axes):
      if name in kept:
        array = np.take(array, kept[name], axis)
    return array

  def zeroed(array, axes):
    for axis, name in enumerate(axes):
      if name in kept:
        mask = np.isin(np.arange(array.shape[axis]), kept[name])
        shape = [1] * array.ndim
        shape[axis] = -1
        array = array * mask.reshape(shape).astype(np.float32)
    return array

  compact = run(model, jax.tree.map(gather, params, names), tokens)
  dense = run(model, jax.tree.map(zeroed, params, names), tokens)
  close(compact, dense)
  assert np.abs(dense - run(model, params, tokens)).max() > 1e-2


def test_computing_in_bfloat16_keeps_float32_parameters_and_logits(small):
  model, params, tokens = small
  half = models.GPTNeo(dataclasses.replace(SMALL, dtype="bfloat16"))
  loss = lambda p: jnp.square(half.apply({"params": p}, tokens)).mean()
  grads = jax.eval_shape(jax.grad(loss), params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  logits, exact = run(half, params, tokens), run(model, params, tokens)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_param_dtype_is_the_dtype_of_new_parameters():
  model = models.create("gpt_neo", param_dtype="bfloat16")
  params = models.abstract(model, jnp.zeros((1, 2), jnp.int32))
  dtypes = {x.dtype for x in jax.tree.leaves(params)}
  assert dtypes == {jnp.dtype("bfloat16")}


def test_new_weights_have_their_spread_and_predict_nothing():
  model = models.create("gpt_neo", layers=2)
  tokens = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
  params = models.init(model, jax.random.key(0), tokens).params
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    if "bias" in name or name == "scale":
      assert (x == (name == "scale")).all()
    else:
      np.testing.assert_allclose(x.std(), 0.02, rtol=0.02)
  loss_fn = jax.jit(models.language_model_loss(model))
  batch = {"tokens": tokens, "targets": tokens[:, ::-1]}
  loss, _ = loss_fn(params, batch, jax.random.key(2))
  assert abs(loss - np.log(256)) < 0.1


def count(config):
  """From the architecture's description alone."""
  e, m = config.embed, config.mlp
  attention = 4 * e * e + e  # no bias but the output's
  feed_forward = 2 * e * m + m + e
  block = attention + feed_forward + 2 * 2 * e  # two norms
  tables = (config.vocab + config.positions) * e
  return tables + config.layers * block + 2 * e


TOTALS = {
  "tiny": 890_112,
  "125M": 125_198_592,
  "1.3B": 1_315_575_808,
  "2.7B": 2_651_307_520,
}


@pytest.mark.parametrize("preset", TOTALS)
def test_presets_have_their_stated_number_of_parameters(preset):
  assert gpt_neo.PRESETS.keys() == TOTALS.keys()
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  for options in ({}, {"scan": False, "layers": 3}):
    model = models.create("gpt_neo", preset=preset, **options)
    params = models.abstract(model, tokens).params
    assert sum(x.size for x in jax.tree.leaves(params)) == count(model.config)
  assert count(gpt_neo.PRESETS[preset]) == TOTALS[preset]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"embed": 130}, "embed=130 is not a multiple of heads=4"),
    ({"layers": 3}, "layers=3 is odd, but scan=True .* layers=4, or"),
    ({"window": 0}, "`window` must be a whole number above 0; got 0"),
    ({"positions": 2.5}, "`positions` must be a whole number above 0; got 2.5"),
    ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\); got 1.0"),
    ({"remat": "dot"}, "remat='dot' is not known. Did you mean 'dots'"),
    ({"attention": "flash"}, "attention='flash' .* Valid: cudnn, xla"),
    ({"dtype": "bf16"}, "dtype='bf16' is not known. Did you mean 'bfloat16'"),
    ({"preset": "2.7b"}, "preset='2.7b' is not known. Did you mean '2.7B'"),
    ({"kv_heads": 2}, "gpt_neo has no option 'kv_heads'. Did you mean 'heads'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("gpt_neo", **options)


def test_rows_longer_than_the_positions_are_refused(small):
  model, params, _ = small
  tokens = np.zeros((1, 10), np.int32)
  with pytest.raises(ValueError, match=r"rows of 10 tokens.*positions=9"):
    model.apply({"params": params}, tokens)
