"""A ViT whose layers can be run backwards: two streams instead of one.

What `rev_llama` is to `llama`, of the layers of `vit`: both streams start as
the embedded patches, attention adds to one and the feed-forward part to the
other, and the classifier reads their mean. As many parameters as a `ViT`.

Letters in shapes: b images, h height and w width in pixels, c channels, p
patches, e embed.
"""

import dataclasses

import flax.linen as nn
import jax

from distrain_jax.models import parts, vit
from distrain_jax.models.layers import Dense, to_float32
from distrain_jax.models.norms import layer_norm
from distrain_jax.models.rev_llama import branch_output, check_reversible

LAYERS = {"attention": vit.Attention, "feed_forward": vit.FeedForward}


@dataclasses.dataclass(frozen=True)
class RevViTConfig(vit.ViTConfig):
  """Sizes and settings of a `RevViT`; `PRESETS` holds some.

  Those of a `ViTConfig`, of which `scan`, `remat` and `mup` stay as they are
  here. With stochastic_depth each coupling is dropped by itself, not the two of
  a layer together: its F is then 0.

  Raises:
    ValueError: as a `ViTConfig`; for other values of these three; where `grid`
      is not a power of two.
  """

  scan: bool = False  # each half of a layer is a part of its own
  # The streams and what is added to them are rounded to multiples of it, for
  # reconstruction without error; None: not. See stages.coupling.
  grid: float | None = None

  def __post_init__(self):
    super().__post_init__()
    check_reversible("rev_vit", self)


# Those of a ViT, with as many parameters each.
PRESETS = {
  name: RevViTConfig(
    **dataclasses.asdict(config) | {"scan": False, "remat": "none"}
  )
  for name, config in vit.PRESETS.items()
}


class Embedding(vit.ViT):
  """images (b, h, w, c) -> two equal streams (b, p, e), float32.

  The part of a ViT before its blocks.
  """

  @nn.compact
  def __call__(
    self, image: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    del train  # one rule for training and evaluation
    x = parts.to_streams(self._tokens(image), self.config.grid)
    return x, x


class Branch(nn.Module):
  """F of a coupling, x (b, p, e) -> (b, p, e), both float32.

  Those of all layers are equal, so that a pipeline compiles their code once.
  """

  config: RevViTConfig
  layer: str  # attention or feed_forward

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    c = self.config
    y = LAYERS[self.layer](c, name=self.layer)(layer_norm(c, "norm")(x))
    return branch_output(self, y, train)


class Output(nn.Module):
  """Two streams (b, p, e) -> logits (b, classes), float32."""

  config: RevViTConfig

  @nn.compact
  def __call__(
    self, streams: tuple[jax.Array, jax.Array], *, train: bool = False
  ) -> jax.Array:
    del train  # one rule for training and evaluation
    c, (x, r) = self.config, streams
    x = to_float32(layer_norm(c, "norm")((x + r) / 2)).mean(1)  # (b, e)
    names, dtypes = ("embed", "classes"), (c.dtype, c.param_dtype)
    zeros = nn.initializers.zeros
    x = Dense(c.classes, names, *dtypes, kernel_init=zeros, name="dense")(x)
    return to_float32(x)


class RevViT(nn.Module):
  """images (b, h, w, c) -> logits (b, classes), float32.

  Of the sizes of images that a `ViT` takes.
  """

  config: RevViTConfig

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
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    return parts.run(self, image, train)
