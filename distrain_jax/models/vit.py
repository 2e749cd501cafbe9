"""A Vision Transformer: patches of an image as tokens, read by an encoder.

Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image
Recognition at Scale", 2020, https://arxiv.org/abs/2010.11929: LayerNorm before
both branches, biases, GELU in its tanh form, a classifier that starts at 0.
Not its own: the classifier reads the mean over the patches, not an extra token,
as in Beyer et al., 2022, https://arxiv.org/abs/2205.01580; so do their fixed
positions, the alternative to learned ones. With `mup` in the parametrisation of
Yang et al., 2022, https://arxiv.org/abs/2203.03466.

Letters in shapes: b images, h height and w width in pixels, c channels, s side
of a patch, p patches, e embed, k heads, d coordinates of a head, m mlp.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options
from distrain_jax.models.layers import (
  Dense,
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

POSITIONS = {
  "learned": "one vector a patch, for images of one size",
  "sincos": "sines and cosines of row and column; no parameters",
}
ZEROS = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Sizes and settings of a `ViT`; `PRESETS` holds some.

  With `mup` all weights start with variance 1 / fan in, not Glorot's, which for
  the patches would depend on the width; attention's scores are divided by the
  size of a head, not by its root, and logits by embed, the bias included.
  Biases and positions start as they do without.

  Raises:
    ValueError: where a size is not a whole number above 0, `embed` is not a
      multiple of `heads` (of 4 too, for positions="sincos"), or a name is
      unknown.
  """

  classes: int = 10
  patch: int = 4  # side of a patch, in pixels
  embed: int = 64  # channels of the residual stream
  layers: int = 4
  heads: int = 4
  mlp: int = 128  # hidden units of the feed-forward part
  positions: str = "learned"  # learned, sincos
  scan: bool = True  # one traced block, parameters stacked along `layers`
  remat: str = "none"  # what the backward pass recomputes: options.REMAT
  attention: str = "xla"  # implementation: xla, cudnn
  dropout: float = 0.0  # on both branches of a block; needs rngs: dropout
  stochastic_depth: float = 0.0  # of dropping a block's; needs rngs: dropout
  norm_eps: float = 1e-6
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"
  mup: bool = False  # for mulo, mup_adamw, mup_sgd: see `learned.mup_info`

  def __post_init__(self):
    sizes = ("classes", "patch", "embed", "layers", "heads", "mlp")
    options.check_positive("vit", **{n: getattr(self, n) for n in sizes})
    if self.embed % self.heads:
      raise ValueError(
        f"vit: embed={self.embed} is not a multiple of heads={self.heads}. "
        "Change one."
      )
    options.pick("vit: positions", self.positions, POSITIONS)
    if self.positions == "sincos" and self.embed % 4:
      raise ValueError(
        f"vit: embed={self.embed} must be a multiple of 4 for positions="
        "'sincos', a sine and a cosine of row and column. Change one."
      )
    rates = {n: getattr(self, n) for n in ("dropout", "stochastic_depth")}
    options.check_rate("vit", **rates)
    options.pick("vit: remat", self.remat, options.REMAT)
    options.pick("vit: attention", self.attention, ATTENTION)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("vit", **dtypes)


_OF_IMAGENET = ViTConfig(
  classes=1000, patch=16, layers=12, dtype="bfloat16", remat="full"
)
# Parameters in brackets.
PRESETS = {
  # [138,890] for images of 28 x 28 in grey; seconds on a CPU.
  "tiny": ViTConfig(),
  # [22,049,896] for 224 x 224 in colour, as B/16.
  "S/16": dataclasses.replace(_OF_IMAGENET, embed=384, heads=6, mlp=1536),
  # [86,566,120]
  "B/16": dataclasses.replace(_OF_IMAGENET, embed=768, heads=12, mlp=3072),
}


