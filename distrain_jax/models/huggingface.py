"""GPT-Neo and Llama as Hugging Face stores them, to our trees and back.

A model there is a folder: `config.json`, and one or several safetensors files,
the latter with `model.safetensors.index.json`. Names, shapes and the meaning of
the configuration are those of the published models; neither torch nor
transformers is needed. Differences to ours:

- A linear map is stored (outputs, inputs), all heads in one axis; ours has the
  inputs first, and an axis each for heads and their coordinates.
- Layers are numbered, ours stacked (GPT-Neo: the global and the local ones).
- Rotary positions are no difference: both turn the pairs (i, i + d / 2), and
  query head h reads key-value head h // (heads / kv_heads) in both. (Weights
  in the form that Llama's authors publish turn (2 i, 2 i + 1).)
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.models import (
  huggingface_config,
  tensor_files,
  weights,
  zoo,
)
from distrain_jax.models.options import pick
from distrain_jax.models.tensor_files import Tensor

CONFIG = "config.json"
# Of constants that old versions stored beside the parameters.
BUFFERS = (
  ".attn.attention.bias",
  ".attn.attention.masked_bias",
  ".rotary_emb.inv_freq",
)
HEAD = "lm_head.weight"
ROWS = 4096  # compared at once


class Entry(NamedTuple):
  """Where a parameter of ours is found."""

  name: str  # theirs, after the layer's prefix
  # How many leading axes of ours are inputs of a linear map; None: no such map.
  inputs: int | None = None


class Layout(NamedTuple):
  """Where an architecture's parameters are found; keys are our names."""

  outside: Mapping[str, Entry]
  prefix: str  # of a layer, to be formatted with its number
  inside: Mapping[str, Entry]
  stacks: tuple[str, ...]  # stack j of n has the layers j, j + n, j + 2 n, ...


def _norm(ours: str, theirs: str) -> dict[str, Entry]:
  names = {"scale": "weight", "bias": "bias"}
  return {f"{ours}/{a}": Entry(f"{theirs}.{b}") for a, b in names.items()}


LAYOUTS = {
  "gpt_neo": Layout(
    outside={
      "embedding": Entry("transformer.wte.weight"),
      "position": Entry("transformer.wpe.weight"),
      **_norm("final_norm", "transformer.ln_f"),
    },
    prefix="transformer.h.{}.",
    inside={
      **_norm("attention_norm", "ln_1"),
      "attention/query": Entry("attn.attention.q_proj.weight", 1),
      "attention/key": Entry("attn.attention.k_proj.weight", 1),
      "attention/value": Entry("attn.attention.v_proj.weight", 1),
      "attention/out": Entry("attn.attention.out_proj.weight", 2),
      "attention/out_bias": Entry("attn.attention.out_proj.bias"),
      **_norm("feed_forward_norm", "ln_2"),
      "feed_forward/up": Entry("mlp.c_fc.weight", 1),
      "feed_forward/up_bias": Entry("mlp.c_fc.bias"),
      "feed_forward/down": Entry("mlp.c_proj.weight", 1),
      "feed_forward/down_bias": Entry("mlp.c_proj.bias"),
    },
    stacks=("blocks/global/", "blocks/local/"),
  ),
  "llama": Layout(
    outside={
      "embedding": Entry("model.embed_tokens.weight"),
      "final_norm/scale": Entry("model.norm.weight"),
      "output": Entry(HEAD, 1),
    },
    prefix="model.layers.{}.",
    inside={
      "attention_norm/scale": Entry("input_layernorm.weight"),
      "attention/query": Entry("self_attn.q_proj.weight", 1),
      "attention/key": Entry("self_attn.k_proj.weight", 1),
      "attention/value": Entry("self_attn.v_proj.weight", 1),
      "attention/out": Entry("self_attn.o_proj.weight", 3),
      "feed_forward_norm/scale": Entry("post_attention_layernorm.weight"),
      "feed_forward/gate": Entry("mlp.gate_proj.weight", 1),
      "feed_forward/up": Entry("mlp.up_proj.weight", 1),
      "feed_forward/down": Entry("mlp.down_proj.weight", 1),
    },
    stacks=("blocks/",),
  ),
}


class Model(NamedTuple):
  """A model without its values: what it is, and Tensors to take them from."""

  options: dict[str, Any]  # of models.create, `name` among them
  params: Any  # the tree of models.create(**options)


def parameters(options: Mapping[str, Any]) -> Any:
  """The parameters of `models.create(**options)` as ShapeDtypeStructs.

  Raises:
    ValueError: for a model that Hugging Face's forms are not known of here.
  """
  pick("huggingface: name", options.get("name"), LAYOUTS)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return zoo.abstract(zoo.create(**options), tokens).params


