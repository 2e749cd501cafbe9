"""Models in muP: kinds, starts and factors; and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import learned, models
from distrain_jax.models import huggingface_config, llama
from distrain_jax.train import initial

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 6)).astype(np.int32)
DECODER = {"vocab": 13, "embed": 32, "heads": 4, "layers": 2, "mlp": 48}
# Sizes of which every product is another, so that a wrong axis shows.
LLAMA = {**DECODER, "kv_heads": 2, "head_dim": 6}
MODELS = {
  "mlp": ("mlp", {"widths": (16, 24)}, IMAGES),
  "resnet": ("resnet18", {"width": 1 / 8, "stages": (1, 1)}, IMAGES),
  "llama": ("llama", LLAMA, TOKENS),
  "llama, tied": ("llama", {**LLAMA, "tied": True, "scan": False}, TOKENS),
  "gpt_neo": ("gpt_neo", {**DECODER, "positions": 8}, TOKENS),
  "vit": ("vit", {**DECODER, "vocab": None}, IMAGES),
}


@functools.cache
def made(name, mup=True, **more):
  kind, options, example = MODELS[name]
  options = {k: v for k, v in options.items() if v is not None}
  if "stages" in options:  # which a name of a ResNet stands for
    return models.ResNet(**options, mup=mup), example
  return models.create(kind, **options, **more, mup=mup), example


@functools.cache
def new(name):
  model, example = made(name)
  return models.init(model, jax.random.key(0), example)


def paths(tree, is_leaf=None):
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {"/".join(k.key for k in path): x for path, x in flat}


# Path -> kind, fan in, stacked layers. Of ResNet some.
ATTENTION = {
  "query": ("hidden", 32, 1),
  "key": ("hidden", 32, 1),
  "value": ("hidden", 32, 1),
}
FEED_FORWARD = {"up": ("hidden", 32, 1), "down": ("hidden", 48, 1)}
KINDS = {
  "mlp": {
    "dense_0/kernel": ("input", 192, 0),
    "dense_0/bias": ("input", 1, 0),
    "dense_1/kernel": ("hidden", 16, 0),
    "output/kernel": ("output", 24, 0),
    "output/bias": ("fixed", 1, 0),
  },
  "resnet": {
    "stem/kernel": ("input", 27, 0),
    "stem_norm/scale": ("input", 1, 0),
    "stage_1_block_0/conv_0/kernel": ("hidden", 72, 0),
    "stage_1_block_0/conv_1/kernel": ("hidden", 144, 0),
    "stage_1_block_0/projection/kernel": ("hidden", 8, 0),
    "stage_1_block_0/norm_0/bias": ("input", 1, 0),
    "output/kernel": ("output", 16, 0),
  },
  "llama": {
    "embedding": ("input", 13, 0),
    **{f"blocks/attention/{k}": x for k, x in ATTENTION.items()},
    "blocks/attention/out": ("hidden", 24, 1),  # heads times their size
    **{f"blocks/feed_forward/{k}": x for k, x in FEED_FORWARD.items()},
    "blocks/feed_forward/gate": ("hidden", 32, 1),
    "blocks/attention_norm/scale": ("input", 1, 1),
    "final_norm/scale": ("input", 1, 0),
    "output": ("output", 32, 0),
  },
  "llama, tied": {
    "embedding": ("input", 13, 0),
    "block_1/attention/out": ("hidden", 24, 0),
  },
  "gpt_neo": {
    "embedding": ("input", 13, 0),
    "position": ("input", 8, 0),
    **{f"blocks/global/attention/{k}": x for k, x in ATTENTION.items()},
    "blocks/local/attention/out": ("hidden", 32, 1),
    "blocks/local/attention/out_bias": ("input", 1, 1),
    **{f"blocks/local/feed_forward/{k}": x for k, x in FEED_FORWARD.items()},
    "blocks/global/feed_forward/up_bias": ("input", 1, 1),
  },
  "vit": {
    "patch": ("input", 48, 0),
    "patch_bias": ("input", 1, 0),
    "position": ("input", 4, 0),
    **{f"blocks/attention/{k}": x for k, x in ATTENTION.items()},
    "blocks/attention/query_bias": ("input", 1, 1),
    "blocks/attention/out": ("hidden", 32, 1),
    **{f"blocks/feed_forward/{k}": x for k, x in FEED_FORWARD.items()},
    "output/kernel": ("output", 32, 0),
    "output/bias": ("fixed", 1, 0),
  },
}


@pytest.mark.core
@pytest.mark.parametrize("name", MODELS)
def test_kinds_and_fans_by_the_names_of_axes(name):
  model, example = made(name)
  shapes = models.abstract(model, example).params
  names = models.logical_names(model, example)
  info = paths(learned.mup_info(shapes, names=names))
  found = {k: (info[k].kind, info[k].fan_in, info[k].stacked) for k in info}
  assert {k: found[k] for k in KINDS[name]} == KINDS[name]
  # No others are hidden, or read by an output layer, than are meant.
  ends = ("kernel", "query", "key", "value", "out", "up", "gate", "down")
  hidden = {k for k, x in found.items() if x[0] == "hidden"}
  assert all(k.rpartition("/")[2] in ends for k in hidden)
  outputs = {k for k, x in found.items() if x[0] == "output"}
  assert outputs <= {"output", "output/kernel"}


def spread(x, std, rtol=0.1):
  np.testing.assert_allclose(np.std(x), std, rtol=rtol)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_kernels_start_at_one_over_the_root_of_their_fan_in(name):
  model, example = made(name)
  params = new(name).params
  names = models.logical_names(model, example)
  info = paths(learned.mup_info(params, names=names))
  writers = paths(models.branch_writers(model, example))
  for path, x in paths(params).items():
    if info[path].kind == "hidden" and x.size > 1000:
      deep = 2 if writers[path] and name.startswith("llama") else 1
      spread(x, 1 / deep / info[path].fan_in ** 0.5)
    if info[path].kind == "output":
      assert not x.any()


def test_embeddings_patches_and_biases_start_alike_at_all_widths():
  for name in ("llama", "gpt_neo"):
    spread(new(name).params["embedding"], 1.0)
  neo = new("gpt_neo").params
  spread(neo["position"], 1.0)
  assert not neo["blocks"]["local"]["attention"]["out_bias"].any()
  vit = new("vit").params
  spread(vit["patch"], 48**-0.5)
  assert not vit["output"]["bias"].any() and not vit["patch_bias"].any()
  # Few numbers, so together: their spread has an error of 1 / sqrt(2 x 50).
  mlp = paths(new("mlp").params)
  biases = [x for path, x in mlp.items() if path.endswith("bias")]
  spread(np.concatenate(biases), 1.0, 0.3)
  assert all(x.all() for x in biases)


def given(name, mup, **more):
  """A model, and parameters far enough from 0 that every part matters."""
  model, example = made(name, mup, **more)
  shapes = models.abstract(model, example)
  rng = np.random.default_rng(1)
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes.params)
  return model, {"params": params, **shapes.model_state}, example


def folded(name, variables):
  """Parameters that without muP compute what these do with it."""
  config = getattr(made(name)[0], "config", None)
  params = jax.tree.map(lambda x: x, variables["params"])

  def one(path, x):
    end = "/".join(k.key for k in path)
    if end.startswith("output"):  # kernel and bias
      return x / {"mlp": 24, "resnet": 16}.get(name, 32)
    if "query" in end:  # of head_dim 6 or 8; GPT-Neo divides by nothing
      size = config.head_dim if "llama" in name else 8
      return x / size if name == "gpt_neo" else x / size**0.5
    return x

  return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("name", ["mlp", "resnet", "llama", "vit"])
def test_logits_and_scores_are_divided(name):
  model, variables, example = given(name, True)
  plain, _ = made(name, False)
  zeros = lambda x: jnp.full(x.shape, 0.5, x.dtype)  # of batch statistics
  state = {k: jax.tree.map(zeros, v) for k, v in variables.items()}
  state.pop("params")
  run = lambda m, p: jax.jit(m.apply)({"params": p, **state}, example)
  ours = run(model, variables["params"])
  theirs = run(plain, folded(name, variables))
  np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
  other = run(plain, variables["params"])
  assert np.abs(ours - other).max() > 0.1 * np.abs(other).max()


@pytest.mark.parametrize("name", ["gpt_neo", "llama, tied"])
def test_a_tied_output_layer_is_divided_too(name):
  model, variables, example = given(name, True)
  plain, _ = made(name, False)
  ours = jax.jit(model.apply)(variables, example)
  theirs = jax.jit(plain.apply)({"params": folded(name, variables)}, example)
  np.testing.assert_allclose(ours, theirs / 32, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_losses_in_chunks_are_those_of_whole_logits(name):
  model, variables, _ = given(name, True)
  batch = {"tokens": TOKENS, "targets": TOKENS[:, ::-1]}

  def run(chunk):
    loss = models.language_model_loss(model, logits_chunk=chunk)
    only = lambda p: loss(p, batch, jax.random.key(0))[0]
    return jax.jit(jax.value_and_grad(only))(variables["params"])

  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, run(3), run(None))


def test_a_subnetwork_keeps_the_whole_models_divisor():
  model, variables, example = given("mlp", True)
  params = jax.tree.map(np.array, variables["params"])
  params["output"]["kernel"][5:] = 0  # units that are not read
  part = jax.tree.map(lambda x: x, params)
  part["dense_1"] = {k: x[..., :5] for k, x in part["dense_1"].items()}
  part["output"] = {
    "kernel": part["output"]["kernel"][:5],
    "bias": part["output"]["bias"],
  }
  run = lambda p: model.apply({"params": p}, example)
  np.testing.assert_allclose(run(part), run(params), rtol=1e-5, atol=1e-6)


def test_computing_in_bfloat16_is_near():
  model, variables, example = given("llama", True)
  half = models.Llama(dataclasses.replace(model.config, dtype="bfloat16"))
  exact, ours = model.apply(variables, example), half.apply(variables, example)
  assert ours.dtype == jnp.float32
  assert 0 < np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["rev_llama", "rev_vit"])
def test_reversible_ones_are_refused(kind):
  with pytest.raises(ValueError, match=f"{kind}: mup=True.*or take {kind[4:]}"):
    models.create(kind, mup=True)


def test_hugging_face_has_no_form_of_it():
  with pytest.raises(ValueError, match=r"llama with mup=True divides logits"):
    huggingface_config.from_model("llama", llama.LlamaConfig(mup=True))


def test_weights_made_without_are_not_taken_for_muPs():
  model, _ = made("mlp")
  described = initial.description("mlp", model)
  assert described["mup"] is True
  described["widths"] = list(described["widths"])  # as JSON has it
  initial._check_model(described, "mlp", model)
  del described["mup"]  # as in files that are older
  with pytest.raises(ValueError, match=r"it is of mup=False, not True"):
    initial._check_model(described, "mlp", model)
  initial._check_model({"name": "rev_mlp"}, "rev_mlp", models.create("rev_mlp"))
