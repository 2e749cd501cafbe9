"""A decoder in the manner of Llama: RMSNorm, RoPE, SwiGLU, grouped queries.

Touvron et al., 2023, https://arxiv.org/abs/2302.13971; rotary positions: Su et
al., 2021, https://arxiv.org/abs/2104.09864; SwiGLU: Shazeer, 2020,
https://arxiv.org/abs/2002.05202; grouped queries: Ainslie et al., 2023,
https://arxiv.org/abs/2305.13245. No biases. With `mup` in the parametrisation
of Yang et al., 2022, https://arxiv.org/abs/2203.03466.

Letters in shapes: b sequences, t tokens, e embed, k key-value heads, q queries
a key-value head, d coordinates of a head, m mlp, v vocab, l layers.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options
from distrain_jax.models.chunked_loss import logits
from distrain_jax.models.layers import (
  computing,
  is_given,
  parameter,
  stacked,
  stochastic_depth,
  to_float32,
)
from distrain_jax.models.names import numbered
from distrain_jax.models.norms import RMSNorm

# cudnn: the fused kernel of NVIDIA GPUs, for float16 and bfloat16.
ATTENTION = {"cudnn": "cudnn", "xla": "xla"}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes and settings of a `Llama`; `PRESETS` holds some.

  With `mup` an embedding starts with variance 1, the output layer at 0 and all
  other weights at 1 / sqrt(fan in), those that write to the stream smaller, as
  without; attention's scores are divided by head_dim, not by its root, and
  logits by embed. A tied output layer is the embedding all the same: it learns
  as one, and starts as one, so that logits are random by 1 / sqrt(embed).

  Raises:
    ValueError: where a size is not a whole number above 0, `heads` is not a
      multiple of `kv_heads`, or a name is unknown.
  """

  vocab: int = 256
  embed: int = 128  # channels of the residual stream
  layers: int = 4
  heads: int = 4  # query heads
  kv_heads: int = 2  # key-value heads, each read by heads / kv_heads queries
  head_dim: int | None = None  # None: embed / heads
  mlp: int = 352  # hidden units of the feed-forward part
  tied: bool = False  # the output layer is the embedding, transposed
  scan: bool = True  # one traced block, parameters stacked along `layers`
  remat: str = "none"  # what the backward pass recomputes: options.REMAT
  attention: str = "xla"  # implementation: xla, cudnn
  dropout: float = 0.0  # on both branches of a block; needs rngs: dropout
  stochastic_depth: float = 0.0  # of dropping a block's; needs rngs: dropout
  rope_theta: float = 10_000.0  # wavelengths: 2 pi to 2 pi theta tokens
  norm_eps: float = 1e-5
  init_std: float = 0.02  # of all weights; not with mup; see `std`
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"
  mup: bool = False  # for mulo, mup_adamw, mup_sgd: see `learned.mup_info`

  def __post_init__(self):
    sizes = ("vocab", "embed", "layers", "heads", "kv_heads", "mlp")
    options.check_positive("llama", **{n: getattr(self, n) for n in sizes})
    if self.heads % self.kv_heads:
      raise ValueError(
        f"llama: heads={self.heads} must be a multiple of "
        f"kv_heads={self.kv_heads}: every key-value head serves equally many "
        "query heads."
      )
    if self.head_dim is None:
      if self.embed % self.heads:
        raise ValueError(
          f"llama: embed={self.embed} is not a multiple of heads={self.heads}. "
          "Change one, or set head_dim."
        )
      object.__setattr__(self, "head_dim", self.embed // self.heads)
    options.check_positive("llama", head_dim=self.head_dim)
    if self.head_dim % 2:
      raise ValueError(
        f"llama: head_dim={self.head_dim} (embed / heads where not set) must "
        "be even: rotary positions turn pairs of coordinates."
      )
    rates = {n: getattr(self, n) for n in ("dropout", "stochastic_depth")}
    options.check_rate("llama", **rates)
    options.pick("llama: remat", self.remat, options.REMAT)
    options.pick("llama: attention", self.attention, ATTENTION)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("llama", **dtypes)

  def std(self, fan_in: int, writer: bool = False) -> float:
    """Initial standard deviation of weights.

    Args:
      fan_in: how many inputs are summed over.
      writer: whether the result is added to the stream, whose variance would
        grow with depth; as in GPT-2, it does not.
    """
    std = fan_in**-0.5 if self.mup else self.init_std
    return std / (2 * self.layers) ** 0.5 if writer else std


_WIDE = LlamaConfig(vocab=32_000, dtype="bfloat16", remat="full")
# Parameters in brackets. 500M and 1B have 8 key-value heads and 16 layers, so
# that the subnetworks of 8 workers are of one size.
PRESETS = {
  # [803,968] bytes as tokens; seconds on a CPU.
  "tiny": LlamaConfig(),
  # [134,105,856] the 134M of the low-rank and SDP (arXiv 2507.09029)
  # literature: 12 layers of 768, no grouped queries.
  "134M": dataclasses.replace(
    _WIDE, embed=768, layers=12, heads=12, kv_heads=12, head_dim=64, mlp=2048
  ),
  # [501,007,872]
  "500M": dataclasses.replace(
    _WIDE, embed=1536, layers=16, heads=24, kv_heads=8, head_dim=64, mlp=4096
  ),
  # [1,104,218,112] the blocks of Llama 3.2 1B with a vocabulary of 32,000.
  "1B": dataclasses.replace(
    _WIDE, embed=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192
  ),
}


def rope(x: jax.Array, theta: float) -> jax.Array:
  """Turns the pairs (i, i + d / 2) of x (b, t, n, d) by t / theta^(2i / d).

  Computed in float32, returned in x's dtype.
  """
  t, d = x.shape[1], x.shape[-1]
  rates = theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)  # (d / 2,)
  angles = jnp.outer(jnp.arange(t, dtype=jnp.float32), rates)  # (t, d / 2)
  angles = angles.reshape(1, t, 1, d // 2)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(to_float32(x), 2, axis=-1)  # (b, t, n, d / 2)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _weight(module, name, names, *shape, fan_in, writer=False):
  """A new or given parameter, as it is stored."""
  c = module.config
  normal = nn.initializers.normal(c.std(fan_in, writer))
  return parameter(module, name, normal, shape, names, c.param_dtype, writer)


class Attention(nn.Module):
  """Causal grouped-query attention, x (b, t, e) -> (b, t, e).

  Key-value heads are the axis `heads` of all four weights: taking a head takes
  its queries, key, value and output together. Softmax in float32, of scores
  divided by sqrt(d), with `mup` by d.
  """

  config: LlamaConfig
  index: int | None = None  # of the block, unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    weight = functools.partial(_weight, self)
    e, k, q, d = c.embed, c.kv_heads, c.heads // c.kv_heads, c.head_dim
    heads = numbered("heads", self.index)
    names = ("embed", heads, "queries", "head_dim")
    queries = weight("query", names, e, k, q, d, fan_in=e)
    names = ("embed", heads, "head_dim")
    keys = weight("key", names, e, k, d, fan_in=e)
    values = weight("value", names, e, k, d, fan_in=e)
    names = (heads, "queries", "head_dim", "embed")
    out = weight("out", names, k, q, d, e, fan_in=k * q * d, writer=True)
    queries, keys, values, out = computing(
      self.config, queries, keys, values, out
    )

    queries = jnp.einsum("bte,ekqd->btkqd", x, queries)
    grouped = queries.shape
    queries = queries.reshape(*grouped[:2], -1, grouped[-1])  # (b, t, k q, d)
    mixed = jax.nn.dot_product_attention(
      rope(queries, c.rope_theta),
      rope(jnp.einsum("bte,ekd->btkd", x, keys), c.rope_theta),
      jnp.einsum("bte,ekd->btkd", x, values),
      scale=1 / d if c.mup else None,
      is_causal=True,
      implementation=c.attention,
    )
    return jnp.einsum("btkqd,kqde->bte", mixed.reshape(grouped), out)


class FeedForward(nn.Module):
  """SwiGLU, x (b, t, e) -> (silu(x @ gate) * (x @ up)) @ down, (b, t, e)."""

  config: LlamaConfig
  index: int | None = None  # of the block, unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    weight = functools.partial(_weight, self)
    names = ("embed", numbered("mlp", self.index))
    e, m = c.embed, c.mlp
    gate = weight("gate", names, e, m, fan_in=e)
    up = weight("up", names, e, m, fan_in=e)
    down = weight("down", names[::-1], m, e, fan_in=m, writer=True)
    gate, up, down = computing(self.config, gate, up, down)
    return (nn.silu(x @ gate) * (x @ up)) @ down


class Block(nn.Module):
  """One layer, as a scan's body: (x, None) -> (x, None)."""

  config: LlamaConfig
  train: bool
  index: int | None = None  # unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    c = self.config
    norm = functools.partial(RMSNorm, "embed", c.norm_eps, c.param_dtype)
    drop = functools.partial(
      nn.Dropout, c.dropout, deterministic=not self.train
    )
    kept = stochastic_depth(self, c.stochastic_depth, self.train)
    y = norm(name="attention_norm")(x)
    y = Attention(c, self.index, name="attention")(y)
    x = x + kept(drop(name="attention_dropout")(y))
    y = norm(name="feed_forward_norm")(x)
    y = FeedForward(c, self.index, name="feed_forward")(y)
    return x + kept(drop(name="feed_forward_dropout")(y)), None


class Llama(nn.Module):
  """tokens (b, t), int32 -> logits of the next ones (b, t, v), float32.

  With `scan`, the blocks' parameters are stacked along a leading axis `layers`,
  whose length is the depth: fewer layers given, fewer run. Without, a block
  whose parameters are not given is left out.
  """

  config: LlamaConfig

  def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    return logits(*self.hidden(tokens, train=train))

  @nn.compact
  def hidden(
    self, tokens: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """What the logits are the product of: x (b, t, e), output layer (e, v).

    With `mup`, x has been divided by the model's embed.
    """
    c, names = self.config, ("vocab", "embed")
    # One row is taken, no sum: a fan in of 1.
    table = _weight(self, "embedding", names, c.vocab, c.embed, fan_in=1)
    # Rows are taken before they are cast: their gradients then add up in the
    # parameters' dtype.
    (x,) = computing(self.config, jnp.take(table, tokens, axis=0))  # (b, t, e)
    x = self._blocks(x, train)
    x = RMSNorm("embed", c.norm_eps, c.param_dtype, name="final_norm")(x)
    head = table.T if c.tied else self._output()
    (head,) = computing(self.config, head)
    return x / c.embed if c.mup else x, head

  def _output(self) -> jax.Array:
    c, names = self.config, ("embed", "vocab")
    zeros, normal = nn.initializers.zeros, nn.initializers.normal(c.init_std)
    init_fn, shape = zeros if c.mup else normal, (c.embed, c.vocab)
    return parameter(self, "output", init_fn, shape, names, c.param_dtype)

  @nn.nowrap
  def optional_blocks(self) -> tuple[str, ...]:
    """The blocks, unless they are stacked: any can be left out."""
    c = self.config
    return () if c.scan else tuple(f"block_{k}" for k in range(c.layers))

  def _blocks(self, x: jax.Array, train: bool) -> jax.Array:
    c, block = self.config, Block
    if c.remat != "none":
      policy = options.remat_policy(c.remat)
      # A scan's body cannot be merged with its own recomputation.
      block = nn.remat(Block, policy=policy, prevent_cse=not c.scan)
    if not c.scan:
      for k, name in enumerate(self.optional_blocks()):
        if is_given(self, name):
          x, _ = block(c, train, k, name=name)(x)
      return x
    stack = stacked(self, block, c.layers)
    return stack(c, train, name="blocks")(x, None)[0]
