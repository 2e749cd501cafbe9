"""Models by name, for configs; and their parameters, unboxed, with names."""

import dataclasses
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.method import Variables
from distrain_jax.models import gpt_neo, llama, rev_llama, rev_vit, vit
from distrain_jax.models.mlp import MLP
from distrain_jax.models.options import pick, suggest
from distrain_jax.models.resnet import ResNet
from distrain_jax.models.rev_mlp import RevMLP
from distrain_jax.models.revnet import RevNet

# name -> the fields that the name stands for
RESNETS = {
  "resnet18": {"stages": (2, 2, 2, 2), "bottleneck": False},
  "resnet34": {"stages": (3, 4, 6, 3), "bottleneck": False},
  "resnet50": {"stages": (3, 4, 6, 3), "bottleneck": True},
}
REVNETS = {f"rev{name[3:]}": fields for name, fields in RESNETS.items()}
FIXED = RESNETS | REVNETS
# name -> the module, its config's presets; `preset` starts from one of them
TRANSFORMERS = {
  "gpt_neo": (gpt_neo.GPTNeo, gpt_neo.PRESETS),
  "llama": (llama.Llama, llama.PRESETS),
  "rev_llama": (rev_llama.RevLlama, rev_llama.PRESETS),
  "rev_vit": (rev_vit.RevViT, rev_vit.PRESETS),
  "vit": (vit.ViT, vit.PRESETS),
}
# name -> the class whose fields are the options
MODELS = {
  "gpt_neo": gpt_neo.GPTNeoConfig,
  "llama": llama.LlamaConfig,
  "mlp": MLP,
  "rev_llama": rev_llama.RevLlamaConfig,
  "rev_vit": rev_vit.RevViTConfig,
  "vit": vit.ViTConfig,
  "rev_mlp": RevMLP,
  **dict.fromkeys(RESNETS, ResNet),
  **dict.fromkeys(REVNETS, RevNet),
}


def option_types(name: str) -> dict[str, Any]:
  """What `create(name)` takes, with the types; meanings stand at the fields.

  >>> option_types("mlp")["classes"]
  <class 'int'>
  """
  model = pick("model name", name, MODELS)
  mine = {"parent", "name", *FIXED.get(name, ())}
  hints = typing.get_type_hints(model)
  fields = [f.name for f in dataclasses.fields(model) if f.init]
  types = {field: hints[field] for field in fields if field not in mine}
  if name in TRANSFORMERS:
    types["preset"] = str
  return dict(sorted(types.items()))


def valid_options(name: str) -> tuple[str, ...]:
  """The names of `option_types`."""
  return tuple(option_types(name))


def create(name: str, **options: Any) -> nn.Module:
  """The model called `name`, one of `MODELS`.

  Args:
    name: mlp, resnet18, resnet34, resnet50, vit, llama or gpt_neo; reversible
      ones: rev_mlp, revnet18, revnet34, revnet50, rev_vit or rev_llama.
    **options: fields of `MLP`, `ResNet`, `ViTConfig`, `LlamaConfig`,
      `GPTNeoConfig`, `RevMLP`, `RevNet`, `RevViTConfig` or `RevLlamaConfig`, as
      plain values. For transformers, `preset` sets those that are not given: of
      vit and rev_vit tiny, S/16 or B/16; of llama and rev_llama tiny, 134M, 500M
      or 1B; of gpt_neo tiny, 125M, 1.3B or 2.7B.

  Returns:
    A Flax Linen module: `model.apply({"params": params}, inputs, train=False)`.

  Raises:
    ValueError: an unknown name or option, or a value that cannot be.

  >>> create("llama", preset="tiny", layers=2).config.layers
  2
  """
  valid = valid_options(name)
  for option in options:
    if option not in valid:
      raise ValueError(
        f"models: {name} has no option {option!r}. {suggest(option, valid)}"
      )
  if name not in TRANSFORMERS:
    return MODELS[name](**FIXED.get(name, {}), **options)
  model, presets = TRANSFORMERS[name]
  config = pick(f"{name}: preset", options.pop("preset", "tiny"), presets)
  if "head_dim" in valid and {"embed", "heads"} & options.keys():
    options.setdefault("head_dim", None)  # follows them, not the preset
  return model(dataclasses.replace(config, **options))


def init(model: nn.Module, key: jax.Array, example: Any) -> Variables:
  """New parameters and non-trained state, as plain arrays.

  Args:
    model: any Flax Linen module; its metadata boxes are taken off.
    key: decides the parameters, together with nothing else.
    example: an input of the model, of which shape and dtype matter; an array
      or a `jax.ShapeDtypeStruct`.

  Returns:
    `Variables(params, model_state)`, the second a dict of the collections that
    are not trained, such as {"batch_stats": ...}; empty for most models.
  """
  return nn.meta.unbox(_init(model, key, example))


def abstract(model: nn.Module, example: Any) -> Variables:
  """`init`'s result as `jax.ShapeDtypeStruct`s: nothing is computed."""
  return nn.meta.unbox(boxes(model, example))


def logical_names(
  model: nn.Module, example: Any, *, collection: str = "params"
) -> Any:
  """The logical axis names of every parameter; nothing is computed.

  Args:
    model: a module whose parameters carry Flax's logical partitioning metadata.
    example: as for `init`.
    collection: "params", or one of the model's state, such as "batch_stats".

  Returns:
    A pytree of the collection's structure with a tuple of strings, one an
    axis, in place of each array. `jax.tree.map(f, params, names)` pairs them.

  Raises:
    ValueError: an array without names, by its path.

  >>> names = logical_names(create("mlp"), jnp.zeros((1, 64)))
  >>> names["dense_1"]["kernel"]
  ('hidden_0', 'hidden_1')
  """
  boxed = boxes(model, example)
  tree = (
    boxed.params
    if collection == "params"
    else boxed.model_state.get(collection, {})
  )
  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)

  def names_of(path, leaf):
    if not is_box(leaf):
      raise ValueError(
        f"{type(model).__name__}: {jax.tree_util.keystr(path)} has no logical "
        "axis names. Wrap its initializer in nn.with_logical_partitioning."
      )
    return tuple(leaf.names)

  return jax.tree_util.tree_map_with_path(names_of, tree, is_leaf=is_box)


def boxes(model: nn.Module, example: Any) -> Variables:
  """What `_init` returns, without values; starts no backend."""
  return jax.eval_shape(lambda: _init(model, jax.random.key(0), example))


def _init(model: nn.Module, key: jax.Array, example: Any) -> Variables:
  """Boxed variables. Under jit, where the unused forward pass is dropped."""

  def run(key):
    # A NumPy example may be float64, which JAX would only warn about.
    dtype = jax.dtypes.canonicalize_dtype
    zeros = lambda x: jnp.zeros(x.shape, dtype(x.dtype))
    state = dict(model.init(key, jax.tree.map(zeros, example)))
    return Variables(state.pop("params"), state)

  return jax.jit(run)(key)
