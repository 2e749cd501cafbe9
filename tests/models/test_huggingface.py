"""Models as Hugging Face stores them, against NumPy and there and back."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distrain_jax import models
from distrain_jax.models import huggingface

GPT_NEO = {
  "architectures": ["GPTNeoForCausalLM"],
  "model_type": "gpt_neo",
  "activation_function": "gelu_new",
  "attention_types": [[["global", "local"], 2]],
  "hidden_size": 12,
  "intermediate_size": None,
  "layer_norm_epsilon": 1e-3,
  "max_position_embeddings": 9,
  "num_heads": 3,
  "num_layers": 4,
  "vocab_size": 11,
  "window_size": 3,
}
LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_act": "silu",
  "hidden_size": 12,
  "intermediate_size": 10,
  "num_attention_heads": 4,
  "num_hidden_layers": 3,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "rms_norm_eps": 1e-3,
  "rope_theta": 50.0,
  "vocab_size": 11,
}
TIED = LLAMA | {"tie_word_embeddings": True}
CONFIGS = {"gpt_neo": GPT_NEO, "llama": LLAMA, "tied llama": TIED}


def shapes_of(c):
  """Names and shapes of a checkpoint, as published models have them."""
  e, v = c["hidden_size"], c["vocab_size"]
  if c["model_type"] == "gpt_neo":
    shapes = {
      "transformer.wte.weight": (v, e),
      "transformer.wpe.weight": (c["max_position_embeddings"], e),
      "transformer.ln_f.weight": (e,),
      "transformer.ln_f.bias": (e,),
    }
    m = c["intermediate_size"] or 4 * e
    for k in range(c["num_layers"]):
      h = f"transformer.h.{k}."
      for norm in ("ln_1", "ln_2"):
        shapes |= {f"{h}{norm}.weight": (e,), f"{h}{norm}.bias": (e,)}
      for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{h}attn.attention.{name}.weight"] = (e, e)
      shapes[f"{h}attn.attention.out_proj.bias"] = (e,)
      shapes |= {f"{h}mlp.c_fc.weight": (m, e), f"{h}mlp.c_fc.bias": (m,)}
      shapes |= {f"{h}mlp.c_proj.weight": (e, m), f"{h}mlp.c_proj.bias": (e,)}
    return shapes
  d, m = c["head_dim"], c["intermediate_size"]
  q, k = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
  shapes = {"model.embed_tokens.weight": (v, e), "model.norm.weight": (e,)}
  if not c.get("tie_word_embeddings"):
    shapes["lm_head.weight"] = (v, e)
  for layer in range(c["num_hidden_layers"]):
    p = f"model.layers.{layer}."
    shapes |= {
      f"{p}input_layernorm.weight": (e,),
      f"{p}post_attention_layernorm.weight": (e,),
      f"{p}self_attn.q_proj.weight": (q, e),
      f"{p}self_attn.k_proj.weight": (k, e),
      f"{p}self_attn.v_proj.weight": (k, e),
      f"{p}self_attn.o_proj.weight": (e, q),
      f"{p}mlp.gate_proj.weight": (m, e),
      f"{p}mlp.up_proj.weight": (m, e),
      f"{p}mlp.down_proj.weight": (e, m),
    }
  return shapes


def checkpoint(c, dtype=np.float32):
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(0.1, 0.3, shape).astype(dtype)
  return {name: draw(shape) for name, shape in shapes_of(c).items()}


def store(folder, c, tensors, files=1):
  """A folder as it is downloaded; several files have an index."""
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(c))
  if files == 1:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
  places = {}
  for k in range(files):
    file = f"model-{k + 1:05}-of-{files:05}.safetensors"
    part = dict(list(tensors.items())[k::files])
    save_file(part, folder / file, {"format": "pt"})
    places |= dict.fromkeys(part, file)
  index = {"metadata": {}, "weight_map": places}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return folder


# The oracles: float64, one row of tokens, one head and one query at a time.


def attend(query, keys, values):
  """(d,), (t, d), (t, d) -> (d,); the query is the last of the tokens."""
  scores = keys @ query
  shares = np.exp(scores - scores.max())
  return shares @ values / shares.sum()


def numpy_gpt_neo(w, c, tokens):
  def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

  def linear(x, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

  def gelu(x):
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

  t, d = len(tokens), c["hidden_size"] // c["num_heads"]
  x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:t]
  for k in range(c["num_layers"]):
    h = f"transformer.h.{k}."
    y, mixed = norm(x, f"{h}ln_1"), np.zeros_like(x)
    q, k_, v = (linear(y, f"{h}attn.attention.{n}_proj") for n in "qkv")
    for now in range(t):
      first = max(0, now - c["window_size"] + 1) if k % 2 else 0
      for head in range(c["num_heads"]):
        own = slice(head * d, (head + 1) * d)
        seen = slice(first, now + 1)
        mixed[now, own] = attend(q[now, own], k_[seen, own], v[seen, own])
    x = x + linear(mixed, f"{h}attn.attention.out_proj")
    y = gelu(linear(norm(x, f"{h}ln_2"), f"{h}mlp.c_fc"))
    x = x + linear(y, f"{h}mlp.c_proj")
  return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def numpy_llama(w, c, tokens):
  d, heads = c["head_dim"], c["num_attention_heads"]
  shared = heads // c["num_key_value_heads"]
  t = len(tokens)
  turns = np.outer(np.arange(t), c["rope_theta"] ** (-np.arange(0, d, 2) / d))
  cos = np.cos(np.concatenate([turns, turns], -1))  # (t, d)
  sin = np.sin(np.concatenate([turns, turns], -1))

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * w[name]

  def rotated(x):  # (t, d)
    half = np.concatenate([-x[:, d // 2 :], x[:, : d // 2]], -1)
    return x * cos + half * sin

  x = w["model.embed_tokens.weight"][tokens]
  for layer in range(c["num_hidden_layers"]):
    p = f"model.layers.{layer}."
    y = norm(x, f"{p}input_layernorm.weight")
    q, k, v = (y @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
    mixed = np.zeros((t, heads * d))
    for head in range(heads):
      own = slice(head * d, (head + 1) * d)
      theirs = slice(head // shared * d, (head // shared + 1) * d)
      query, keys = rotated(q[:, own]) / d**0.5, rotated(k[:, theirs])
      for now in range(t):
        seen = slice(0, now + 1)
        mixed[now, own] = attend(query[now], keys[seen], v[seen, theirs])
    x = x + mixed @ w[f"{p}self_attn.o_proj.weight"].T
    y = norm(x, f"{p}post_attention_layernorm.weight")
    gate = y @ w[f"{p}mlp.gate_proj.weight"].T
    up = y @ w[f"{p}mlp.up_proj.weight"].T
    x = x + gate / (1 + np.exp(-gate)) * up @ w[f"{p}mlp.down_proj.weight"].T
  head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
  return norm(x, "model.norm.weight") @ head.T


ORACLES = {"gpt_neo": numpy_gpt_neo, "llama": numpy_llama}


def arrays(params):
  return jax.tree.map(lambda x: x.array(), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_a_numpy_decoder_on_their_tensors(name, tmp_path):
  c = CONFIGS[name]
  tensors = checkpoint(c)
  options, params = huggingface.read(store(tmp_path, c, tensors))
  model = models.create(**options)
  tokens = np.random.default_rng(1).integers(0, 11, (2, 9)).astype(np.int32)
  logits = jax.jit(model.apply)({"params": arrays(params)}, tokens)
  exact = {k: x.astype(np.float64) for k, x in tensors.items()}
  wanted = [ORACLES[c["model_type"]](exact, c, row) for row in tokens]
  np.testing.assert_allclose(logits, wanted, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_bits(name, dtype, files, tmp_path):
  c = CONFIGS[name]
  tensors = checkpoint(c, dtype)
  model = huggingface.read(store(tmp_path / "in", c, tensors, files))
  assert {x.dtype for x in jax.tree.leaves(model.params)} == {np.dtype(dtype)}
  huggingface.write(tmp_path / "out", model)
  back = load_file(tmp_path / "out" / "model.safetensors")
  assert back.keys() == tensors.keys()
  for key, x in tensors.items():
    assert back[key].dtype == x.dtype
    np.testing.assert_array_equal(back[key], x)
  assert huggingface.read(tmp_path / "out").options == model.options
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  same = c | {"intermediate_size": c["intermediate_size"] or 48}
  assert written | same == written


def test_trained_parameters_are_written_from_arrays(tmp_path):
  options = {"name": "llama", "vocab": 7, "layers": 2}
  model = models.create(**options)
  params = models.init(model, jax.random.key(0), np.zeros((1, 2), np.int32))
  given = huggingface.Model(options, params.params)
  huggingface.write(tmp_path, given)
  read = huggingface.read(tmp_path)
  assert read.options["layers"] == 2
  jax.tree.map(np.testing.assert_array_equal, arrays(read.params), given.params)


def test_the_published_sizes_are_the_presets():
  published = GPT_NEO | {
    "attention_types": [[["global", "local"], 16]],
    "hidden_size": 2560,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 2048,
    "num_heads": 20,
    "num_layers": 32,
    "vocab_size": 50_257,
    "window_size": 256,
  }
  options = huggingface.huggingface_config.to_options(published, "here")
  preset = models.create("gpt_neo", preset="2.7B").config
  assert {k: getattr(preset, k) for k in options.keys() - {"name"}} == {
    k: v for k, v in options.items() if k != "name"
  }


def test_constants_and_a_tied_head_beside_the_parameters_are_left_out(tmp_path):
  tensors = checkpoint(GPT_NEO)
  more = {
    "transformer.h.0.attn.attention.bias": np.ones((1, 1, 9, 9), np.bool_),
    "transformer.h.0.attn.attention.masked_bias": np.float32([-1e9])[0:1],
    "lm_head.weight": tensors["transformer.wte.weight"],
  }
  plain = huggingface.read(store(tmp_path / "a", GPT_NEO, tensors)).params
  full = huggingface.read(store(tmp_path / "b", GPT_NEO, tensors | more)).params
  jax.tree.map(np.testing.assert_array_equal, arrays(full), arrays(plain))
  other = tensors["transformer.wte.weight"] + 1
  store(tmp_path / "c", GPT_NEO, tensors | {"lm_head.weight": other})
  with pytest.raises(ValueError, match=r"'lm_head.weight' is not the embedd"):
    huggingface.read(tmp_path / "c")


def test_both_forms_of_the_rotary_settings_are_read(tmp_path):
  newer = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
  newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
  to_options = huggingface.huggingface_config.to_options
  assert to_options(newer, "") == to_options(LLAMA, "")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda w: w.pop(NAME), rf"no '{NAME}', which the model has, \(10, 12\)"),
    (lambda w: w.update(more=w[NAME]), r"'more', \(10, 12\), is not a param"),
    (
      lambda w: w.update({NAME: w[NAME].T.copy()}),
      rf"'{NAME}' is \(12, 10\), but \(10, 12\) in the model",
    ),
    (
      lambda w: w.update({NAME: w[NAME].astype(np.float16)}),
      r"blocks/feed_forward/up: .* float16, float32\. Store them in one",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
  tensors = checkpoint(LLAMA)
  change(tensors)
  store(tmp_path, LLAMA, tensors)
  with pytest.raises(ValueError, match=message):
    huggingface.read(tmp_path)


SCALED = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
  "config, message",
  [
    (LLAMA | {"model_type": "mistral"}, "'mistral' is no architecture .*llama"),
    (LLAMA | {"model_type": "lama"}, "Did you mean 'llama'"),
    (LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu', but .* 'silu' only"),
    (LLAMA | {"attention_bias": True}, "attention_bias=True, but"),
    (LLAMA | {"rope_scaling": SCALED}, "rope_scaling=.*llama3.*None only"),
    (LLAMA | {"rope_parameters": SCALED}, "rope_scaling=.*llama3.*None only"),
    (
      {k: v for k, v in LLAMA.items() if k != "hidden_size"},
      "no 'hidden_size', the model's `embed`",
    ),
    (
      GPT_NEO | {"attention_types": [[["global"], 4]]},
      "global and local by turns",
    ),
    (GPT_NEO | {"activation_function": "relu"}, "activation_function='relu'"),
    (GPT_NEO | {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
  ],
)
def test_other_architectures_are_refused_by_what_differs(
  config, message, tmp_path
):
  store(tmp_path, config, {"x": np.zeros(1, np.float32)})
  with pytest.raises(ValueError, match=message):
    huggingface.read(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none"):
    huggingface.read(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors in it"):
    huggingface.read(tmp_path)
  store(tmp_path, LLAMA, checkpoint(LLAMA), files=2)
  (tmp_path / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
    huggingface.read(tmp_path)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="00002-of-00002"):
    huggingface.read(tmp_path)


def test_only_headers_are_read_before_a_model_is_refused(tmp_path, monkeypatch):
  tensors = checkpoint(LLAMA)
  store(tmp_path, LLAMA, tensors | {"more": tensors[NAME]})

  def never(*args, **kwargs):
    raise AssertionError("values were read")

  monkeypatch.setattr(np, "memmap", never)
  with pytest.raises(ValueError, match="'more'"):
    huggingface.read(tmp_path)


def test_what_is_written_must_be_the_model(tmp_path):
  options = {"name": "llama", "vocab": 7, "layers": 2}
  model = models.create(**options)
  tokens = jax.ShapeDtypeStruct((1, 2), np.int32)
  params = models.abstract(model, tokens).params
  given = huggingface.Model(options | {"vocab": 8}, params)
  with pytest.raises(ValueError, match=r"'embedding' is \(7, 128\), but \(8,"):
    huggingface.write(tmp_path / "out", given)
  given = huggingface.Model({"name": "mlp"}, params)
  with pytest.raises(ValueError, match=r"'mlp' is not known.*gpt_neo, llama"):
    huggingface.write(tmp_path / "out", given)
  assert not (tmp_path / "out").exists()
