"""Residual blocks: left out where not given, and scaled by their writers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models import names as vocabulary

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 5)).astype(np.int32)
RESNET = functools.partial(models.ResNet, width=1 / 16, zero_last_scale=False)
LLAMA = functools.partial(
  models.create, "llama", embed=16, heads=4, kv_heads=2, mlp=12, scan=False
)
NEO = functools.partial(
  models.create, "gpt_neo", embed=16, heads=4, mlp=12, window=3, scan=False
)
VIT = functools.partial(
  models.create, "vit", embed=16, heads=4, mlp=12, scan=False
)
# A model, its input, its blocks that can be left out, and the model that is
# left without the last of them, with the key of each block that it keeps.
MODELS = {
  "resnet": (
    RESNET(stages=(2, 2)),
    IMAGES,
    ("stage_0_block_0", "stage_0_block_1", "stage_1_block_1"),
    RESNET(stages=(2, 1)),
  ),
  "group norm": (
    RESNET(stages=(2, 2), norm="group"),
    IMAGES,
    ("stage_0_block_0", "stage_0_block_1", "stage_1_block_1"),
    RESNET(stages=(2, 1), norm="group"),
  ),
  "bottleneck": (
    RESNET(stages=(3,), bottleneck=True, stem="imagenet"),
    IMAGES,
    ("stage_0_block_1", "stage_0_block_2"),
    RESNET(stages=(2,), bottleneck=True, stem="imagenet"),
  ),
  "llama": (
    LLAMA(layers=3),
    TOKENS,
    ("block_0", "block_1", "block_2"),
    LLAMA(layers=2),
  ),
  "llama, recomputed": (
    LLAMA(layers=2, remat="full"),
    TOKENS,
    ("block_0", "block_1"),
    LLAMA(layers=1),
  ),
  "gpt_neo": (
    NEO(layers=3),
    TOKENS,
    ("block_0", "block_1", "block_2"),
    NEO(layers=2),
  ),
  "vit": (
    VIT(layers=3),
    IMAGES,
    ("block_0", "block_1", "block_2"),
    VIT(layers=2),
  ),
}


def drawn(model, example):
  """Variables of which none is 0, 1 or any block's identity."""
  rng = np.random.default_rng(1)

  def draw(path, x):
    if path[-1].key in ("scale", "var"):
      return np.float32(rng.uniform(0.5, 1.5, x.shape))
    return np.float32(rng.normal(0, 0.3, x.shape))

  shapes = models.abstract(model, example)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(params=MODELS, scope="module")
def made(request):
  model, example, blocks, shorter = MODELS[request.param]
  return model, example, blocks, shorter, drawn(model, example)


def without(tree, *blocks):
  return {key: value for key, value in tree.items() if key not in blocks}


def applied(model, variables, example, *left_out, **options):
  params, state = variables
  state = {name: without(tree, *left_out) for name, tree in state.items()}
  tree = {"params": without(params, *left_out), **state}
  return model.apply(tree, example, **options)


def test_the_blocks_that_can_be_left_out(made):
  model, example, blocks, *_ = made
  assert models.blocks(model, example) == blocks


@pytest.mark.parametrize(
  "name, example",
  [("llama", TOKENS), ("gpt_neo", TOKENS), ("vit", IMAGES), ("mlp", IMAGES)],
)
def test_stacked_blocks_and_hidden_layers_are_no_keys(name, example):
  assert models.blocks(models.create(name), example) == ()


def test_without_a_block_a_model_is_the_shorter_one(made):
  model, example, blocks, shorter, variables = made
  found = applied(model, variables, example, blocks[-1])
  wanted = applied(shorter, variables, example, blocks[-1])
  np.testing.assert_array_equal(found, wanted)
  whole = applied(model, variables, example)
  assert np.abs(whole - found).max() > 1e-2


def test_any_block_can_be_left_out_as_if_it_added_nothing(made):
  model, example, blocks, _, (params, state) = made
  writers = models.branch_writers(model, example)
  for block in blocks:
    silent = dict(params)
    silent[block] = jax.tree.map(
      lambda x, writes: x * (not writes), params[block], writers[block]
    )
    wanted = applied(model, (silent, state), example)
    found = applied(model, (params, state), example, block)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_without_any_of_its_blocks_it_trains_what_it_has(made):
  model, example, blocks, _, (params, state) = made
  state = {name: without(tree, *blocks) for name, tree in state.items()}

  def loss(params):
    out, changes = model.apply(
      {"params": params, **state}, example, train=True, mutable=list(state)
    )
    return jnp.square(out).mean(), changes

  grads, changes = jax.grad(loss, has_aux=True)(without(params, *blocks))
  assert grads.keys() == params.keys() - set(blocks)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
  assert jax.tree.structure(dict(changes)) == jax.tree.structure(state)


