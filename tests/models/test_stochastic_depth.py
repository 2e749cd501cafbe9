"""Stochastic depth and the dropout of channels, in training only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
TOKENS = rng.integers(0, 256, (3, 5)).astype(np.int32)
LAYERS = 3
TRANSFORMER = {"embed": 16, "layers": LAYERS, "heads": 4, "mlp": 12}
APART = {**TRANSFORMER, "scan": False}
RESNET = {"width": 1 / 16, "zero_last_scale": False}
MODELS = {
  "llama": (lambda **o: models.create("llama", **APART, **o), TOKENS),
  "llama, recomputed": (
    lambda **o: models.create("llama", **APART, remat="full", **o),
    TOKENS,
  ),
  "gpt_neo": (lambda **o: models.create("gpt_neo", **APART, **o), TOKENS),
  "vit": (lambda **o: models.create("vit", **APART, **o), IMAGES),
  "resnet": (
    lambda **o: models.ResNet(stages=(LAYERS,), norm="group", **RESNET, **o),
    IMAGES,
  ),
  "resnet, batch": (
    lambda **o: models.ResNet(stages=(LAYERS,), **RESNET, **o),
    IMAGES,
  ),
}


@pytest.fixture(params=MODELS, scope="module")
def made(request):
  make, example = MODELS[request.param]

  def draw(path, x):
    if path[-1].key in ("scale", "var"):
      return np.float32(rng.uniform(0.5, 1.5, x.shape))
    return np.float32(rng.normal(0, 0.3, x.shape))

  shapes = models.abstract(make(), example)
  return make, example, jax.tree_util.tree_map_with_path(draw, shapes)


def run(model, variables, example, seed=None):
  """Logits; in training with a key where a seed is given."""
  params, state = variables
  options = {}
  if seed is not None:
    rngs = {"dropout": jax.random.key(seed)}
    options = {"train": True, "rngs": rngs, "mutable": list(state)}
  out = model.apply({"params": params, **state}, example, **options)
  return out if seed is None else out[0]


def subsets(model, example, variables, rate):
  """Logits for each set of blocks that survive, their branches scaled."""
  params, state = variables
  writers = models.branch_writers(model, example)
  blocks, out = models.blocks(model, example), {}
  assert len(blocks) == LAYERS
  for kept in np.ndindex(*(2,) * LAYERS):
    there = {b for b, k in zip(blocks, kept) if k}
    scaled = jax.tree.map(
      lambda x, writes: x / (1 - rate) if writes else x, params, writers
    )
    left = lambda tree, there=there: {
      key: x for key, x in tree.items() if key not in blocks or key in there
    }
    left_state = {name: left(tree) for name, tree in state.items()}
    out[kept] = run(model, (left(scaled), left_state), example, seed=0)
  return out


def test_a_step_is_one_without_the_dropped_blocks(made):
  make, example, variables = made
  rate = 0.4
  expected = subsets(make(), example, variables, rate)
  model, seen = make(stochastic_depth=rate), {}
  for seed in range(12):
    logits = run(model, variables, example, seed)
    far = {k: np.abs(logits - x).max() for k, x in expected.items()}
    kept = min(far, key=far.get)
    np.testing.assert_allclose(
      logits, expected[kept], rtol=1e-4, atol=1e-4 * np.abs(logits).max()
    )
    assert sorted(far.values())[1] > 1e-2  # no other set of blocks has these
    seen[kept] = seen.get(kept, 0) + 1
  assert len(seen) >= 4  # blocks are drawn apart


def test_evaluation_knows_nothing_of_it(made):
  make, example, variables = made
  found = run(make(stochastic_depth=0.4), variables, example)
  np.testing.assert_array_equal(found, run(make(), variables, example))


def test_a_rate_of_zero_draws_nothing(made):
  """So the dropout of models without it is what it was."""
  make, example, variables = made
  params, state = variables
  make(stochastic_depth=0.0).apply(
    {"params": params, **state}, example, train=True, mutable=list(state)
  )  # needs no key


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_stacked_blocks_are_drawn_apart(name):
  """Of the gradients of a block that is dropped nothing is left."""
  layers = {"layers": 16} if name == "llama" else {"layers": 32}
  model = models.create(
    name, **{**TRANSFORMER, **layers}, stochastic_depth=0.25
  )
  params = models.init(model, jax.random.key(0), TOKENS).params

  def loss(params, key):
    out = model.apply(
      {"params": params}, TOKENS, train=True, rngs={"dropout": key}
    )
    return jnp.square(out).mean()

  def survivors(key):
    grads = jax.grad(loss)(params, key)["blocks"]
    grads = grads if name == "llama" else grads["local"]
    both = [grads["attention"]["out"], grads["feed_forward"]["down"]]
    alive = [jnp.abs(g).reshape(16, -1).max(1) > 0 for g in both]
    return jnp.stack(alive)

  alive = jax.jit(jax.vmap(survivors))(jax.random.split(jax.random.key(1), 16))
  attention, feed_forward = np.moveaxis(np.asarray(alive), 1, 0)
  np.testing.assert_array_equal(attention, feed_forward)  # one draw for both
  assert abs(attention.mean() - 0.75) < 4 * (0.75 * 0.25 / 256) ** 0.5
  assert (attention != attention[0]).any()  # by key
  assert (attention != attention[:, :1]).any()  # by block


def test_it_keeps_the_dtype_of_the_computation():
  model = models.create("llama", **TRANSFORMER, stochastic_depth=0.5)
  half = models.create(
    "llama", **TRANSFORMER, stochastic_depth=0.5, dtype="bfloat16"
  )
  params = models.init(model, jax.random.key(0), TOKENS).params
  x, _ = half.apply(
    {"params": params},
    TOKENS,
    train=True,
    rngs={"dropout": jax.random.key(0)},
    method="hidden",
  )
  assert x.dtype == jnp.bfloat16


# ResNet's dropout: whole channels of one image.


@pytest.mark.parametrize("bottleneck", [False, True])
def test_channels_are_dropped_whole_image_by_image(bottleneck):
  model = models.ResNet(
    stages=(1,), width=0.5, bottleneck=bottleneck, dropout=0.25
  )
  images = np.repeat(IMAGES[:1], 8, 0)
  variables = models.init(model, jax.random.key(0), images)
  _, out = model.apply(
    {"params": variables.params, **variables.model_state},
    images,
    train=True,
    rngs={"dropout": jax.random.key(3)},
    capture_intermediates=True,
    mutable=["intermediates", "batch_stats"],
  )
  block = out["intermediates"]["stage_0_block_0"]
  before = jax.nn.relu(block["norm_0"]["__call__"][0])  # (8, h, w, 32)
  (after,) = block["Dropout_0"]["__call__"]
  kept = np.asarray(after).any((1, 2))  # (8, 32)
  wanted = before * kept[:, None, None] / 0.75
  np.testing.assert_allclose(after, wanted, rtol=1e-6)
  fraction = kept.mean() / np.asarray(before).any((1, 2)).mean()
  assert abs(fraction - 0.75) < 4 * (0.75 * 0.25 / kept.size) ** 0.5
  assert (kept != kept[:1]).any()  # equal images, other channels
  dropouts = [key for key in block if key.startswith("Dropout")]
  assert dropouts == ["Dropout_0"]  # once in a branch


def test_dropped_channels_are_back_in_evaluation():
  plain = models.ResNet(stages=(1,), **RESNET)
  variables = models.init(plain, jax.random.key(0), IMAGES)
  found = run(plain.clone(dropout=0.5), variables, IMAGES)
  np.testing.assert_array_equal(found, run(plain, variables, IMAGES))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "vit", "resnet18"])
def test_a_rate_that_drops_everything_is_refused(name):
  with pytest.raises(ValueError, match=r"`stochastic_depth` must be in \[0, 1"):
    models.create(name, stochastic_depth=1.0)
