"""The reversible decoder: its formula, its way back, its parts as blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models, stages
from distrain_jax.models import llama, parts, rev_llama
from distrain_jax.models.norms import RMSNorm

SIZES = {
  "vocab": 11,
  "embed": 12,
  "layers": 3,
  "heads": 4,
  "kv_heads": 2,
  "head_dim": 6,
  "mlp": 10,
}
SMALL = models.RevLlamaConfig(**SIZES)
GRID = 2**-12
B, T = 2, 7


def build(config=SMALL, seed=0):
  """A model, and parameters far enough from 0 that every part matters."""
  model, rng = models.RevLlama(config), np.random.default_rng(seed)
  tokens = rng.integers(0, config.vocab, (B, T)).astype(np.int32)
  shapes = models.abstract(model, tokens).params
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  return model, jax.tree.map(draw, shapes), tokens


@pytest.fixture(scope="module")
def small():
  return build()


def run(model, params, tokens):
  return np.asarray(jax.jit(model.apply)({"params": params}, tokens))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def count(model, example):
  return sum(x.size for x in jax.tree.leaves(models.abstract(model, example)))


def test_logits_equal_reformers_two_streams_of_a_llamas_layers(small):
  model, params, tokens = small
  apply = lambda module, p, x: module.apply({"params": p}, x)
  norm = RMSNorm("embed", SMALL.norm_eps)
  first = second = params["embedding"]["table"][tokens]
  for k in range(SMALL.layers):
    p, q = params[f"attention_{k}"], params[f"feed_forward_{k}"]
    x = apply(norm, p["norm"], first)
    second = second + apply(llama.Attention(SMALL), p["attention"], x)
    x = apply(norm, q["norm"], second)
    first = first + apply(llama.FeedForward(SMALL), q["feed_forward"], x)
  x = apply(norm, params["output"]["norm"], (first + second) / 2)
  close(run(model, params, tokens), x @ params["output"]["kernel"])


def test_a_token_changes_no_logits_before_it(small):
  model, params, tokens = small
  changed = tokens.copy()
  changed[:, 4] = (tokens[:, 4] + 1) % SMALL.vocab
  before = run(model, params, tokens)
  after = run(model, params, changed)
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(before - after)[:, 4:].max(-1) > 1e-4).all()


def test_there_are_as_many_parameters_as_in_a_llama():
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  plain = models.Llama(models.LlamaConfig(**SIZES))
  assert count(models.RevLlama(SMALL), tokens) == count(plain, tokens)
  assert rev_llama.PRESETS.keys() == llama.PRESETS.keys()
  for preset in rev_llama.PRESETS:
    model = models.create("rev_llama", preset=preset)
    plain = models.create("llama", preset=preset)
    assert count(model, tokens) == count(plain, tokens)


def test_new_weights_have_the_spread_of_a_llamas():
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = models.init(
    models.create("rev_llama", layers=8), jax.random.key(0), tokens
  ).params
  layer = params["attention_3"]["attention"], params["feed_forward_7"]
  weights = (
    (params["embedding"]["table"], 0.02),
    (layer[0]["query"], 0.02),
    (layer[0]["out"], 0.02 / 4),  # 4 = sqrt(2 * 8 layers)
    (layer[1]["feed_forward"]["down"], 0.02 / 4),
    (params["output"]["kernel"], 0.02),
  )
  for weight, expected in weights:
    np.testing.assert_allclose(np.std(weight), expected, rtol=0.05)


def test_every_axis_has_a_name_and_the_layers_share_theirs(small):
  model, params, tokens = small
  names = models.logical_names(model, tokens)
  for x, axes in zip(
    jax.tree.leaves(params),
    jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple)),
  ):
    assert x.ndim == len(axes)
  assert names["attention_0"] == names["attention_2"]
  assert names["feed_forward_1"]["feed_forward"]["up"] == ("embed", "mlp")
  assert names["output"]["kernel"] == ("embed", "vocab")


def test_fewer_heads_and_hidden_units_are_those_left_out_zeroed(small):
  model, params, tokens = small
  names = models.logical_names(model, tokens)
  kept = {"heads": [1], "mlp": [1, 2, 5, 7]}

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
  close(compact, run(model, jax.tree.map(zeroed, params, names), tokens))


# Blocks.


def task_and_blocks(config, **options):
  model, params, tokens = build(config)
  batch = {"tokens": tokens, "targets": tokens[:, ::-1]}
  task = models.task(model, "language_model", batch, **options)
  return task, parts.blocks(model, task.measure), params, batch


def test_the_layers_blocks_are_of_two_kinds():
  _, blocks, _, _ = task_and_blocks(SMALL)
  first, *couplings, last = blocks
  assert (first.name, last.name) == ("embedding", "output")
  names = [b.name for b in couplings]
  assert names[:3] == ["attention_0", "feed_forward_0", "attention_1"]
  assert len(names) == 2 * SMALL.layers
  assert len({b.kind for b in couplings[::2]}) == 1
  assert len({b.kind for b in couplings[1::2]}) == 1
  assert couplings[0].kind != couplings[1].kind


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("grid", [None, GRID])
def test_the_blocks_have_the_models_loss_and_gradients(grid, keep):
  config = dataclasses.replace(SMALL, grid=grid)
  task, blocks, params, batch = task_and_blocks(config, bytes_per_token=2.0)
  fn = stages.loss_fn(blocks, inputs="tokens", keep_activations=keep)

  def composed(params, batch, key):
    loss, (aux, state) = fn(params, {}, batch, key)
    assert not state
    return loss, aux

  grad = lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))
  key = jax.random.key(0)
  got, wanted = (grad(f)(params, batch, key) for f in (composed, task.loss_fn))
  jax.tree.map(lambda a, b: close(a, b, 1e-6 if keep else 2e-5), got, wanted)
  assert all(np.abs(g).max() > 1e-5 for g in jax.tree.leaves(wanted[1]))


@pytest.mark.parametrize("rate", ["dropout", "stochastic_depth"])
def test_the_way_back_drops_what_the_way_forward_dropped(rate):
  config = dataclasses.replace(SMALL, **{rate: 0.5})
  _, blocks, params, batch = task_and_blocks(config)

  def grads(seed, keep):
    fn = stages.loss_fn(blocks, inputs="tokens", keep_activations=keep)
    grad = jax.jit(jax.grad(lambda *args: fn(*args)[0]))
    return grad(params, {}, batch, jax.random.key(seed))

  kept = grads(0, True)
  jax.tree.map(lambda a, b: close(a, b, 2e-5), grads(0, False), kept)
  other = grads(1, True)
  differ = jax.tree.map(lambda a, b: (a != b).any(), kept, other)
  assert any(jax.tree.leaves(differ))


# The way back.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_coupling_has_its_inverse_whatever_f_is_computed_in(dtype):
  config = dataclasses.replace(SMALL, dtype=dtype)
  _, blocks, params, batch = task_and_blocks(config)
  inputs, targets = batch["tokens"], {"targets": batch["targets"]}
  errors = stages.check_inverses(blocks, params, inputs, tolerance=1e-6)
  assert len(errors) == 2 * SMALL.layers
  _, *streams = stages.abstract_streams(blocks, params, inputs, targets)
  dtypes = {x.dtype for x in jax.tree.leaves(streams)}
  assert dtypes == {jnp.dtype("float32")}


def there_and_back(config):
  """What enters the couplings, and that reconstructed from what leaves them."""
  _, (first, *couplings, _), params, batch = task_and_blocks(config)
  key = jax.random.key(0)

  def whole(params, tokens):
    x, _ = first.forward(params[first.name], {}, tokens, key)
    y = x
    for block in couplings:
      y, _ = block.forward(params[block.name], {}, y, key)
    return x, y

  def back(params, y):
    for block in couplings[::-1]:
      y = block.inverse(params[block.name], {}, y, key)
    return y

  x, y = jax.jit(whole)(params, batch["tokens"])
  return x, jax.jit(back)(params, y)


def test_streams_on_the_grid_are_reconstructed_exactly():
  x, back = there_and_back(dataclasses.replace(SMALL, layers=8, grid=GRID))
  jax.tree.map(np.testing.assert_array_equal, back, x)
  assert (np.asarray(x[0]) % GRID == 0).all()
  x, back = there_and_back(dataclasses.replace(SMALL, layers=8))
  assert (np.asarray(back[0]) != np.asarray(x[0])).any()


def test_a_grid_changes_the_logits_by_its_rounding_alone(small):
  model, params, tokens = small
  fine = models.RevLlama(dataclasses.replace(SMALL, grid=GRID))
  exact = run(model, params, tokens)
  error = np.abs(run(fine, params, tokens) - exact).max()
  assert 0 < error < 20 * GRID * np.abs(exact).max()


def test_computing_in_bfloat16_keeps_float32_parameters_and_logits(small):
  model, params, tokens = small
  half = models.RevLlama(dataclasses.replace(SMALL, dtype="bfloat16"))
  loss = lambda p: jnp.square(half.apply({"params": p}, tokens)).mean()
  grads = jax.eval_shape(jax.grad(loss), params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  logits, exact = run(half, params, tokens), run(model, params, tokens)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
  branch = rev_llama.Branch(half.config, "attention")
  x = np.ones((B, T, SMALL.embed), np.float32)
  y = branch.apply({"params": params["attention_0"]}, x)
  assert y.dtype == jnp.float32  # what a coupling adds to a float32 stream


@pytest.mark.parametrize(
  "options, message",
  [
    ({"scan": True}, "rev_llama: scan=True stacks.*Set scan=False"),
    ({"remat": "full"}, r"rev_llama: remat='full'.*keep_activations=False"),
    ({"tied": True}, r"rev_llama: tied=True.*Set tied=False"),
    ({"grid": 0.001}, r"rev_llama: grid=0\.001 must be a power of two"),
    ({"grid": -0.5}, r"rev_llama: grid=-0\.5 must be a power of two"),
    ({"heads": 3}, "heads=3 must be a multiple of kv_heads=2"),
    ({"gird": 0.5}, "rev_llama has no option 'gird'. Did you mean 'grid'"),
  ],
)
def test_options_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("rev_llama", **options)
