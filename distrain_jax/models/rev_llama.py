"""A Llama whose layers can be run backwards: two streams instead of one.

A layer is Reformer's (Kitaev et al., 2020, https://arxiv.org/abs/2001.04451):
attention reads the first stream and adds to the second, the feed-forward part
then reads the second and adds to the first. Each half is a coupling, in the
form of PETRA (Rivaud et al., 2024, https://arxiv.org/abs/2406.02052):
(x, r) -> (r + F(x), x), F a norm and a layer of `llama`. Both streams start as
the embedding, as in Reformer.

Not Reformer's: the output layer reads the mean of the streams, not both side by
side, so that there are exactly as many parameters as in a `Llama`.

The streams are float32, whatever F is computed in: going back subtracts from
r + F(x) what was added, and a sum rounded to the 8 bits of bfloat16 no longer
tells what r was.

Letters in shapes: b sequences, t tokens, e embed, v vocab.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import llama, parts
from distrain_jax.models.chunked_loss import logits
from distrain_jax.models.layers import (
  computing,
  parameter,
  stochastic_depth,
  to_float32,
)
from distrain_jax.models.norms import RMSNorm

LAYERS = {"attention": llama.Attention, "feed_forward": llama.FeedForward}


def check_reversible(owner: str, config) -> None:
  """Refuses the settings of a transformer that a reversible one has no use for.

  Args:
    owner: the model's name, for the message.
    config: has `scan`, `remat`, `mup` and `grid`.
  """
  if config.scan:
    raise ValueError(
      f"{owner}: scan=True stacks the parameters of all layers, but here each "
      "attention and feed-forward part is a block of its own, for a pipeline "
      "to place. Set scan=False."
    )
  if config.remat != "none":
    raise ValueError(
      f"{owner}: remat={config.remat!r} recomputes activations from stored "
      "inputs, but a reversible network reconstructs the inputs too: pass "
      "keep_activations=False to stages.loss_fn, and set remat='none'."
    )
  if config.mup:
    raise ValueError(
      f"{owner}: mup=True is not known of reversible models. Set mup=False, or "
      f"take {owner.removeprefix('rev_')}."
    )
  parts.check_grid(owner, config.grid)


@dataclasses.dataclass(frozen=True)
class RevLlamaConfig(llama.LlamaConfig):
  """Sizes and settings of a `RevLlama`; `PRESETS` holds some.

  Those of a `LlamaConfig`, of which `scan`, `remat`, `tied` and `mup` stay as
  they are here. With stochastic_depth each coupling is dropped by itself, not
  the two of a layer together: its F is then 0.

  Raises:
    ValueError: as a `LlamaConfig`; for other values of these four; where
      `grid` is not a power of two.
  """

  scan: bool = False  # each half of a layer is a part of its own
  # The streams and what is added to them are rounded to multiples of it, for
  # reconstruction without error; None: not. See stages.coupling.
  grid: float | None = None

  def __post_init__(self):
    super().__post_init__()
    check_reversible("rev_llama", self)
    if self.tied:
      raise ValueError(
        "rev_llama: tied=True shares one matrix between the first part and the "
        "last, which a pipeline holds on different devices. Set tied=False."
      )


# Those of a Llama, with as many parameters each.
PRESETS = {
  name: RevLlamaConfig(
    **dataclasses.asdict(config) | {"scan": False, "remat": "none"}
  )
  for name, config in llama.PRESETS.items()
}


def branch_output(module: nn.Module, y: jax.Array, train: bool) -> jax.Array:
  """What F adds to a stream: y after dropout and stochastic depth, float32."""
  c = module.config
  y = nn.Dropout(c.dropout, deterministic=not train, name="dropout")(y)
  return to_float32(stochastic_depth(module, c.stochastic_depth, train)(y))


class Embedding(nn.Module):
  """tokens (b, t), int32 -> two equal streams (b, t, e), float32."""

  config: RevLlamaConfig

  @nn.compact
  def __call__(
    self, tokens: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    del train  # one rule for training and evaluation
    c = self.config
    normal, names = nn.initializers.normal(c.init_std), ("vocab", "embed")
    sizes = (c.vocab, c.embed)
    table = parameter(self, "table", normal, sizes, names, c.param_dtype)
    x = parts.to_streams(jnp.take(table, tokens, axis=0), c.grid)
    return x, x


class Branch(nn.Module):
  """F of a coupling, x (b, t, e) -> (b, t, e), both float32.

  Those of all layers are equal, so that a pipeline compiles their code once.
  """

  config: RevLlamaConfig
  layer: str  # attention or feed_forward

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    c = self.config
    x = RMSNorm("embed", c.norm_eps, c.param_dtype, name="norm")(x)
    (x,) = computing(c, x)
    y = LAYERS[self.layer](c, name=self.layer)(x)
    return branch_output(self, y, train)


class Output(nn.Module):
  """Two streams (b, t, e) -> logits (b, t, v), float32."""

  config: RevLlamaConfig

  @nn.compact
  def __call__(
    self, streams: tuple[jax.Array, jax.Array], *, train: bool = False
  ) -> jax.Array:
    del train  # one rule for training and evaluation
    c, (x, r) = self.config, streams
    x = RMSNorm("embed", c.norm_eps, c.param_dtype, name="norm")((x + r) / 2)
    normal, names = nn.initializers.normal(c.init_std), ("embed", "vocab")
    sizes = (c.embed, c.vocab)
    head = parameter(self, "kernel", normal, sizes, names, c.param_dtype)
    return logits(*computing(c, x, head))


class RevLlama(nn.Module):
  """tokens (b, t), int32 -> logits of the next ones (b, t, v), float32."""

  config: RevLlamaConfig

  @nn.nowrap
  def parts(self) -> tuple[parts.Part, ...]:
    """embedding, attention_0, feed_forward_0, attention_1, ..., output."""
    c = self.config
    couplings = (
      parts.Part(f"{layer}_{k}", Branch(c, layer), coupling=True, grid=c.grid)
      for k in range(c.layers)
      for layer in LAYERS
    )
    first = parts.Part("embedding", Embedding(c))
    return (first, *couplings, parts.Part("output", Output(c)))

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    return parts.run(self, tokens, train)
