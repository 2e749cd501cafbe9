"""Reversible networks: sizes as published, numbers as in NumPy, backwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models, stages
from distrain_jax.models import parts, revnet

RNG = np.random.default_rng(0)
BATCH = {
  "image": RNG.normal(size=(6, 8, 8, 3)).astype(np.float32),
  "label": RNG.integers(0, 10, 6).astype(np.int32),
}
KEY = jax.random.key(5)
# Both kinds of block, of change, of stem; more than one reversible in a row.
NETWORKS = {
  "basic": {"stages": (2, 3)},
  "bottleneck": {"stages": (2, 2), "bottleneck": True, "stem": "imagenet"},
  "invertible": {"stages": (1, 1, 1), "invertible_downsampling": True},
}
networks = pytest.mark.parametrize("network", NETWORKS)


def small(network, **options):
  return models.RevNet(width=1 / 16, **NETWORKS[network], **options)


@functools.cache
def randomised(model):
  """Values at which no scale is 1, no bias 0 and no running average new."""

  def draw(path, x):
    if path[-1].key == "kernel":
      return np.float32(RNG.normal(0, 0.3, x.shape))
    if path[-1].key in ("scale", "var"):
      return np.float32(RNG.uniform(0.5, 1.5, x.shape))
    return np.float32(RNG.normal(0, 0.3, x.shape))

  shapes = models.abstract(model, BATCH["image"])
  return jax.tree_util.tree_map_with_path(draw, shapes)


# What the authors' networks count.
@pytest.mark.parametrize(
  "name, stem, classes, counted",
  [
    ("revnet18", "imagenet", 1000, 12_215_912),
    ("revnet18", "cifar", 10, 11_185_802),
    ("revnet34", "imagenet", 1000, 22_327_784),
    ("revnet34", "cifar", 10, 21_297_674),
    ("revnet50", "imagenet", 1000, 30_421_608),
    ("revnet50", "cifar", 10, 26_350_218),
  ],
)
def test_networks_have_the_published_number_of_parameters(
  name, stem, classes, counted
):
  model = models.create(name, stem=stem, classes=classes)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  params = models.abstract(model, images).params
  assert sum(x.size for x in jax.tree.leaves(params)) == counted


def test_invertible_downsampling_has_the_documented_number_of_parameters():
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  for name in ("revnet18", "revnet50"):
    model = models.create(name, invertible_downsampling=True)
    params = models.abstract(model, images).params
    count = sum(x.size for x in jax.tree.leaves(params))
    assert f"{count:,}" in " ".join(models.RevNet.__doc__.split())


@pytest.mark.parametrize(
  "name, length, not_reversible",
  [
    ("revnet18", 10, [0, 3, 5, 7, 9]),
    ("revnet34", 18, [0, 4, 8, 14, 17]),
    ("revnet50", 18, [0, 1, 4, 8, 14, 17]),
  ],
)
def test_the_parts_that_are_not_reversible_are_those_of_the_paper(
  name, length, not_reversible
):
  positions = lambda blocks: [
    k for k, block in enumerate(blocks) if block.inverse is None
  ]
  model = models.create(name)
  blocks = parts.blocks(model, lambda *_: None)
  assert len(blocks) == length
  assert positions(blocks) == not_reversible
  model = model.clone(invertible_downsampling=True)
  blocks = parts.blocks(model, lambda *_: None)
  assert positions(blocks) == [0, length - 1]


def test_blocks_that_compute_the_same_share_their_code():
  blocks = parts.blocks(models.create("revnet34"), lambda *_: None)
  kinds = [block.kind for block in blocks]
  runs = [slice(1, 4), slice(5, 8), slice(9, 14), slice(15, 17)]
  assert [len(set(kinds[run])) for run in runs] == [1] * 4
  assert len(set(kinds)) == 4 + 3 + 2  # four widths, three changes, two ends


# The oracle: float64, one pixel of a kernel at a time.


def conv_norm(x, p, stats, stride=1):
  kernel, norm = p["conv"]["kernel"], p["norm"]
  size = kernel.shape[0]
  pad = size // 2
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  height, width = (-(-(n - size + 1) // stride) for n in x.shape[1:3])
  y = p["conv"]["bias"]
  for i in range(size):
    for j in range(size):
      rows = slice(i, i + stride * (height - 1) + 1, stride)
      columns = slice(j, j + stride * (width - 1) + 1, stride)
      y = y + x[:, rows, columns] @ kernel[i, j]
  y = (y - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
  return y * norm["scale"] + norm["bias"]


def squares_to_pixels(x):
  squares = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
  return np.concatenate(squares, -1)


def pixels_to_squares(x):
  b, h, w, c = x.shape
  y = np.zeros((b, 2 * h, 2 * w, c // 4))
  for k, part in enumerate(np.split(x, 4, -1)):
    y[:, k // 2 :: 2, k % 2 :: 2] = part
  return y


def oracle(model, variables, images):
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables.params)
  running = variables.model_state["batch_stats"]
  relu = lambda a: np.maximum(a, 0)

  def layer(x, part, *path, stride=1):
    p, stats = params[part], running[part]
    for key in path:
      p, stats = p[key], stats[key]
    return conv_norm(x, p, stats, stride)

  def branch(x, part, *path, stride=1):
    for k in range(3 if model.bottleneck else 2):
      strided = stride if k == (1 if model.bottleneck else 0) else 1
      x = relu(layer(x, part, *path, f"layer_{k}", stride=strided))
    return x

  imagenet = model.stem == "imagenet"
  x = relu(layer(images, "stem", "layer", stride=2 if imagenet else 1))
  if imagenet:
    x = squares_to_pixels(x)
    x = x.reshape(*x.shape[:3], 4, -1).max(3)
  x, r = np.split(x, 2, -1)
  for stage, count in enumerate(model.stages):
    if stage and model.invertible_downsampling:
      x, r = squares_to_pixels(x), squares_to_pixels(r)
    for k in range(count):
      part, stride = f"stage_{stage}_block_{k}", 2 if stage and not k else 1
      if "shortcut_0" in params[part]:
        y = branch(x, part, "branch", stride=stride)
        y = y + layer(r, part, "shortcut_1", stride=stride)
        x, r = y, layer(x, part, "shortcut_0", stride=stride)
      elif "shortcut_1" in params[part]:
        h = relu(layer(x, part, "layer_0", stride=stride))
        y = relu(layer(h, part, "layer_1"))
        x, r = y + layer(r, part, "shortcut_1", stride=stride), h
      else:
        x, r = r + branch(x, part), x
  output = params["head"]["output"]
  both = np.concatenate([x, r], -1).mean((1, 2))
  return both @ output["kernel"] + output["bias"]


@networks
def test_logits_equal_a_numpy_network(network):
  model = small(network)
  variables = randomised(model)
  params, state = variables
  logits = model.apply({"params": params, **state}, BATCH["image"])
  assert (logits.shape, logits.dtype) == ((6, 10), jnp.float32)
  expected = oracle(model, variables, BATCH["image"])
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_pack_is_squares_to_pixels_again_and_again_and_unpack_goes_back():
  x = RNG.normal(size=(2, 8, 4, 3))
  packed = squares_to_pixels(squares_to_pixels(x))
  np.testing.assert_array_equal(revnet.pack(x, 2), packed)
  np.testing.assert_array_equal(revnet.unpack(packed, 1), squares_to_pixels(x))
  np.testing.assert_array_equal(revnet.unpack(packed, 2), x)


@networks
def test_inverses_miss_by_rounding_alone_and_on_a_grid_by_nothing(network):
  for grid, most in ((None, 1e-4), (2**-10, 0)):
    model = small(network, grid=grid)
    variables = randomised(model)
    task = models.task(model, "classification", BATCH)
    blocks = parts.blocks(model, task.measure)
    # Random input of the first block: later streams come from the stem.
    errors = stages.check_inverses(blocks, variables, BATCH["image"])
    assert len(errors) == sum(part.coupling for part in model.parts())
    assert max(errors.values()) <= most


@pytest.mark.parametrize("keep_activations", [True, False])
@networks
def test_blocks_compose_to_the_model(network, keep_activations):
  model = small(network)
  task = models.task(model, "classification", BATCH)
  params, state = randomised(model)
  whole = jax.value_and_grad(task.loss_fn, has_aux=True)
  blocks = parts.blocks(model, task.measure)
  fn = stages.loss_fn(blocks, inputs="image", keep_activations=keep_activations)
  composed = jax.value_and_grad(fn, has_aux=True)
  (loss, (aux, new)), grads = jax.jit(whole)(params, state, BATCH, KEY)
  (other, (other_aux, other_new)), other_grads = jax.jit(composed)(
    params, state, BATCH, KEY
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, (other, other_aux), (loss, aux))
  jax.tree.map(close, other_new, new)
  jax.tree.map(lambda a, b: np.testing.assert_(not (a == b).all()), new, state)
  jax.tree.map(close, other_grads, grads)


def test_a_step_on_a_grid_in_bfloat16_is_reconstructed_without_error():
  model = small("basic", grid=2**-10, dtype="bfloat16")
  task = models.task(model, "classification", BATCH)
  params, state = randomised(model)
  blocks = parts.blocks(model, task.measure)
  x = BATCH["image"]
  for block in blocks[:-1]:
    own = stages.of_block(block.name, params, state)
    y, _ = block.forward(*own, x, KEY)
    assert {a.dtype for a in y} == {jnp.dtype("float32")}
    if block.inverse is not None:
      back = block.inverse(*own, y, KEY)
      jax.tree.map(np.testing.assert_array_equal, back, x)
    x = y


def test_a_new_block_learns_in_both_streams():
  model = models.RevNet(stages=(2,), width=1 / 16)
  task = models.task(model, "classification", BATCH)
  variables = task.init(KEY)
  grads, _ = jax.grad(task.loss_fn, has_aux=True)(*variables, BATCH, KEY)
  for block in ("stage_0_block_0", "stage_0_block_1"):
    for layer in ("layer_0", "layer_1"):
      kernel = variables.params[block][layer]["conv"]["kernel"]
      bound = (9 * 4) ** -0.5  # PyTorch's, which the authors start from
      assert 0.8 * bound < jnp.abs(kernel).max() <= bound
      assert jnp.abs(grads[block][layer]["norm"]["scale"]).max() > 1e-4


@pytest.mark.parametrize(
  "options, message",
  [
    ({"stem": "imagnet"}, "stem='imagnet' .* Did you mean 'imagenet'"),
    ({"width": 0.001}, "`width` multiplies 64 channels; 0.001 leaves none"),
    ({"momentum": 1.5}, r"revnet: `momentum` must be in \[0, 1\)"),
    ({"classes": 0}, "revnet: `classes` must be a whole number above 0"),
    ({"grid": 0.1}, "revnet: grid=0.1 must be a power of two"),
    ({"dtype": "float64"}, "dtype='float64' is not known"),
    ({"stages": (1,)}, "revnet18 has no option 'stages'"),
    ({"zero_last_scale": True}, "revnet18 has no option 'zero_last_scale'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("revnet18", **options)


def test_images_that_cannot_be_packed_are_refused():
  model = small("invertible")
  with pytest.raises(ValueError, match=r"4x4 squares .* is 6x8\. .* of 4\."):
    models.abstract(model, jnp.zeros((1, 6, 8, 3)))
