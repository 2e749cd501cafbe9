"""Hugging Face's config.json of GPT-Neo and Llama, as options of ours."""

from collections.abc import Mapping
from typing import Any

from distrain_jax.models.options import suggest

# Ours -> theirs; what they need not say has their default beside it.
GPT_NEO = {
  "vocab": ("vocab_size",),
  "positions": ("max_position_embeddings",),
  "embed": ("hidden_size",),
  "layers": ("num_layers",),
  "heads": ("num_heads",),
  "mlp": ("intermediate_size", None),  # None: 4 times hidden_size
  "window": ("window_size", 256),
  "norm_eps": ("layer_norm_epsilon", 1e-5),
}
LLAMA = {
  "vocab": ("vocab_size",),
  "embed": ("hidden_size",),
  "layers": ("num_hidden_layers",),
  "heads": ("num_attention_heads",),
  "kv_heads": ("num_key_value_heads", None),  # None: as many as heads
  "head_dim": ("head_dim", None),  # None: hidden_size / heads
  "mlp": ("intermediate_size",),
  "tied": ("tie_word_embeddings", False),
  "rope_theta": ("rope_theta", 10_000.0),
  "norm_eps": ("rms_norm_eps", 1e-6),
}
FIELDS = {"gpt_neo": GPT_NEO, "llama": LLAMA}
# What ours has no other value of: theirs -> (the value, their default).
FIXED = {
  "gpt_neo": {
    "activation_function": ("gelu_new", "gelu_new"),
    "tie_word_embeddings": (True, True),
  },
  "llama": {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "rope_scaling": (None, None),
  },
}
CLASSES = {"gpt_neo": "GPTNeoForCausalLM", "llama": "LlamaForCausalLM"}


def to_options(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """`models.create`'s name and options for a config.json.

  Args:
    config: its contents.
    where: the file, for messages.

  Returns:
    {"name": ..., and all options that decide what the model computes}.

  Raises:
    ValueError: another architecture, a missing field, or a value that our
      model does not have.
  """
  name = config.get("model_type")
  if name not in FIELDS:
    raise ValueError(
      f"{where}: model_type={name!r} is no architecture that is read here. "
      + suggest(name, FIELDS)
    )
  config = _plain_rope(config) if name == "llama" else config
  for field, (value, default) in FIXED[name].items():
    given = config.get(field, default)
    if given != value:
      raise ValueError(
        f"{where}: {field}={given!r}, but {name} here has {value!r} only."
      )
  options = {"name": name}
  for ours, (theirs, *default) in FIELDS[name].items():
    if theirs not in config and not default:
      raise ValueError(f"{where}: no {theirs!r}, the model's `{ours}`.")
    options[ours] = config.get(theirs, *default)
  if name == "gpt_neo":
    _check_turns(config, options["layers"], where)
    options["mlp"] = options["mlp"] or 4 * options["embed"]
  else:
    options["kv_heads"] = options["kv_heads"] or options["heads"]
    share = options["embed"] // options["heads"]
    options["head_dim"] = options["head_dim"] or share
  return options


def from_model(name: str, model: Any) -> dict[str, Any]:
  """A config.json of which `to_options` makes the same model.

  Args:
    name: gpt_neo or llama.
    model: the `GPTNeoConfig` or `LlamaConfig`.

  Raises:
    ValueError: for a model with `mup`, whose factors theirs do not have.
  """
  if model.mup:
    raise ValueError(
      f"huggingface: {name} with mup=True divides logits by embed and scores "
      "by head_dim, which no config.json says. Only models with mup=False can "
      "be written."
    )
  config = {"architectures": [CLASSES[name]], "model_type": name}
  config |= {field: value for field, (value, _) in FIXED[name].items()}
  config |= {t: getattr(model, o) for o, (t, *_) in FIELDS[name].items()}
  if name == "gpt_neo":
    turns = ["global", "local"]
    config["attention_types"] = [[turns, model.layers // 2]]
  return config


def _plain_rope(config: Mapping[str, Any]) -> dict[str, Any]:
  """Both of their forms of the rotary settings as the older one."""
  config = dict(config)
  for field in ("rope_parameters", "rope_scaling"):
    rope = config.get(field) or {}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
      config.pop(field, None)
      if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    else:
      config["rope_scaling"] = rope  # refused, by this name
  return config


def _check_turns(config: Mapping[str, Any], layers: int, where: str) -> None:
  """Refuses attention that is not global and local by turns."""
  types = config.get("attention_types", [[["global", "local"], layers // 2]])
  kinds = [kind for some, times in types for kind in list(some) * times]
  if kinds != (["global", "local"] * layers)[:layers]:
    raise ValueError(
      f"{where}: attention_types={types!r}, but gpt_neo here is global and "
      "local by turns."
    )
