"""Layers whose sizes come from the parameters that they are applied to.

A Flax layer declares its features and refuses parameters of another shape.
Ours declare them for `init` only: `apply` follows the arrays it is given, so
that a subnetwork (fewer hidden units, heads, channels or layers, gathered from
the arrays) runs through the module of the whole network.

Letters in shapes: b images, h height, w width, i features in, o features out.
"""

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from distrain_jax.models.convolution import convolve
from distrain_jax.models.options import DTYPES

Initializer = Callable[..., jax.Array]
# Features are the last axis of a kernel, as wide as it is at initialisation.
FAN_OUT_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# Within 1 / sqrt(fan in): what PyTorch's layers start from.
FAN_IN_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# A hidden layer's in muP: what it computes is as large at any width.
FAN_IN_NORMAL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@flax.struct.dataclass
class Writer(nn.LogicallyPartitioned):
  """Names of a parameter by which a residual branch's output is linear.

  All writers of a branch times s: its output times s.
  """


def parameter(
  module: nn.Module,
  name: str,
  init_fn: Initializer,
  shape: tuple[int, ...],
  names: tuple[str, ...],
  dtype: str = "float32",
  writer: bool = False,
) -> jax.Array:
  """`module`'s parameter, in the shape that it has.

  Args:
    module: the module that owns it, inside its compact `__call__`.
    name: its key among the module's parameters.
    init_fn: `(key, shape, dtype) -> array`.
    shape: the shape at initialisation. Given parameters may have another.
    names: one logical axis name (`distrain_jax.models.names`) an axis.
    dtype: the dtype at initialisation.
    writer: whether it is a `Writer`.
  """
  # `Module.param` compares shapes with the declared ones; this does not.
  if module.has_variable("params", name):
    return nn.meta.unbox(module.get_variable("params", name))
  box = Writer if writer else nn.LogicallyPartitioned
  boxed = lambda *args: box(init_fn(*args), names)
  return module.param(name, boxed, shape, DTYPES[dtype])


def is_given(module: nn.Module, name: str) -> bool:
  """Whether there are parameters for `module`'s child: always in `init`.

  A residual block without any is left out.
  """
  if module.is_initializing():
    return True
  return bool(module.variables.get("params", {}).get(name))


def computing(config, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays in the dtype of the computation, `config.dtype`."""
  return tuple(a.astype(DTYPES[config.dtype]) for a in arrays)


def stochastic_depth(
  module: nn.Module, rate: float, train: bool
) -> Callable[[jax.Array], jax.Array]:
  """What all branches of a residual block are passed through.

  In training, either all of them are dropped, with probability `rate`, or all
  are divided by 1 - rate: one draw of the stream `dropout` for the whole batch
  that the module is applied to, so that it is as if the block were not there.
  The branches are computed all the same.

  Huang et al., 2016, https://arxiv.org/abs/1603.09382, with one rate for all
  blocks, and scaled in training rather than in evaluation.
  """
  if rate == 0 or not train:
    return lambda y: y
  kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate)
  return lambda y: jnp.where(kept, y / (1 - rate), jnp.zeros_like(y))


def stacked(module: nn.Module, block, length: int):
  """`block` scanned over parameters stacked along a leading axis `layers`.

  Args:
    module: that calls it; its given parameters `blocks` decide the depth.
    block: a module of which a call is (x, None) -> (x, None).
    length: the depth at initialisation.
  """
  if not module.is_initializing():
    given = module.variables.get("params", {}).get("blocks", {})
    length = next((a.shape[0] for a in jax.tree.leaves(given)), length)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    length=length,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )


class Dense(nn.Module):
  """x (..., i) -> (x @ kernel + bias) / divisor (..., o), in `dtype`."""

  features: int
  names: tuple[str, str]  # of the input and output axes
  dtype: str = "float32"
  param_dtype: str = "float32"
  kernel_init: Initializer = nn.initializers.lecun_normal()
  bias_init: Initializer = nn.initializers.zeros
  # Fan in of an output layer that is in muP. As in the muLO authors' models it
  # divides the bias, too, which on wide networks then hardly matters.
  divisor: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = parameter(
      self,
      "kernel",
      self.kernel_init,
      (x.shape[-1], self.features),
      self.names,
      self.param_dtype,
    )
    bias = parameter(
      self,
      "bias",
      self.bias_init,
      (self.features,),
      self.names[1:],
      self.param_dtype,
    )
    x, kernel, bias = (a.astype(DTYPES[self.dtype]) for a in (x, kernel, bias))
    y = x @ kernel
    y = y + along_channels(bias, y)
    return y if self.divisor == 1 else y / self.divisor


class Conv(nn.Module):
  """A square convolution, padded by (size - 1) / 2.

  x (b, h, w, i) -> (b, ceil(h / stride), ceil(w / stride), o), in `dtype`.
  Padded alike on both sides, unlike `SAME`, where the stride is 2. Without
  forward-mode derivatives; see `convolution`.
  """

  features: int
  size: int
  names: tuple[str, str]  # of the input and output channels
  stride: int = 1
  dtype: str = "float32"
  param_dtype: str = "float32"
  bias: bool = False
  kernel_init: Initializer = FAN_OUT_NORMAL

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = parameter(
      self,
      "kernel",
      self.kernel_init,
      (self.size, self.size, x.shape[-1], self.features),
      ("spatial_0", "spatial_1", *self.names),
      self.param_dtype,
    )
    dtype = DTYPES[self.dtype]
    y = convolve(x.astype(dtype), kernel.astype(dtype), self.stride)
    if not self.bias:
      return y
    zeros, names = nn.initializers.zeros, self.names[1:]
    shape = (self.features,)
    bias = parameter(self, "bias", zeros, shape, names, self.param_dtype)
    return y + along_channels(bias.astype(dtype), y)


def along_channels(a: jax.Array, like: jax.Array) -> jax.Array:
  """a (c,) with the axes of length 1 that make it broadcast against (..., c).

  Said, not left to rank promotion, which callers may forbid.
  """
  return a.reshape((1,) * (like.ndim - 1) + (-1,))


def to_float32(x: jax.Array) -> jax.Array:
  """Normalisation is computed in float32, whatever the rest is computed in."""
  return x.astype(jnp.float32)
