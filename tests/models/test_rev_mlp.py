"""Chains of equal reversible blocks: against NumPy, and backwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models, stages
from distrain_jax.models import parts

RNG = np.random.default_rng(0)
BATCH = {
  "image": RNG.normal(size=(6, 4, 4, 3)).astype(np.float32),
  "label": RNG.integers(0, 10, 6).astype(np.int32),
}
KEY = jax.random.key(5)


def small(**options):
  sizes = {"width": 8, "hidden": 12, "blocks": 3} | options
  return models.create("rev_mlp", **sizes)


def randomised(model):
  shapes = models.abstract(model, BATCH["image"]).params
  draw = lambda x: np.float32(RNG.normal(0.1, 0.3, x.shape))
  return jax.tree.map(draw, shapes)


def layer_norm(x, p):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def test_logits_equal_numpy():
  model = small(activation="tanh", classes=3)
  params = randomised(model)
  dense = lambda x, p: x @ p["kernel"] + p["bias"]
  x = dense(BATCH["image"].reshape(6, -1), params["stem"]["dense"])
  x, r = x[:, :8], x[:, 8:]
  for k in range(3):
    p = params[f"block_{k}"]
    y = np.tanh(dense(layer_norm(x, p["norm"]), p["dense_0"]))
    x, r = r + dense(y, p["dense_1"]), x
  both = np.concatenate([x, r], -1)
  head = params["head"]
  expected = dense(layer_norm(both, head["norm"]), head["output"])
  logits = model.apply({"params": params}, BATCH["image"])
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_all_blocks_share_one_code():
  _, *body, _ = parts.blocks(small(), lambda *_: None)
  assert len({block.kind for block in body}) == 1
  assert all(block.inverse is not None for block in body)
  _, *other, _ = parts.blocks(small(activation="relu"), lambda *_: None)
  assert other[0].kind != body[0].kind


@pytest.mark.parametrize("keep_activations", [True, False])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "grid": 2**-10}])
def test_blocks_compose_to_the_model(options, keep_activations):
  model = small(**options)
  task = models.task(model, "classification", BATCH)
  params = randomised(model)
  whole = jax.value_and_grad(task.loss_fn, has_aux=True)
  (loss, aux), grads = whole(params, BATCH, KEY)
  blocks = parts.blocks(model, task.measure)
  fn = stages.loss_fn(blocks, inputs="image", keep_activations=keep_activations)
  composed = jax.value_and_grad(fn, has_aux=True)
  (other, (other_aux, state)), other_grads = composed(params, {}, BATCH, KEY)
  assert state == {}
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, (other, other_aux), (loss, aux))
  jax.tree.map(close, other_grads, grads)


def test_dropout_is_the_same_on_the_way_back():
  model = small(dropout=0.5)
  task = models.task(model, "classification", BATCH)
  blocks, params = parts.blocks(model, task.measure), randomised(model)

  def run(keep):
    fn = stages.loss_fn(blocks, inputs="image", keep_activations=keep)
    return jax.value_and_grad(fn, has_aux=True)(params, {}, BATCH, KEY)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, run(False), run(True))


def test_inverses_miss_by_rounding_alone_and_on_a_grid_by_nothing():
  image = BATCH["image"]
  for grid, most in ((None, 1e-5), (2**-12, 0)):
    model = small(blocks=8, grid=grid)
    task = models.task(model, "classification", BATCH)
    blocks = parts.blocks(model, task.measure)
    errors = stages.check_inverses(blocks, randomised(model), image)
    assert len(errors) == 8
    assert max(errors.values()) <= most


def test_streams_are_float32_whatever_is_computed_in():
  model = small(dtype="bfloat16", param_dtype="bfloat16")
  blocks = parts.blocks(model, lambda logits, _: (logits.mean(), {}))
  params = models.abstract(model, BATCH["image"]).params
  images = jax.ShapeDtypeStruct((6, 4, 4, 3), jnp.float32)
  _, *streams = stages.abstract_streams(blocks, params, images, {})
  assert {x.dtype for x in jax.tree.leaves(streams)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  "options, message",
  [
    ({"width": 0}, "rev_mlp: `width` must be a whole number above 0; got 0"),
    ({"blocks": 2.0}, "`blocks` must be a whole number above 0; got 2.0"),
    ({"activation": "relo"}, "activation='relo' .* Did you mean 'relu'"),
    ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
    ({"grid": 0.1}, "rev_mlp: grid=0.1 must be a power of two"),
    ({"dtype": "float64"}, "dtype='float64' is not known"),
    ({"depth": 3}, "rev_mlp has no option 'depth'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("rev_mlp", **options)
