"""The Vision Transformer against NumPy, and against itself in other forms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models import vit

SMALL = models.ViTConfig(
  classes=5, patch=3, embed=12, layers=3, heads=3, mlp=10
)
FIXED = dataclasses.replace(SMALL, positions="sincos")
B, H, W, C = 2, 6, 9, 2  # not square: rows and columns are told apart


def build(config=SMALL):
  """A model, and parameters far enough from 0 that every part matters."""
  model, rng = models.ViT(config), np.random.default_rng(0)
  images = rng.normal(size=(B, H, W, C)).astype(np.float32)
  shapes = models.abstract(model, images).params
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  return model, jax.tree.map(draw, shapes), images


@pytest.fixture(scope="module")
def small():
  return build()


@functools.cache
def compiled(model):
  return jax.jit(model.apply)


def run(model, params, images):
  return np.asarray(compiled(model)({"params": params}, images))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def layer(params, k):
  return jax.tree.map(lambda x: x[k], params["blocks"])


# The oracle: float64, loops over images, patches and heads.


def oracle_norm(x, p, eps):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
  return centred / deviation * p["scale"] + p["bias"]


def oracle_place(row, column, e):
  """Of one patch: sin and cos of its column, then of its row."""
  quarter = e // 4
  place = np.zeros(e)
  for i in range(quarter):
    angle = np.array([column, row]) / 10_000 ** (i / (quarter - 1))
    place[i], place[2 * quarter + i] = np.sin(angle)
    place[quarter + i], place[3 * quarter + i] = np.cos(angle)
  return place


def oracle_tokens(image, p, c):  # (h, w, c) -> (p, e)
  s, tokens = c.patch, []
  rows, columns = image.shape[0] // s, image.shape[1] // s
  for row in range(rows):
    for column in range(columns):
      pixels = image[row * s : (row + 1) * s, column * s : (column + 1) * s]
      x = pixels.ravel() @ p["patch"].reshape(-1, c.embed) + p["patch_bias"]
      if c.positions == "learned":
        tokens.append(x + p["position"][row * columns + column])
      else:
        tokens.append(x + oracle_place(row, column, c.embed))
  return np.stack(tokens)


def oracle_attention(x, p, c):  # (p, e)
  out = np.zeros_like(x) + p["out_bias"]
  for k in range(c.heads):
    query, key, value = (
      x @ p[name][:, k] + p[f"{name}_bias"][k]
      for name in ("query", "key", "value")
    )
    shares = np.exp(query @ key.T / np.sqrt(c.embed / c.heads))
    shares /= shares.sum(1, keepdims=True)
    out += shares @ value @ p["out"][k]
  return out


def oracle_feed_forward(x, p):
  y = x @ p["up"] + p["up_bias"]
  y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
  return y @ p["down"] + p["down_bias"]


def oracle(params, images, c):
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  logits = []
  for image in np.asarray(images, np.float64):
    x = oracle_tokens(image, params, c)
    for k in range(c.layers):
      p = layer(params, k)
      y = oracle_norm(x, p["attention_norm"], c.norm_eps)
      x = x + oracle_attention(y, p["attention"], c)
      y = oracle_norm(x, p["feed_forward_norm"], c.norm_eps)
      x = x + oracle_feed_forward(y, p["feed_forward"])
    x = oracle_norm(x, params["final_norm"], c.norm_eps).mean(0)
    logits.append(x @ params["output"]["kernel"] + params["output"]["bias"])
  return np.stack(logits)


@pytest.mark.parametrize("config", [SMALL, FIXED], ids=lambda c: c.positions)
def test_logits_equal_a_numpy_encoder(config):
  model, params, images = build(config)
  close(run(model, params, images), oracle(params, images, config), 2e-5)


# Positions.


def shuffled(images, order):
  """The patches of each image, elsewhere: the k-th is the one of order[k]."""
  s, rows, columns = SMALL.patch, H // SMALL.patch, W // SMALL.patch
  cut = images.reshape(B, rows, s, columns, s, C).swapaxes(2, 3)
  cut = cut.reshape(B, -1, s, s, C)[:, order]
  return (
    cut.reshape(B, rows, columns, s, s, C).swapaxes(2, 3).reshape(B, H, W, C)
  )


ORDER = np.array([4, 0, 5, 2, 1, 3])


def test_patches_move_freely_with_their_learned_positions_only(small):
  model, params, images = small
  whole, moved = run(model, params, images), shuffled(images, ORDER)
  along = params | {"position": params["position"][ORDER]}
  close(run(model, along, moved), whole)
  assert np.abs(run(model, params, moved) - whole).max() > 1e-2
  nowhere = params | {"position": 0 * params["position"]}
  close(run(model, nowhere, moved), run(model, nowhere, images))


def test_fixed_positions_tell_patches_apart():
  model, params, images = build(FIXED)
  assert "position" not in params
  moved = run(model, params, shuffled(images, ORDER))
  assert np.abs(moved - run(model, params, images)).max() > 1e-2
  places = np.asarray(vit.sincos(14, 16, 8))
  far = np.abs(places[:, None] - places).max(-1) + np.eye(len(places))
  assert far.min() > 1e-4


def test_fixed_positions_serve_images_of_any_size():
  model, params, images = build(FIXED)
  twice = np.concatenate([images, images], axis=1)  # (b, 2 h, w, c)
  close(run(model, params, twice), oracle(params, twice, FIXED), 2e-5)
  few, many = vit.sincos(2, 3, 12), vit.sincos(5, 4, 12).reshape(5, 4, 12)
  np.testing.assert_array_equal(few.reshape(2, 3, 12), many[:2, :3])


def test_images_of_another_size_than_the_positions_are_refused(small):
  model, params, images = small
  with pytest.raises(
    ValueError, match=r"3 x 9 pixels have 3 patches.*learned for 6.*sincos"
  ):
    model.apply({"params": params}, images[:, :3])


@pytest.mark.parametrize("size", [(7, 9), (6, 8)])
def test_images_that_are_not_whole_patches_are_refused(size):
  images = jax.ShapeDtypeStruct((1, *size, C), jnp.float32)
  with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} .* patch=3"):
    models.abstract(models.ViT(SMALL), images)


# Other forms of the same function.


def unrolled(params, layers):
  """Stacked parameters as those of a model without scan."""
  flat = {name: value for name, value in params.items() if name != "blocks"}
  return flat | {f"block_{k}": layer(params, k) for k in range(layers)}


def test_scanned_blocks_equal_unrolled_ones(small):
  model, params, images = small
  plain = models.ViT(dataclasses.replace(SMALL, scan=False))
  flat = unrolled(params, SMALL.layers)
  fresh = models.abstract(plain, images).params
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(fresh) == shapes(flat)
  close(run(plain, flat, images), run(model, params, images), 1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_changes_no_loss_and_no_gradient(scan):
  # Dropout is on: what is recomputed must drop the same units.
  config = dataclasses.replace(SMALL, dropout=0.3, layers=2, scan=scan)
  _, params, images = build(config)
  batch, key = {"image": images, "label": np.array([0, 3])}, jax.random.key(9)

  def measure(remat):
    model = models.ViT(dataclasses.replace(config, remat=remat))
    loss_fn = models.classification_loss(model)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
      params, batch, key
    )

  jax.tree.map(close, measure("full"), measure("none"))


def test_each_layer_is_recomputed_by_itself(small):
  _, params, images = small

  def stored(remat):  # bytes between forward and backward pass
    model = models.ViT(dataclasses.replace(SMALL, remat=remat))
    forward = lambda p: jax.jit(model.apply)({"params": p}, images)
    vjp = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp))

  sizes = [stored(r) for r in ("full", "dots_with_no_batch_dims", "none")]
  assert sizes == sorted(set(sizes))


def test_fewer_layers_heads_and_hidden_units_are_those_left_out_zeroed(small):
  model, params, images = small
  names = models.logical_names(model, images)
  kept = {"layers": [0, 2], "heads": [1, 2], "mlp": [1, 2, 5, 7]}

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

  compact = run(model, jax.tree.map(gather, params, names), images)
  dense = run(model, jax.tree.map(zeroed, params, names), images)
  close(compact, dense)
  assert np.abs(dense - run(model, params, images)).max() > 1e-2


def test_computing_in_bfloat16_keeps_float32_parameters_and_logits(small):
  model, params, images = small
  half = models.ViT(dataclasses.replace(SMALL, dtype="bfloat16"))
  loss = lambda p: jnp.square(half.apply({"params": p}, images)).mean()
  grads = jax.eval_shape(jax.grad(loss), params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  logits, exact = run(half, params, images), run(model, params, images)
  assert logits.dtype == jnp.float32
  assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_dropout_needs_training_and_follows_its_key(small):
  _, params, images = small
  model = models.ViT(dataclasses.replace(SMALL, dropout=0.5))

  @functools.partial(jax.jit, static_argnames="train")
  def draw(seed, train):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, images, train=train, rngs=rngs)

  assert (draw(0, True) == draw(0, True)).all()
  assert (draw(0, True) != draw(1, True)).any()
  assert (draw(0, False) == draw(1, False)).all()