def read(source: str | os.PathLike) -> Model:
  """A Hugging Face model in our form; only headers are read.

  Args:
    source: its folder, or a safetensors file beside its config.json.

  Raises:
    FileNotFoundError: no such folder, or a file of it is missing.
    ValueError: an architecture that is not ours, or settings of it that ours
      has not; tensors that are missing, not expected, or of another shape.
  """
  source = pathlib.Path(source)
  folder = source if source.is_dir() else source.parent
  found = tensor_files.open_all(source)
  path = folder / CONFIG
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: no such file. It has the model's sizes: take it from where the "
      "weights come from."
    )
  options = huggingface_config.to_options(
    tensor_files.read_json(path), str(path)
  )
  found = {k: x for k, x in found.items() if not k.endswith(BUFFERS)}
  params = parameters(options)
  wanted = {
    place.name: place.theirs for place in _places(options["name"], params)
  }
  if HEAD not in wanted and HEAD in found:
    _check_tied(str(source), found.pop(HEAD), found.get(next(iter(wanted))))
  shapes = {name: x.shape for name, x in found.items()}
  weights.check_shapes(str(source), shapes, wanted)
  return Model(options, _ours(options["name"], params, found))


def write(folder: str | os.PathLike, model: Model) -> None:
  """Makes a folder with config.json and model.safetensors, as they are there.

  Args:
    folder: made if it is not there; files of those names are replaced.
    model: its params as arrays or Tensors, in the dtype that is written.

  Raises:
    ValueError: params that are not those of the options.
  """
  folder = pathlib.Path(folder)
  options, params = model
  found = {
    k: tensor_files.as_tensor(x) for k, x in weights.names(params).items()
  }
  like = parameters(options)
  shapes = {name: x.shape for name, x in found.items()}
  wanted = {name: x.shape for name, x in weights.names(like).items()}
  weights.check_shapes(f"Model({options})", shapes, wanted)
  tensors = {
    place.name: _theirs(found[place.ours], place)
    for place in _places(options["name"], like)
  }
  folder.mkdir(parents=True, exist_ok=True)
  made = zoo.create(**options).config
  config = huggingface_config.from_model(options["name"], made)
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
  path = folder / "model.safetensors"
  tensor_files.write_file(path, tensors, {"format": "pt"})


class Place(NamedTuple):
  """One tensor of theirs, and where it is in ours."""

  name: str
  theirs: tuple[int, ...]  # its shape
  ours: str  # the leaf's name
  index: int | None  # in the leaf's stack; None: the leaf is no stack
  shape: tuple[int, ...]  # of the leaf, or of the stack's element
  inputs: int | None  # as Entry.inputs


def _places(name: str, params: Any) -> Iterator[Place]:
  """All tensors of theirs, in order; the embedding is the first."""
  layout, shapes = LAYOUTS[name], weights.names(params)
  for ours, entry in layout.outside.items():
    if ours in shapes:  # a tied model has no output layer
      yield _place(entry, "", ours, None, shapes[ours].shape)
  n = len(layout.stacks)
  depth = n * shapes[layout.stacks[0] + "attention/query"].shape[0]
  for layer in range(depth):
    for part, entry in layout.inside.items():
      ours, prefix = layout.stacks[layer % n] + part, layout.prefix
      shape = shapes[ours].shape[1:]
      yield _place(entry, prefix.format(layer), ours, layer // n, shape)


def _place(entry, prefix, ours, index, shape) -> Place:
  theirs = shape
  if entry.inputs is not None:
    inputs, outputs = shape[: entry.inputs], shape[entry.inputs :]
    theirs = (int(np.prod(outputs)), int(np.prod(inputs)))
  return Place(prefix + entry.name, theirs, ours, index, shape, entry.inputs)


def _ours(name: str, params: Any, found: Mapping[str, Tensor]) -> Any:
  """The tree with each leaf made of their tensors."""
  sources: dict[str, list[Place]] = {}
  for place in _places(name, params):
    sources.setdefault(place.ours, []).append(place)

  def leaf(ours, like):
    places = sources[ours]
    dtypes = {found[place.name].dtype for place in places}
    if len(dtypes) > 1:
      raise ValueError(
        f"{ours}: its layers are of several dtypes, "
        f"{', '.join(sorted(map(str, dtypes)))}. Store them in one."
      )

    def parts():
      for place in places:
        x = found[place.name].array()
        yield (x if place.inputs is None else x.T).reshape(place.shape)

    return Tensor(like.shape, dtypes.pop(), parts)

  leaves = [leaf(*item) for item in weights.names(params).items()]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _theirs(x: Tensor, place: Place) -> Tensor:
  """One tensor of theirs, cut out of a leaf of ours."""

  def parts():
    whole = x.array()
    one = whole if place.index is None else whole[place.index]
    yield one if place.inputs is None else one.reshape(place.theirs[::-1]).T

  return Tensor(place.theirs, x.dtype, parts)


def _check_tied(where: str, head: Tensor, embedding: Tensor | None) -> None:
  """Refuses an output layer that is not the embedding, where ours must be."""
  same = embedding is not None and head.shape == embedding.shape
  if same:
    a, b = head.array(), embedding.array()
    starts = range(0, len(a), ROWS)
    same = all(np.array_equal(a[i : i + ROWS], b[i : i + ROWS]) for i in starts)
  if not same:
    raise ValueError(
      f"{where}: {HEAD!r} is not the embedding, but config.json and the "
      "architecture say that it is (tie_word_embeddings)."
    )
