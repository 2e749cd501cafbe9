"""Residual networks: sizes as published, numbers as in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models


def randomised(shapes):
  """Values at which no scale is 0 or 1 and no running average is new."""
  rng = np.random.default_rng(3)

  def draw(path, x):
    if path[-1].key == "kernel":
      return np.float32(rng.normal(0, 0.3, x.shape))
    return np.float32(rng.uniform(0.5, 1.5, x.shape))  # variances among them

  return jax.tree_util.tree_map_with_path(draw, shapes)


# What torchvision's models of these names count.
@pytest.mark.parametrize(
  "name, published",
  [
    ("resnet18", 11_689_512),
    ("resnet34", 21_797_672),
    ("resnet50", 25_557_032),
  ],
)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_imagenet_networks_have_the_published_number_of_parameters(
  name, published, norm
):
  model = models.create(name, stem="imagenet", classes=1000, norm=norm)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = models.abstract(model, images)
  sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert sizes(variables.params) == published
  if norm == "group":
    assert variables.model_state == {}


def shape_of_features(model, height):
  """What reaches the pool: the input of the last block's output."""
  images = jnp.zeros((1, height, height, 3))
  run = lambda: model.init_with_output(
    jax.random.key(0), images, capture_intermediates=True, mutable=True
  )
  _, variables = jax.eval_shape(run)
  last = f"stage_{len(model.stages) - 1}_block_{model.stages[-1] - 1}"
  return variables["intermediates"][last]["__call__"][0].shape


def test_imagenet_stem_reduces_32_times_and_cifar_stem_8_times():
  cifar = models.create("resnet18")
  assert shape_of_features(cifar, 32) == (1, 4, 4, 512)
  imagenet = models.create("resnet50", stem="imagenet")
  assert shape_of_features(imagenet, 224) == (1, 7, 7, 2048)


def test_width_multiplies_all_channels():
  narrow = models.create("resnet18", width=0.25)
  assert shape_of_features(narrow, 32) == (1, 4, 4, 128)


# The oracle: float64, one kernel offset at a time.


def oracle_conv(x, kernel, stride):
  size = kernel.shape[0]
  pad = size // 2
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  height, width = (-(-(n - size + 1) // stride) for n in x.shape[1:3])
  y = 0
  for i in range(size):
    for j in range(size):
      rows = slice(i, i + stride * (height - 1) + 1, stride)
      columns = slice(j, j + stride * (width - 1) + 1, stride)
      y = y + x[:, rows, columns] @ kernel[i, j]
  return y


def oracle_norm(x, p, stats, group_size):
  if stats is None:
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, c // group_size, group_size)
    mean = y.mean((1, 3), keepdims=True)
    y = (y - mean) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    x = y.reshape(x.shape)
  else:
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
  return x * p["scale"] + p["bias"]


def oracle(model, variables, x):
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables.params)
  stats = variables.model_state.get("batch_stats", {})
  relu = lambda a: np.maximum(a, 0)

  def conv_norm(x, scope, conv, norm, stride):
    here, there = (p, stats) if scope is None else (p[scope], stats.get(scope))
    size = np.gcd(model.group_size, here[conv]["kernel"].shape[-1])
    y = oracle_conv(x, here[conv]["kernel"], stride)
    return oracle_norm(y, here[norm], (there or {}).get(norm), size)

  imagenet = model.stem == "imagenet"
  x = relu(conv_norm(x, None, "stem", "stem_norm", 2 if imagenet else 1))
  if imagenet:
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # of what is never below 0
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    x = windows[:, ::2, ::2].max((-2, -1))
  convs = 3 if model.bottleneck else 2
  for stage, blocks in enumerate(model.stages):
    for k in range(blocks):
      scope, y = f"stage_{stage}_block_{k}", x
      down = 2 if stage and not k else 1
      for n in range(convs):
        stride = down if n == convs - 2 else 1
        y = conv_norm(y, scope, f"conv_{n}", f"norm_{n}", stride)
        y = relu(y) if n < convs - 1 else y
      if "projection" in p[scope]:
        x = conv_norm(x, scope, "projection", "projection_norm", down)
      x = relu(x + y)
  return x.mean((1, 2)) @ p["output"]["kernel"] + p["output"]["bias"]


@pytest.mark.parametrize(
  "options",
  [
    {"stages": (1, 2)},
    {"stages": (2, 1), "bottleneck": True, "stem": "imagenet"},
    {"stages": (1, 1), "norm": "group", "group_size": 2},
  ],
)
def test_logits_equal_a_numpy_network(options):
  model = models.ResNet(width=1 / 16, classes=3, **options)
  x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
  variables = randomised(models.abstract(model, x))
  logits = jax.jit(model.apply)(
    {"params": variables.params, **variables.model_state}, x
  )
  expected = oracle(model, variables, x)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_zero_last_scale_makes_every_new_block_pass_its_shortcut_on():
  model = models.ResNet(stages=(2,), width=1 / 16)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  start = lambda model: models.init(model, jax.random.key(1), x)
  variables = start(model)
  last = {"stage_0_block_0", "stage_0_block_1"}
  for block in last:
    assert (variables.params[block]["norm_1"]["scale"] == 0).all()
    assert (variables.params[block]["norm_0"]["scale"] == 1).all()
  other = start(model.clone(zero_last_scale=False))
  assert (other.params["stage_0_block_0"]["norm_1"]["scale"] == 1).all()


def test_bfloat16_computes_in_it_and_keeps_the_rest_in_float32():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  model = models.ResNet(stages=(1,), width=1 / 16, dtype="bfloat16")
  variables = models.init(model, jax.random.key(1), x)
  variables = {"params": variables.params, **variables.model_state}
  logits, changes = model.apply(
    variables, x, train=True, mutable=["batch_stats"]
  )
  floats = jax.tree.leaves((logits, changes, variables))
  assert {a.dtype for a in floats} == {jnp.dtype("float32")}
  exact = models.ResNet(stages=(1,), width=1 / 16)
  wanted, _ = exact.apply(variables, x, train=True, mutable=["batch_stats"])
  assert 0 < jnp.abs(logits - wanted).max() < 0.05


@pytest.mark.parametrize(
  "options, message",
  [
    ({"norm": "layer"}, "norm='layer' is not known. .*Valid: batch, group"),
    ({"stem": "imagnet"}, "stem='imagnet' .* Did you mean 'imagenet'"),
    ({"width": 0.001}, "`width` multiplies 64 channels; 0.001 leaves none"),
    ({"norm": "group", "axis_name": "data"}, "but norm='group'"),
    ({"momentum": 1.5}, r"`momentum` must be in \[0, 1\)"),
    ({"classes": 0}, "`classes` must be a whole number above 0"),
    ({"stages": (1,)}, "resnet18 has no option 'stages'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("resnet18", **options)
