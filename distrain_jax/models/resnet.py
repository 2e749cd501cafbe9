"""Residual networks for small images and for ImageNet.

He et al., 2015, https://arxiv.org/abs/1512.03385, with the stride of a
bottleneck in its 3x3 convolution and projections where shapes change.

Letters in shapes: b images, h height, w width, c channels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options
from distrain_jax.models.layers import (
  FAN_IN_NORMAL,
  Conv,
  Dense,
  Initializer,
  is_given,
  stochastic_depth,
)
from distrain_jax.models.norms import BatchNorm, GroupNorm

STEMS = {
  "cifar": "3x3 convolution, stride 1",
  "imagenet": "7x7 convolution, stride 2, then 3x3 max-pool, stride 2",
}
NORMS = {"batch": BatchNorm, "group": GroupNorm}
ONES = nn.initializers.ones


class Block(nn.Module):
  """x (b, h, w, c) -> relu(shortcut(x) + branch(x)), (b, h', w', c').

  The branch is conv 3x3, conv 3x3, or as a bottleneck 1x1, 3x3, 1x1, with a
  norm after each convolution and a relu between. Its own channels are named
  `inner_k`, numbered through the network: they can be sub-sampled, the stream
  cannot.
  """

  inner: int  # channels inside
  outer: int  # channels of the result
  bottleneck: bool
  stride: int
  first: int  # k of the channels after the first convolution
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  last_scale_init: Initializer
  dropout: float
  stochastic_depth: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    sizes = (1, 3, 1) if self.bottleneck else (3, 3)
    strided = sizes.index(3)
    y, name, last = x, "conv_in", len(sizes) - 1
    for k, size in enumerate(sizes):
      names = (name, f"inner_{self.first + k}" if k < last else "conv_out")
      features = self.inner if k < last else self.outer
      stride = self.stride if k == strided else 1
      y = self.conv(features, size, names, stride, name=f"conv_{k}")(y)
      init = ONES if k < last else self.last_scale_init
      norm = functools.partial(self.norm, scale_init=init, writer=k == last)
      y = norm(names[1], name=f"norm_{k}")(y, train)
      y = nn.relu(y) if k < last else y
      if k == 0:
        # Whole channels: the places of one share what they say.
        drop = nn.Dropout(self.dropout, (1, 2), deterministic=not train)
        y = drop(y)
      name = names[1]
    if x.shape != y.shape:
      names = ("conv_in", "conv_out")
      x = self.conv(self.outer, 1, names, self.stride, name="projection")(x)
      x = self.norm("conv_out", name="projection_norm")(x, train)
    return nn.relu(x + stochastic_depth(self, self.stochastic_depth, train)(y))


class Place(NamedTuple):
  """A block's in the network."""

  name: str
  inner: int
  outer: int
  stride: int
  first: int
  keeps: bool  # the shape

  def check_left_out(self) -> None:
    """Refuses to leave out what the next block cannot do without."""
    if not self.keeps:
      raise ValueError(
        f"resnet: the parameters have no {self.name!r}, which changes the "
        "shape: the blocks after it need its result. Only the blocks of "
        "models.blocks(model, example) can be left out."
      )


class ResNet(nn.Module):
  """x (b, h, w, c) -> logits (b, classes), float32.

  A block without parameters is left out; it must be one that keeps the shape.

  With `mup` convolutions start at 1 / sqrt(fan in), the output layer at 0; its
  result, bias included, is divided by the channels that it reads. Norms start
  as they do without.

  With `norm="batch"` the running statistics live in the collection
  `batch_stats`: apply with `train=True, mutable=["batch_stats"]` to update
  them, and to normalise by the batch.
  """

  stages: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks a stage
  bottleneck: bool = False
  classes: int = 10
  stem: str = "cifar"  # cifar, imagenet
  width: float = 1.0  # of all channels; 1: 64 in the first stage
  norm: str = "batch"  # batch, group
  group_size: int = 16  # channels a group, for norm="group"
  momentum: float = 0.9  # of BatchNorm's running statistics
  axis_name: str | None = None  # workers whose batches BatchNorm takes as one
  # Every branch starts as zero: https://arxiv.org/abs/1706.02677, section 5.1.
  zero_last_scale: bool = True
  dropout: float = 0.0  # of a branch's first channels; needs rngs: dropout
  # Of dropping a block's branch; the shortcut stays. Needs rngs: dropout.
  stochastic_depth: float = 0.0
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"
  mup: bool = False  # for mulo, mup_adamw, mup_sgd: see `learned.mup_info`

  def __post_init__(self):
    object.__setattr__(self, "stages", tuple(self.stages))
    stages = {f"stages[{k}]": count for k, count in enumerate(self.stages)}
    sizes = {"classes": self.classes, "group_size": self.group_size}
    options.check_positive("resnet", **sizes, **stages)
    rates = ("momentum", "dropout", "stochastic_depth")
    options.check_rate("resnet", **{n: getattr(self, n) for n in rates})
    options.pick("resnet: stem", self.stem, STEMS)
    options.pick("resnet: norm", self.norm, NORMS)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("resnet", **dtypes)
    if round(64 * self.width) < 1:
      raise ValueError(
        f"resnet: `width` multiplies 64 channels; {self.width!r} leaves none."
      )
    if self.axis_name is not None and self.norm != "batch":
      raise ValueError(
        f"resnet: axis_name={self.axis_name!r} synchronises BatchNorm over "
        f"workers, but norm={self.norm!r}. Set norm='batch' or axis_name=None."
      )
    super().__post_init__()

  def _layers(self):
    """The convolution and norm of this network, to be made many times."""
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    own = {"batch": ("momentum", "axis_name"), "group": ()}[self.norm]
    settings = {name: getattr(self, name) for name in own}
    if self.norm == "group":
      settings["size"] = self.group_size
    settings["param_dtype"] = self.param_dtype
    norm = functools.partial(NORMS[self.norm], **settings)
    start = {"kernel_init": FAN_IN_NORMAL} if self.mup else {}
    return functools.partial(Conv, **dtypes, **start), norm

  @nn.nowrap
  def _places(self) -> list[Place]:
    """The blocks, in order."""
    places, channels = [], round(64 * self.width)
    last, inners = channels, 2 if self.bottleneck else 1
    for stage, count in enumerate(self.stages):
      inner = channels * 2**stage
      outer = inner * 4 if self.bottleneck else inner
      for k in range(count):
        stride = 2 if stage > 0 and k == 0 else 1
        name, first = f"stage_{stage}_block_{k}", inners * len(places)
        keeps = stride == 1 and last == outer
        places.append(Place(name, inner, outer, stride, first, keeps))
        last = outer
    return places

  @nn.nowrap
  def optional_blocks(self) -> tuple[str, ...]:
    """The blocks that can be left out: they keep the shape."""
    return tuple(place.name for place in self._places() if place.keeps)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    conv, norm = self._layers()
    channels, names = round(64 * self.width), ("image_channels", "conv_out")
    size, stride = (3, 1) if self.stem == "cifar" else (7, 2)
    x = conv(channels, size, names, stride, name="stem")(x)
    x = nn.relu(norm("conv_out", name="stem_norm")(x, train))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    zeros, last = nn.initializers.zeros, channels
    init = zeros if self.zero_last_scale else ONES
    for place in self._places():
      last = place.outer
      if not is_given(self, place.name):
        place.check_left_out()
        continue
      x = Block(
        place.inner,
        place.outer,
        self.bottleneck,
        place.stride,
        place.first,
        conv,
        norm,
        init,
        self.dropout,
        self.stochastic_depth,
        name=place.name,
      )(x, train=train)
    x = x.mean((1, 2))  # (b, c)
    names, dtypes = ("conv_in", "classes"), (self.dtype, self.param_dtype)
    start = {"kernel_init": zeros, "divisor": last} if self.mup else {}
    x = Dense(self.classes, names, *dtypes, **start, name="output")(x)
    return x.astype(jnp.float32)