@pytest.mark.parametrize("block", ["stage_0_block_0", "stage_1_block_0"])
def test_a_block_that_changes_the_shape_must_be_there(block):
  model = RESNET(stages=(2, 2), bottleneck=True)
  variables = drawn(model, IMAGES)
  with pytest.raises(ValueError, match=f"no '{block}', which changes the sh"):
    applied(model, variables, IMAGES, block)


def test_the_blocks_of_a_foreign_model_are_checked():
  class Wrong(models.MLP):
    def optional_blocks(self):
      return ("dense_7",)

  with pytest.raises(
    ValueError, match=r"'dense_7' is no top-level key.*dense_"
  ):
    models.blocks(Wrong(), IMAGES)


# Writers: the oracle is the branch's captured output.


def branches(model, tree):
  """(block, what adds to the stream there) of a tree like the parameters."""
  parts = ("attention", "feed_forward")
  if isinstance(model, models.ResNet):
    parts = ("norm_2",) if model.bottleneck else ("norm_1",)
  blocks = [key for key in tree if "block_" in key]
  return [(block, part) for block in blocks for part in parts]


def test_scaling_its_writers_scales_what_a_branch_adds(made):
  model, example, *_, (params, state) = made
  writers = models.branch_writers(model, example)
  assert jax.tree.structure(writers) == jax.tree.structure(params)

  def captured(params, block, part):
    tree = {"params": params, **state}
    _, out = model.apply(
      tree, example, capture_intermediates=True, mutable="intermediates"
    )
    return out["intermediates"][block][part]["__call__"][0]

  seen = 0
  for block, part in branches(model, params):
    scaled = jax.tree.map(lambda x: x, params)  # new dicts
    scaled[block][part] = jax.tree.map(
      lambda x, writes: -2 * x if writes else x,
      params[block][part],
      writers[block][part],
    )
    before, after = (captured(p, block, part) for p in (params, scaled))
    np.testing.assert_array_equal(after, -2 * before)
    assert np.abs(before).max() > 0
    seen += sum(jax.tree.leaves(writers[block][part]))
  assert seen == sum(jax.tree.leaves(writers)) > 0  # and nothing else is one


@pytest.mark.parametrize(
  "name, example",
  [("llama", TOKENS), ("gpt_neo", TOKENS), ("vit", IMAGES)],
)
def test_stacked_blocks_have_the_writers_of_others(name, example):
  find = lambda scan: models.branch_writers(
    models.create(name, scan=scan, layers=2), example
  )
  stacked, apart = find(True)["blocks"], find(False)
  if name == "gpt_neo":
    stacked = stacked["local"]
  assert stacked == apart["block_1"] == apart["block_0"]


def test_a_model_without_branches_has_no_writers():
  writers = models.branch_writers(models.create("mlp"), IMAGES)
  assert jax.tree.leaves(writers) == [False] * 6


# Names: one for the same units, wherever they are.


def test_no_two_blocks_share_the_name_of_units(made):
  model, example, *_ = made
  names = models.logical_names(model, example)
  found = {}
  for path, axes in jax.tree_util.tree_leaves_with_path(
    names, is_leaf=lambda x: isinstance(x, tuple)
  ):
    for name in axes:
      if vocabulary.kind(name) in vocabulary.NEURONS:
        found.setdefault(name, set()).add(path[0].key)
  assert found and all(len(blocks) == 1 for blocks in found.values())
  for kind in {vocabulary.kind(name) for name in found}:
    numbers = [n for n in found if vocabulary.kind(n) == kind]
    assert set(numbers) == {f"{kind}_{k}" for k in range(len(numbers))}


def test_a_resnet_numbers_its_inner_channels_in_the_order_of_the_blocks():
  model = RESNET(stages=(1, 2), bottleneck=True)
  names = models.logical_names(model, IMAGES)
  last = names["stage_1_block_1"]
  assert last["norm_0"]["scale"] == ("inner_4",)
  assert last["conv_1"]["kernel"][2:] == ("inner_4", "inner_5")
  assert last["conv_2"]["kernel"][2:] == ("inner_5", "conv_out")
