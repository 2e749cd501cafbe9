"""GPT-Neo: a decoder whose attention is global and local by turns.

Black et al., "GPT-Neo: Large Scale Autoregressive Language Modeling with
Mesh-Tensorflow", 2021, https://doi.org/10.5281/zenodo.5297715. The block is
GPT-2's (Radford et al., 2019): learned positions, LayerNorm before both
branches, GELU in its tanh form. Its own: every second layer attends to the last
`window` tokens only, as in Child et al., 2019,
https://arxiv.org/abs/1904.10509; and scores are not divided by sqrt(d).

Letters in shapes: b sequences, t tokens, p positions, e embed, k heads, d
coordinates of a head, m mlp, v vocab.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options
from distrain_jax.models.chunked_loss import logits
from distrain_jax.models.layers import (
  along_channels,
  computing,
  is_given,
  parameter,
  stacked,
  stochastic_depth,
)
from distrain_jax.models.llama import ATTENTION
from distrain_jax.models.names import numbered
from distrain_jax.models.norms import layer_norm


@dataclasses.dataclass(frozen=True)
class GPTNeoConfig:
  """Sizes and settings of a `GPTNeo`; `PRESETS` holds some.

  With `mup` embeddings of tokens and positions start with variance 1, all other
  weights at 1 / sqrt(fan in), biases at 0: of so many branches, biases of
  variance 1 would drown the tokens. Attention's scores are divided by the size
  of a head and logits by embed. The output layer is the embedding all the same:
  it learns as one and starts as one: logits are random by 1 / sqrt(embed).

  Raises:
    ValueError: where a size is not a whole number above 0, `embed` is not a
      multiple of `heads`, `layers` is odd and `scan` on, or a name is unknown.
  """

  vocab: int = 256
  positions: int = 512  # the longest row of tokens
  embed: int = 128  # channels of the residual stream
  layers: int = 4  # the first global, the second local, and so on
  heads: int = 4
  mlp: int = 512  # hidden units of the feed-forward part
  window: int = 32  # tokens that a local layer's token sees, itself included
  scan: bool = True  # one traced pair of blocks, parameters stacked
  remat: str = "none"  # what the backward pass recomputes: options.REMAT
  attention: str = "xla"  # implementation: xla, cudnn
  dropout: float = 0.0  # on both branches of a block; needs rngs: dropout
  stochastic_depth: float = 0.0  # of dropping a block's; needs rngs: dropout
  norm_eps: float = 1e-5
  init_std: float = 0.02  # of all weights, not with mup; biases are 0 at first
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"
  mup: bool = False  # for mulo, mup_adamw, mup_sgd: see `learned.mup_info`

  def __post_init__(self):
    sizes = (
      "vocab",
      "positions",
      "embed",
      "layers",
      "heads",
      "mlp",
      "window",
    )
    options.check_positive("gpt_neo", **{n: getattr(self, n) for n in sizes})
    if self.embed % self.heads:
      raise ValueError(
        f"gpt_neo: embed={self.embed} is not a multiple of heads={self.heads}. "
        "Change one."
      )
    if self.scan and self.layers % 2:
      raise ValueError(
        f"gpt_neo: layers={self.layers} is odd, but scan=True runs pairs of a "
        f"global and a local layer. Set layers={self.layers + 1}, or "
        "scan=False."
      )
    rates = {n: getattr(self, n) for n in ("dropout", "stochastic_depth")}
    options.check_rate("gpt_neo", **rates)
    options.pick("gpt_neo: remat", self.remat, options.REMAT)
    options.pick("gpt_neo: attention", self.attention, ATTENTION)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("gpt_neo", **dtypes)


_PUBLISHED = GPTNeoConfig(
  vocab=50_257, positions=2048, window=256, dtype="bfloat16", remat="full"
)
# Parameters in brackets.
PRESETS = {
  # [890,112] bytes as tokens; seconds on a CPU.
  "tiny": GPTNeoConfig(),
  # [125,198,592]
  "125M": dataclasses.replace(
    _PUBLISHED, embed=768, layers=12, heads=12, mlp=3072
  ),
  # [1,315,575,808]
  "1.3B": dataclasses.replace(
    _PUBLISHED, embed=2048, layers=24, heads=16, mlp=8192
  ),
  # [2,651,307,520]
  "2.7B": dataclasses.replace(
    _PUBLISHED, embed=2560, layers=32, heads=20, mlp=10_240
  ),
}


def _weight(module, name, names, *shape, fan_in, writer=False):
  """A parameter drawn with the model's standard deviation, or muP's."""
  c = module.config
  normal = nn.initializers.normal(fan_in**-0.5 if c.mup else c.init_std)
  return parameter(module, name, normal, shape, names, c.param_dtype, writer)


def _bias(module, name, axis, size, writer=False):
  zeros, dtype = nn.initializers.zeros, module.config.param_dtype
  return parameter(module, name, zeros, (size,), (axis,), dtype, writer)


class Attention(nn.Module):
  """Causal attention, x (b, t, e) -> (b, t, e); softmax in float32.

  With a window w, a token sees itself and the w - 1 before it.
  """

  config: GPTNeoConfig
  window: int | None
  index: int | None = None  # of the block, unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    e, k, d = c.embed, c.heads, c.embed // c.heads
    names = ("embed", numbered("heads", self.index), "head_dim")
    weights = [
      _weight(self, name, names, e, k, d, fan_in=e)
      for name in ("query", "key", "value")
    ]
    names = (*names[1:], "embed")
    out = _weight(self, "out", names, k, d, e, fan_in=k * d, writer=True)
    bias = _bias(self, "out_bias", "embed", e, writer=True)
    *weights, out, bias = computing(self.config, *weights, out, bias)
    mixed = jax.nn.dot_product_attention(
      *(jnp.einsum("bte,ekd->btkd", x, w) for w in weights),
      # The published models are trained without 1 / sqrt(d).
      scale=1 / d if c.mup else 1.0,
      is_causal=True,
      local_window_size=None if self.window is None else (self.window - 1, 0),
      implementation=c.attention,
    )
    y = jnp.einsum("btkd,kde->bte", mixed, out)
    return y + along_channels(bias, y)


class FeedForward(nn.Module):
  """x (b, t, e) -> gelu(x @ up + up_bias) @ down + down_bias, (b, t, e)."""

  config: GPTNeoConfig
  index: int | None = None  # of the block, unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, mlp = self.config, numbered("mlp", self.index)
    e, m, names = c.embed, c.mlp, (mlp, "embed")
    arrays = (
      _weight(self, "up", names[::-1], e, m, fan_in=e),
      _bias(self, "up_bias", mlp, m),
      _weight(self, "down", names, m, e, fan_in=m, writer=True),
      _bias(self, "down_bias", "embed", e, writer=True),
    )
    up, up_bias, down, down_bias = computing(self.config, *arrays)
    hidden = x @ up
    hidden = nn.gelu(hidden + along_channels(up_bias, hidden), approximate=True)
    y = hidden @ down
    return y + along_channels(down_bias, y)


class Block(nn.Module):
  """One layer: x (b, t, e) -> (b, t, e)."""

  config: GPTNeoConfig
  window: int | None
  train: bool
  index: int | None = None  # unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    drop = functools.partial(
      nn.Dropout, c.dropout, deterministic=not self.train
    )
    kept = stochastic_depth(self, c.stochastic_depth, self.train)
    y = layer_norm(c, "attention_norm")(x)
    y = Attention(c, self.window, self.index, name="attention")(y)
    x = x + kept(drop(name="attention_dropout")(y))
    y = layer_norm(c, "feed_forward_norm")(x)
    y = FeedForward(c, self.index, name="feed_forward")(y)
    return x + kept(drop(name="feed_forward_dropout")(y))


class Pair(nn.Module):
  """A global and a local layer, as a scan's body: (x, None) -> (x, None)."""

  config: GPTNeoConfig
  train: bool

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    c = self.config
    block = _block(c)
    x = block(c, None, self.train, name="global")(x)
    return block(c, c.window, self.train, name="local")(x), None