def sincos(rows: int, columns: int, embed: int) -> jax.Array:
  """Fixed positions (rows * columns, embed), float32.

  A quarter each: sin and cos of the column, sin and cos of the row, times rates
  that fall from 1 to 1/10,000.
  """
  rates = 10_000.0 ** -jnp.linspace(0.0, 1.0, embed // 4)
  row, column = jnp.indices((rows, columns)).reshape(2, -1)
  angles = [jnp.outer(at.astype(jnp.float32), rates) for at in (column, row)]
  parts = [f(a) for a in angles for f in (jnp.sin, jnp.cos)]
  return jnp.concatenate(parts, axis=1)


def _weight(module, name, names, *shape, inputs=1, writer=False):
  """A matrix from the first `inputs` axes to the others; uniform."""
  axes = tuple(range(len(shape)))
  mode = "fan_in" if module.config.mup else "fan_avg"  # the latter: Glorot
  init_fn = nn.initializers.variance_scaling(
    1.0, mode, "uniform", axes[:inputs], axes[inputs:]
  )
  dtype = module.config.param_dtype
  return parameter(module, name, init_fn, shape, names, dtype, writer)


def _bias(module, name, names, *shape, writer=False):
  dtype = module.config.param_dtype
  return parameter(module, name, ZEROS, shape, names, dtype, writer)


class Attention(nn.Module):
  """Attention of all to all, x (b, p, e) -> (b, p, e); softmax in float32."""

  config: ViTConfig
  index: int | None = None  # of the block, unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    e, k, d = c.embed, c.heads, c.embed // c.heads
    names = ("embed", numbered("heads", self.index), "head_dim")
    read = []
    for name in ("query", "key", "value"):
      kernel = _weight(self, name, names, e, k, d)
      bias = _bias(self, f"{name}_bias", names[1:], k, d)
      kernel, bias = computing(c, kernel, bias)
      read.append(jnp.einsum("bpe,ekd->bpkd", x, kernel) + bias[None, None])
    scale = 1 / d if c.mup else None  # None: 1 / sqrt(d)
    mixed = jax.nn.dot_product_attention(
      *read, scale=scale, implementation=c.attention
    )
    names = (*names[1:], "embed")
    out = _weight(self, "out", names, k, d, e, inputs=2, writer=True)
    bias = _bias(self, "out_bias", names[2:], e, writer=True)
    out, bias = computing(c, out, bias)
    y = jnp.einsum("bpkd,kde->bpe", mixed, out)
    return y + along_channels(bias, y)


class FeedForward(nn.Module):
  """x (b, p, e) -> gelu(x @ up + up_bias) @ down + down_bias, (b, p, e)."""

  config: ViTConfig
  index: int | None = None  # of the block, unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c, names = self.config, ("embed", numbered("mlp", self.index))
    arrays = (
      _weight(self, "up", names, c.embed, c.mlp),
      _bias(self, "up_bias", names[1:], c.mlp),
      _weight(self, "down", names[::-1], c.mlp, c.embed, writer=True),
      _bias(self, "down_bias", names[:1], c.embed, writer=True),
    )
    up, up_bias, down, down_bias = computing(c, *arrays)
    hidden = x @ up
    hidden = nn.gelu(hidden + along_channels(up_bias, hidden), approximate=True)
    y = hidden @ down
    return y + along_channels(down_bias, y)


class Block(nn.Module):
  """One layer, as a scan's body: (x, None) -> (x, None)."""

  config: ViTConfig
  train: bool
  index: int | None = None  # unless it is stacked

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    c = self.config
    drop = functools.partial(
      nn.Dropout, c.dropout, deterministic=not self.train
    )
    kept = stochastic_depth(self, c.stochastic_depth, self.train)
    y = layer_norm(c, "attention_norm")(x)
    y = Attention(c, self.index, name="attention")(y)
    x = x + kept(drop(name="attention_dropout")(y))
    y = layer_norm(c, "feed_forward_norm")(x)
    y = FeedForward(c, self.index, name="feed_forward")(y)
    return x + kept(drop(name="feed_forward_dropout")(y)), None


class ViT(nn.Module):
  """images (b, h, w, c) -> logits (b, classes), float32.

  h and w are multiples of the patch's side; with learned positions they are
  those of the images that the parameters were made for. What is left out of the
  blocks, or of them, is what the parameters lack, as in a `Llama`.

  Raises:
    ValueError: for images of another size.
  """

  config: ViTConfig

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    c = self.config
    x = self._tokens(image)  # (b, p, e)
    x = layer_norm(c, "final_norm")(self._blocks(x, train))
    x = x.astype(jnp.float32).mean(1)  # (b, e)
    names, dtypes = ("embed", "classes"), (c.dtype, c.param_dtype)
    own = {"kernel_init": ZEROS, "divisor": c.embed if c.mup else 1}
    x = Dense(c.classes, names, *dtypes, **own, name="output")(x)
    return x.astype(jnp.float32)

  def _tokens(self, image: jax.Array) -> jax.Array:
    """The patches, embedded, with their positions: (b, p, e)."""
    c, s = self.config, self.config.patch
    b, h, w, channels = image.shape
    if h % s or w % s:
      raise ValueError(
        f"vit: images of {h} x {w} pixels are not cut into patches of "
        f"patch={s}. Choose a common divisor (--config.model.patch), or other "
        "images (--config.data.image_size)."
      )
    names = ("spatial_0", "spatial_1", "image_channels", "embed")
    kernel = _weight(self, "patch", names, s, s, channels, c.embed, inputs=3)
    bias = _bias(self, "patch_bias", ("embed",), c.embed)
    x = image.reshape(b, h // s, s, w // s, s, channels)
    x, kernel, bias = computing(c, x, kernel, bias)
    x = jnp.einsum("bisjtc,stce->bije", x, kernel)
    x = x.reshape(b, -1, x.shape[-1])  # (b, p, e)
    if c.positions == "sincos":
      places = sincos(h // s, w // s, x.shape[-1])
    else:
      places = self._places(x, (h, w))
    (places,) = computing(c, places)
    return x + along_channels(bias, x) + places[None]

  def _places(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The learned positions, (p, e)."""
    normal, dtype = nn.initializers.normal(0.02), self.config.param_dtype
    names = ("patches", "embed")
    places = parameter(self, "position", normal, x.shape[1:], names, dtype)
    if len(places) != x.shape[1]:
      raise ValueError(
        f"vit: images of {size[0]} x {size[1]} pixels have {x.shape[1]} "
        f"patches, but positions were learned for {len(places)}. Give images "
        "of the size that the parameters were made for, or train with "
        "--config.model.positions=sincos."
      )
    return places

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
