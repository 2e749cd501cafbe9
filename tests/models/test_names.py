"""Logical axis names: on every parameter, enough to cut a subnetwork out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models import names as vocabulary

IMAGES, TOKENS = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 5), jnp.int32)
NARROW = {"width": 1 / 8, "group_size": 2, "zero_last_scale": False}
SMALL = {"embed": 16, "layers": 4, "heads": 8, "kv_heads": 4, "mlp": 12}
NEO = {"embed": 16, "heads": 8, "mlp": 12, "window": 3}
VIT = {"embed": 16, "heads": 8, "mlp": 12}
MODELS = {
  "mlp": (models.create("mlp", widths=(12, 8)), IMAGES),
  "resnet": (models.ResNet(stages=(1, 1), **NARROW), IMAGES),
  "bottleneck": (
    models.ResNet(stages=(1,), bottleneck=True, stem="imagenet", **NARROW),
    IMAGES,
  ),
  "group norm": (models.ResNet(stages=(1,), norm="group", **NARROW), IMAGES),
  "revnet": (models.RevNet(stages=(2, 1), width=1 / 8), IMAGES),
  "revnet, bottleneck": (
    models.RevNet(stages=(2, 1), bottleneck=True, width=1 / 8),
    IMAGES,
  ),
  "rev_mlp": (models.create("rev_mlp", width=8, hidden=48, blocks=2), IMAGES),
  "llama": (models.create("llama", **SMALL), TOKENS),
  "llama, tied, not scanned": (
    models.create("llama", **SMALL, tied=True, scan=False),
    TOKENS,
  ),
  "gpt_neo": (models.create("gpt_neo", **NEO, layers=8), TOKENS),
  "gpt_neo, not scanned": (
    models.create("gpt_neo", **NEO, layers=3, scan=False),
    TOKENS,
  ),
  "vit": (models.create("vit", **VIT, layers=4), IMAGES),
  "vit, not scanned": (
    models.create("vit", **VIT, layers=3, scan=False, positions="sincos"),
    IMAGES,
  ),
}
is_names = lambda x: isinstance(x, tuple)


@pytest.fixture(params=MODELS, scope="module")
def made(request):
  model, example = MODELS[request.param]
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key in ("scale", "var"):
      return np.float32(rng.uniform(0.5, 1.5, x.shape))
    return np.float32(rng.normal(0, 0.2, x.shape))

  shapes = models.abstract(model, example)
  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  return model, example, variables, models.logical_names(model, example)


def names_of_state(model, example):
  names = models.logical_names(model, example, collection="batch_stats")
  return {"batch_stats": names} if names else {}


def test_every_axis_has_a_name_of_the_vocabulary(made):
  model, example, variables, names = made
  state = variables.model_state, names_of_state(model, example)
  for arrays, tree in ((variables.params, names), state):
    skeleton = jax.tree.map(lambda _: 0, tree, is_leaf=is_names)
    assert jax.tree.structure(skeleton) == jax.tree.structure(arrays)
    for array, axes in zip(
      jax.tree.leaves(arrays), jax.tree.leaves(tree, is_leaf=is_names)
    ):
      assert len(axes) == array.ndim
      assert {
        vocabulary.kind(name) for name in axes
      } <= vocabulary.MEANING.keys()


def test_names_serve_as_sharding_rules(made):
  *_, names = made
  rules = [("embed", "fsdp"), ("conv_out", "fsdp"), ("mlp", "tensor")]
  for axes in jax.tree.leaves(names, is_leaf=is_names):
    # Flax refuses two axes of one name.
    spec = nn.logical_to_mesh_axes(axes, rules)
    assert (spec.count("fsdp") > 0) == bool({"embed", "conv_out"} & set(axes))


def test_parameters_are_plain_arrays_of_the_described_shapes():
  model, example = MODELS["mlp"]
  variables = models.init(model, jax.random.key(0), example)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(variables))
  described = models.abstract(model, example)
  same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
  assert all(jax.tree.leaves(jax.tree.map(same, variables, described)))


def test_names_of_a_large_model_need_no_memory():
  model = models.create("llama", preset="1B")
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  names = models.logical_names(model, tokens)
  assert names["embedding"] == ("vocab", "embed")


def test_the_vocabulary_is_closed():
  known = vocabulary.MEANING.keys()
  assert known >= vocabulary.NEURONS | vocabulary.BLOCKS | vocabulary.WIDTH


# Subnetworks: some units of every axis that can be sub-sampled.


def kept_of(name, length):
  """Indices to keep: whole pairs, because group norm's groups are pairs.

  Others for each number, so that blocks that shared a name would not fit.
  """
  kind = vocabulary.kind(name)
  if kind in vocabulary.BLOCKS:
    return np.array([0, 2])
  if kind in vocabulary.NEURONS:
    pairs, number = np.arange(length).reshape(-1, 2), name[len(kind) + 1 :]
    first, second = (int(number or 0) + k for k in range(2))
    return np.r_[pairs[first % 3 :: 3], pairs[second % 3 :: 3]].ravel()
  return np.arange(length)


def gather(array, names):
  for axis, name in enumerate(names):
    array = np.take(array, kept_of(name, array.shape[axis]), axis)
  return array


def zeroed(array, names):
  for axis, name in enumerate(names):
    mask = np.isin(
      np.arange(array.shape[axis]), kept_of(name, array.shape[axis])
    )
    shape = [1] * array.ndim
    shape[axis] = -1
    array = array * mask.reshape(shape).astype(np.float32)
  return array


def test_a_gathered_subnetwork_is_the_dense_one_with_units_zeroed(made):
  model, example, variables, names = made
  rng = np.random.default_rng(1)
  if example.dtype == jnp.int32:
    inputs = rng.integers(0, 256, example.shape)
  else:
    inputs = rng.normal(size=example.shape).astype(np.float32)
  state_names = names_of_state(model, example)

  def measure(params, state):
    logits = model.apply({"params": params, **state}, inputs)
    return jnp.tanh(logits).mean(), logits

  compiled = jax.jit(jax.value_and_grad(measure, has_aux=True))
  tree_map = jax.tree.map
  small = tree_map(gather, variables.params, names)
  small_state = tree_map(gather, variables.model_state, state_names)
  masked = tree_map(zeroed, variables.params, names)
  run = lambda *args: jax.device_get(compiled(*args))
  (_, dense), dense_grads = run(masked, variables.model_state)
  (_, compact), grads = run(small, small_state)
  close = lambda a, b: np.testing.assert_allclose(
    a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-7
  )
  close(compact, dense)
  tree_map(close, grads, tree_map(gather, dense_grads, names))
  sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (small, masked)]
  assert sizes[0] < 0.95 * sizes[1]  # something was left out
  (_, whole), _ = run(*variables)
  assert np.abs(whole - dense).max() > 1e-3  # and it mattered


def test_a_subnetwork_of_resnet_trains_its_own_statistics():
  model, example = MODELS["resnet"]
  variables = jax.tree.map(
    lambda x: np.ones(x.shape, np.float32), models.abstract(model, example)
  )
  names = models.logical_names(model, example)
  params = jax.tree.map(gather, variables.params, names)
  state = jax.tree.map(
    gather, variables.model_state, names_of_state(model, example)
  )
  train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
  _, new = jax.eval_shape(train, {"params": params, **state}, example)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(new) == shapes(state)


def test_a_model_without_names_is_refused_with_the_parameter():
  with pytest.raises(ValueError, match=r"Dense: \['bias'\] has no logical"):
    models.logical_names(nn.Dense(3), jnp.zeros((1, 2)))


def test_init_works_under_a_mesh_and_its_rules():
  model, example = MODELS["mlp"]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
  with jax.set_mesh(mesh), nn.logical_axis_rules([("hidden_0", "fsdp")]):
    variables = models.init(model, jax.random.key(0), example)
  plain = models.init(model, jax.random.key(0), example)
  jax.tree.map(np.testing.assert_array_equal, variables, plain)
