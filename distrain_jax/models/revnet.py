"""Residual networks that can be run backwards: two streams instead of one.

Those of PETRA (Rivaud et al., 2024, https://arxiv.org/abs/2406.02052), after
Gomez et al., 2017, https://arxiv.org/abs/1707.04585: a residual block is the
coupling (x, r) -> (r + F(x), x), each stream as wide as a ResNet's, F a ResNet's
branch with a relu at its end and none after the sum. Blocks that change the
shape are not reversible, unless `invertible_downsampling`, which is ours.

Not the authors': biases start at zero (most precede a batch norm, which takes
them out), and there is no start of F's last scale at zero: the relu behind it
would then stop every gradient to F, for good.

Letters in shapes: b images, h height, w width, c channels.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options, parts
from distrain_jax.models.layers import FAN_IN_UNIFORM, Conv, Dense
from distrain_jax.models.norms import BatchNorm

STEMS = {
  "cifar": "3x3 convolution, stride 1",
  "imagenet": "7x7 convolution, stride 2, then 2x2 max-pool, stride 2",
}
Streams = tuple[jax.Array, jax.Array]


class Settings(NamedTuple):
  """What all parts share."""

  momentum: float  # of BatchNorm's running statistics
  grid: float | None
  dtype: str
  param_dtype: str


class ConvNorm(nn.Module):
  """x (b, h, w, i) -> the batch norm of its convolution, (b, h', w', o)."""

  features: int
  size: int
  names: tuple[str, str]  # of the input and output channels
  settings: Settings
  stride: int = 1
  writer: bool = False  # whether F ends here: layers.Writer

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    c = self.settings
    sizes = (self.features, self.size, self.names, self.stride)
    dtypes = (c.dtype, c.param_dtype)
    x = Conv(*sizes, *dtypes, True, FAN_IN_UNIFORM, name="conv")(x)
    own = {"param_dtype": c.param_dtype, "writer": self.writer}
    return BatchNorm(self.names[1], c.momentum, **own, name="norm")(x, train)


def pack(x: jax.Array, times: int) -> jax.Array:
  """x (b, h, w, c) -> (b, h / 2, w / 2, 4 c), each 2x2 square a pixel; again.

  >>> x = jnp.arange(32.0).reshape(1, 4, 4, 2)
  >>> pack(x, 2).shape, (unpack(pack(x, 2), 2) == x).all().item()
  ((1, 1, 1, 32), True)
  """
  for _ in range(times):
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, h // 2, w // 2, 4 * c)
  return x


def unpack(x: jax.Array, times: int) -> jax.Array:
  """The inverse of `pack`."""
  for _ in range(times):
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, 2 * h, 2 * w, c // 4)
  return x


class Stem(nn.Module):
  """Images (b, h, w, c) -> two streams of different channels."""

  channels: int  # of a stream, before it is packed
  stem: str
  settings: Settings
  packed: int = 0  # see Branch

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> Streams:
    size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
    names = ("image_channels", "conv_out")
    layer = ConvNorm(
      2 * self.channels, size, names, self.settings, stride, name="layer"
    )
    x = nn.relu(layer(x, train))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (2, 2), (2, 2))
    self._check_size(*x.shape[1:3])
    x, r = jnp.split(x, 2, axis=-1)
    x, r = (pack(a, self.packed) for a in (x, r))
    return parts.to_streams((x, r), self.settings.grid)

  def _check_size(self, h: int, w: int) -> None:
    square = 2**self.packed
    if h % square or w % square:
      raise ValueError(
        f"revnet: invertible_downsampling makes {square}x{square} squares of "
        f"what the stem returns into pixels, but that is {h}x{w}. Take images "
        f"of a multiple of {square * (1 if self.stem == 'cifar' else 4)}."
      )


class Branch(nn.Module):
  """F: x (b, h, w, c) -> (b, h', w', outer), float32.

  Convolutions 3x3, 3x3, or as a bottleneck 1x1, 3x3, 1x1, each with batch norm
  and relu. The channels between them are named `inner_k`, numbered through the
  network. The numbers are names alone: they leave modules equal, and so able to
  share compiled code.
  """

  inner: int  # channels inside
  outer: int  # channels of the result
  bottleneck: bool
  settings: Settings
  first: int = dataclasses.field(compare=False)  # k of the first inner channels
  stride: int = 1
  packed: int = 0  # times that squares were made pixels beyond what F reads

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    sizes = (1, 3, 1) if self.bottleneck else (3, 3)
    strided = sizes.index(3)
    x, name, last = unpack(x, self.packed), "conv_in", len(sizes) - 1
    for k, size in enumerate(sizes):
      names = (name, f"inner_{self.first + k}" if k < last else "conv_out")
      layer = ConvNorm(
        self.inner if k < last else self.outer,
        size,
        names,
        self.settings,
        self.stride if k == strided else 1,
        writer=k == last,
        name=f"layer_{k}",
      )
      x, name = nn.relu(layer(x, train)), names[1]
    return parts.to_streams(pack(x, self.packed), None)


class BasicChange(nn.Module):
  """(x, r) -> (F(x) + shortcut(r), h), where F's inner channels are h.

  The second stream takes the relu's result, and has no shortcut of its own.
  """

  channels: int  # of each stream of the result
  stride: int
  settings: Settings

  @nn.compact
  def __call__(self, streams: Streams, *, train: bool) -> Streams:
    (x, r), c = streams, self.settings
    # No `inner`: h is a stream too.
    sizes = (self.channels, 3, ("conv_in", "conv_out"), c)
    h = nn.relu(ConvNorm(*sizes, self.stride, name="layer_0")(x, train))
    y = nn.relu(ConvNorm(*sizes, writer=True, name="layer_1")(h, train))
    sizes = (self.channels, 1, ("conv_in", "conv_out"), c, self.stride)
    r = ConvNorm(*sizes, name="shortcut_1")(r, train)
    return parts.to_streams((y + r, h), c.grid)


class BottleneckChange(nn.Module):
  """(x, r) -> (F(x) + shortcut_1(r), shortcut_0(x)).

  A shortcut is a strided 1x1 convolution and batch norm. Only with one on both
  streams are there as many parameters as the authors state.
  """

  inner: int  # as Branch
  outer: int
  stride: int
  settings: Settings
  first: int = dataclasses.field(compare=False)

  @nn.compact
  def __call__(self, streams: Streams, *, train: bool) -> Streams:
    (x, r), c = streams, self.settings
    y = Branch(
      self.inner, self.outer, True, c, self.first, self.stride, name="branch"
    )(x, train=train)
    sizes = (self.outer, 1, ("conv_in", "conv_out"), c, self.stride)
    x = ConvNorm(*sizes, name="shortcut_0")(x, train)
    r = ConvNorm(*sizes, name="shortcut_1")(r, train)
    return parts.to_streams((y + r, x), c.grid)


class Head(nn.Module):
  """Two streams -> logits (b, classes), float32, of their mean pixel."""

  classes: int
  settings: Settings

  @nn.compact
  def __call__(self, streams: Streams, *, train: bool) -> jax.Array:
    del train  # one rule for training and evaluation
    c = self.settings
    x = jnp.concatenate(streams, axis=-1).mean((1, 2))  # (b, 2 c)
    names = ("conv_in", "classes")
    dtypes = (c.dtype, c.param_dtype)
    layer = Dense(self.classes, names, *dtypes, FAN_IN_UNIFORM, name="output")
    return layer(x).astype(jnp.float32)


class RevNet(nn.Module):
  """x (b, h, w, c) -> logits (b, classes), float32.

  Running statistics live in the collection `batch_stats`, as a ResNet's.

  With `invertible_downsampling`, only the stem and the head are not reversible:
  2x2 squares become pixels of 4 times the channels. So a stream has 64, 256,
  1024, 4096 channels in the four stages, bottleneck or not (otherwise 64 to 512,
  or 256 to 2048); F's inner ones stay 64 to 512. A stream is always held as in
  the last stage, of one shape throughout, and unpacked for each F. For CIFAR-10
  a RevNet-50 then has 27,499,978 parameters, but a RevNet-18 86,385,930, for
  lack of 1x1 convolutions.
  """

  stages: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks a stage
  bottleneck: bool = False
  classes: int = 10
  stem: str = "cifar"  # cifar, imagenet
  width: float = 1.0  # of all channels; 1: 64 a stream in the first stage
  momentum: float = 0.9  # of BatchNorm's running statistics
  invertible_downsampling: bool = False
  # The streams and what is added to them are rounded to multiples of it, for
  # reconstruction without error; None: not. See stages.coupling.
  grid: float | None = None
  dtype: str = "float32"  # of the computation; streams are float32
  param_dtype: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "stages", tuple(self.stages))
    stages = {f"stages[{k}]": count for k, count in enumerate(self.stages)}
    options.check_positive("revnet", classes=self.classes, **stages)
    options.check_rate("revnet", momentum=self.momentum)
    options.pick("revnet: stem", self.stem, STEMS)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("revnet", **dtypes)
    parts.check_grid("revnet", self.grid)
    if round(64 * self.width) < 1:
      raise ValueError(
        f"revnet: `width` multiplies 64 channels; {self.width!r} leaves none."
      )
    super().__post_init__()

  @nn.nowrap
  def parts(self) -> tuple[parts.Part, ...]:
    """stem, stage_0_block_0, stage_0_block_1, ..., head."""
    c = Settings(self.momentum, self.grid, self.dtype, self.param_dtype)
    channels = round(64 * self.width)
    deepest = len(self.stages) - 1 if self.invertible_downsampling else 0
    first = Stem(channels, self.stem, c, max(deepest, 0))
    blocks, last = [], channels
    for stage, count in enumerate(self.stages):
      inner = channels * 2**stage
      outer = inner * 4 if self.bottleneck else inner
      if self.invertible_downsampling:
        last = outer = channels * 4**stage
      packed = max(deepest - stage, 0)
      for k in range(count):
        name = f"stage_{stage}_block_{k}"
        number = len(blocks) * (2 if self.bottleneck else 1)
        stride = 2 if stage > 0 and k == 0 else 1
        if last == outer:
          module = Branch(inner, outer, self.bottleneck, c, number, 1, packed)
        elif self.bottleneck:
          module = BottleneckChange(inner, outer, stride, c, number)
        else:
          module = BasicChange(outer, stride, c)
        blocks.append(parts.Part(name, module, last == outer, self.grid))
        last = outer
    return (
      parts.Part("stem", first),
      *blocks,
      parts.Part("head", Head(self.classes, c)),
    )

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    return parts.run(self, x, train)