class GPTNeo(nn.Module):
  """tokens (b, t), int32 -> logits of the next ones (b, t, v), float32.

  The output layer is the embedding, transposed. With `scan`, the parameters of
  the global layers are stacked along a leading axis `layers`, those of the
  local ones too, (layers / 2, ...) each. What can be left out is then a pair:
  an index on both axes. One axis of all layers would have to say of each
  gathered layer whether it is local; pairs keep the turns, a window known when
  compiling (the fused kernels need it), and one traced body.

  Raises:
    ValueError: for more tokens in a row than there are positions.
  """

  config: GPTNeoConfig

  def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    return logits(*self.hidden(tokens, train=train))

  @nn.compact
  def hidden(
    self, tokens: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """What the logits are the product of: x (b, t, e), output layer (e, v).

    With `mup`, x has been divided by the model's embed.
    """
    c, t = self.config, tokens.shape[1]
    names = ("vocab", "embed")
    # One row is taken, no sum: a fan in of 1.
    table = _weight(self, "embedding", names, c.vocab, c.embed, fan_in=1)
    names = ("positions", "embed")
    places = _weight(self, "position", names, c.positions, c.embed, fan_in=1)
    if t > places.shape[0]:
      raise ValueError(
        f"gpt_neo: rows of {t} tokens, but the model knows "
        f"positions={places.shape[0]}. Shorten the rows (config.data.length), "
        "or train a model of more positions."
      )
    # Rows are taken before they are cast: their gradients then add up in the
    # parameters' dtype.
    (x,) = computing(
      self.config, jnp.take(table, tokens, axis=0) + places[None, :t]
    )
    x = layer_norm(c, "final_norm")(self._blocks(x, train))
    x = x / c.embed if c.mup else x
    return x, *computing(self.config, table.T)

  @nn.nowrap
  def optional_blocks(self) -> tuple[str, ...]:
    """The blocks, unless they are stacked: any can be left out."""
    c = self.config
    return () if c.scan else tuple(f"block_{k}" for k in range(c.layers))

  def _blocks(self, x: jax.Array, train: bool) -> jax.Array:
    c = self.config
    if not c.scan:
      for k, name in enumerate(self.optional_blocks()):
        window = c.window if k % 2 else None
        if is_given(self, name):
          x = _block(c)(c, window, train, k, name=name)(x)
      return x
    stack = stacked(self, Pair, c.layers // 2)
    return stack(c, train, name="blocks")(x, None)[0]


def _block(c: GPTNeoConfig):
  """`Block`, recomputed in the backward pass as far as `remat` says."""
  if c.remat == "none":
    return Block
  policy = options.remat_policy(c.remat)
  # A scan's body cannot be merged with its own recomputation.
  return nn.remat(Block, policy=policy, prevent_cse=not c.scan)
