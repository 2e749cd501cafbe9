"""The reversible encoder: its formula, its way back, its parts as blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models, stages
from distrain_jax.models import parts, rev_vit, vit

SIZES = {
  "classes": 5,
  "patch": 3,
  "embed": 12,
  "layers": 3,
  "heads": 3,
  "mlp": 10,
}
SMALL = models.RevViTConfig(**SIZES)
GRID = 2**-12
B, H, W, C = 2, 6, 9, 2  # not square: rows and columns are told apart


def build(config=SMALL):
  """A model, and parameters far enough from 0 that every part matters."""
  model, rng = models.RevViT(config), np.random.default_rng(0)
  images = rng.normal(size=(B, H, W, C)).astype(np.float32)
  shapes = models.abstract(model, images).params
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  return model, jax.tree.map(draw, shapes), images


@pytest.fixture(scope="module")
def small():
  return build()


def run(model, params, images):
  return np.asarray(jax.jit(model.apply)({"params": params}, images))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def count(model, example):
  return sum(x.size for x in jax.tree.leaves(models.abstract(model, example)))


def layer_norm(x, p):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + SMALL.norm_eps)
  return centred / deviation * p["scale"][None, None] + p["bias"][None, None]


def embedded(params, images):
  """The patches in rows, times their matrix, with their positions."""
  s = SMALL.patch
  x = images.reshape(B, H // s, s, W // s, s, C).swapaxes(2, 3)
  x = x.reshape(B, -1, s * s * C) @ params["patch"].reshape(-1, SMALL.embed)
  return x + (params["patch_bias"][None] + params["position"])[None]


def test_logits_equal_reformers_two_streams_of_a_vits_layers(small):
  model, params, images = small
  apply = lambda module, p, x: module.apply({"params": p}, x)
  first = second = embedded(params["embedding"], images)
  for k in range(SMALL.layers):
    p, q = params[f"attention_{k}"], params[f"feed_forward_{k}"]
    x = layer_norm(first, p["norm"])
    second = second + apply(vit.Attention(SMALL), p["attention"], x)
    x = layer_norm(second, q["norm"])
    first = first + apply(vit.FeedForward(SMALL), q["feed_forward"], x)
  x = layer_norm((first + second) / 2, params["output"]["norm"]).mean(1)
  dense = params["output"]["dense"]
  close(
    run(model, params, images), x @ dense["kernel"] + dense["bias"][None], 2e-5
  )


def test_there_are_as_many_parameters_as_in_a_vit():
  images = jax.ShapeDtypeStruct((1, 48, 48, 3), jnp.float32)
  assert rev_vit.PRESETS.keys() == vit.PRESETS.keys()
  for preset in rev_vit.PRESETS:
    model = models.create("rev_vit", preset=preset)
    plain = models.create("vit", preset=preset)
    assert count(model, images) == count(plain, images)


def test_every_axis_has_a_name_and_the_layers_share_theirs(small):
  model, params, images = small
  names = models.logical_names(model, images)
  for x, axes in zip(
    jax.tree.leaves(params),
    jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple)),
  ):
    assert x.ndim == len(axes)
  assert names["attention_0"] == names["attention_2"]
  assert names["feed_forward_1"]["feed_forward"]["up"] == ("embed", "mlp")
  assert names["output"]["dense"]["kernel"] == ("embed", "classes")


def test_fixed_positions_have_no_parameters():
  model, params, images = build(dataclasses.replace(SMALL, positions="sincos"))
  assert params["embedding"].keys() == {"patch", "patch_bias"}
  taller = np.concatenate([images, images], axis=1)
  assert run(model, params, taller).shape == (B, SMALL.classes)


# Blocks.


def task_and_blocks(config, **options):
  model, params, images = build(config)
  batch = {"image": images, "label": np.array([0, 3], np.int32)}
  task = models.task(model, "classification", batch, **options)
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
  task, blocks, params, batch = task_and_blocks(config, label_smoothing=0.1)
  fn = stages.loss_fn(blocks, inputs="image", keep_activations=keep)

  def composed(params, batch, key):
    loss, (aux, state) = fn(params, {}, batch, key)
    assert not state
    return loss, aux

  grad = lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))
  key = jax.random.key(0)
  got, wanted = (grad(f)(params, batch, key) for f in (composed, task.loss_fn))
  jax.tree.map(lambda a, b: close(a, b, 1e-6 if keep else 2e-5), got, wanted)
  # Not of the keys' biases: softmax takes what is common to all keys away.
  assert np.abs(wanted[1]["embedding"]["patch"]).max() > 1e-4
  assert np.abs(wanted[1]["attention_0"]["attention"]["out"]).max() > 1e-4


@pytest.mark.parametrize("rate", ["dropout", "stochastic_depth"])
def test_the_way_back_drops_what_the_way_forward_dropped(rate):
  config = dataclasses.replace(SMALL, **{rate: 0.5})
  _, blocks, params, batch = task_and_blocks(config)

  def grads(seed, keep):
    fn = stages.loss_fn(blocks, inputs="image", keep_activations=keep)
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
  inputs, targets = batch["image"], {"label": batch["label"]}
  errors = stages.check_inverses(blocks, params, inputs, tolerance=1e-6)
  assert len(errors) == 2 * SMALL.layers
  _, *streams = stages.abstract_streams(blocks, params, inputs, targets)
  dtypes = {x.dtype for x in jax.tree.leaves(streams)}
  assert dtypes == {jnp.dtype("float32")}


def there_and_back(config):
  """What enters the couplings, and that reconstructed from what leaves them."""
  _, (first, *couplings, _), params, batch = task_and_blocks(config)
  key = jax.random.key(0)

  def whole(params, images):
    x, _ = first.forward(params[first.name], {}, images, key)
    y = x
    for block in couplings:
      y, _ = block.forward(params[block.name], {}, y, key)
    return x, y

  def back(params, y):
    for block in couplings[::-1]:
      y = block.inverse(params[block.name], {}, y, key)
    return y

  x, y = jax.jit(whole)(params, batch["image"])
  return x, jax.jit(back)(params, y)


def test_streams_on_the_grid_are_reconstructed_exactly():
  x, back = there_and_back(dataclasses.replace(SMALL, layers=8, grid=GRID))
  jax.tree.map(np.testing.assert_array_equal, back, x)
  assert (np.asarray(x[0]) % GRID == 0).all()
  x, back = there_and_back(dataclasses.replace(SMALL, layers=8))
  assert (np.asarray(back[0]) != np.asarray(x[0])).any()


def test_computing_in_bfloat16_keeps_float32_parameters_and_logits(small):
  model, params, images = small
  half = models.RevViT(dataclasses.replace(SMALL, dtype="bfloat16"))
  loss = lambda p: jnp.square(half.apply({"params": p}, images)).mean()
  grads = jax.eval_shape(jax.grad(loss), params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  logits, exact = run(half, params, images), run(model, params, images)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()
  branch = rev_vit.Branch(half.config, "attention")
  x = np.ones((B, 6, SMALL.embed), np.float32)
  y = branch.apply({"params": params["attention_0"]}, x)
  assert y.dtype == jnp.float32  # what a coupling adds to a float32 stream


@pytest.mark.parametrize(
  "options, message",
  [
    ({"scan": True}, "rev_vit: scan=True stacks.*Set scan=False"),
    ({"remat": "full"}, r"rev_vit: remat='full'.*keep_activations=False"),
    ({"grid": 0.001}, r"rev_vit: grid=0\.001 must be a power of two"),
    ({"embed": 30}, "embed=30 is not a multiple of heads=4"),
    ({"gird": 0.5}, "rev_vit has no option 'gird'. Did you mean 'grid'"),
  ],
)
def test_options_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("rev_vit", **options)
