"""Normalisation over the channels that are there: batch, group, RMS, layer.

Statistics, scale and bias are float32 inside; the result has the input's dtype.
Letters in shapes: b images, h height, w width, c channels, g groups.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models.layers import (
  Initializer,
  along_channels,
  parameter,
  to_float32,
)
from distrain_jax.models.options import DTYPES


def _scale_and_bias(module, x):
  """The layer's scale and bias, (1, 1, 1, c) each, in float32."""
  names, dtype = (module.name_of_channels,), module.param_dtype

  def one(name, init_fn):
    shape = x.shape[-1:]
    a = parameter(module, name, init_fn, shape, names, dtype, module.writer)
    return along_channels(to_float32(a), x)

  return one("scale", module.scale_init), one("bias", nn.initializers.zeros)


class BatchNorm(nn.Module):
  """Normalises x (b, h, w, c) by the mean and variance of each channel.

  In training: of this batch, or with `axis_name` of the batches of all workers
  on that named axis (two all-reduces of c numbers). The running averages in the
  collection `batch_stats`, used otherwise, follow as
  `momentum * old + (1 - momentum) * new`, with the biased variance.

  Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167.
  """

  name_of_channels: str
  momentum: float = 0.9
  eps: float = 1e-5
  axis_name: str | None = None
  scale_init: Initializer = nn.initializers.ones
  param_dtype: str = "float32"
  writer: bool = False  # whether a residual branch ends here: layers.Writer

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    scale, bias = _scale_and_bias(self, x)
    running_mean = self._running("mean", nn.initializers.zeros, x.shape[-1])
    running_var = self._running("var", nn.initializers.ones, x.shape[-1])
    y = to_float32(x)
    if not train:
      mean, var = running_mean.value, running_var.value
    else:
      mean, var = self._statistics(y)
      if not self.is_initializing():
        keep = self.momentum
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        running_var.value = keep * running_var.value + (1 - keep) * var
    mean, var = along_channels(mean, y), along_channels(var, y)
    y = (y - mean) * (scale * jax.lax.rsqrt(var + self.eps)) + bias
    return y.astype(x.dtype)

  def _running(self, what: str, init_fn: Initializer, channels: int):
    init_fn = nn.with_logical_partitioning(init_fn, (self.name_of_channels,))
    # Without a key: the initial statistics are constants.
    create = lambda: init_fn(None, (channels,), jnp.float32)
    return self.variable("batch_stats", what, create)

  def _statistics(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Around the mean of all workers, because the mean of squares less the
    # square of the mean cancels where the mean is large.
    mean = self._across(y.mean((0, 1, 2)))
    centred = y - along_channels(mean, y)
    return mean, self._across(jnp.square(centred).mean((0, 1, 2)))

  def _across(self, statistic: jax.Array) -> jax.Array:
    # `init` runs outside of the named axis.
    if self.axis_name is None or self.is_initializing():
      return statistic
    return jax.lax.pmean(statistic, self.axis_name)


class GroupNorm(nn.Module):
  """Normalises x (b, h, w, c) by the statistics of groups of channels.

  The groups are `size` neighbouring channels, not a number of groups: taking
  whole groups away leaves the statistics of the others as they were. Where
  `size` does not divide c, the largest common divisor of both takes its place.

  Wu and He, 2018, https://arxiv.org/abs/1803.08494.
  """

  name_of_channels: str
  size: int = 16
  eps: float = 1e-5
  scale_init: Initializer = nn.initializers.ones
  param_dtype: str = "float32"
  writer: bool = False  # whether a residual branch ends here: layers.Writer

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    del train  # one rule for training and evaluation
    scale, bias = _scale_and_bias(self, x)
    b, h, w, c = x.shape
    size = math.gcd(self.size, c)
    y = to_float32(x).reshape(b, h, w, c // size, size)  # (b, h, w, g, size)
    mean = y.mean((1, 2, 4), keepdims=True)  # (b, 1, 1, g, 1)
    var = jnp.square(y - mean).mean((1, 2, 4), keepdims=True)
    y = (y - mean) * jax.lax.rsqrt(var + self.eps)
    return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
  """x (..., c) -> scale * x / sqrt(mean of squares + eps).

  Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.
  """

  name_of_channels: str
  eps: float = 1e-5
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = parameter(
      self,
      "scale",
      nn.initializers.ones,
      x.shape[-1:],
      (self.name_of_channels,),
      self.param_dtype,
    )
    y = to_float32(x)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * along_channels(to_float32(scale), y)).astype(x.dtype)


def layer_norm(config, name: str) -> nn.LayerNorm:
  """x (..., embed) -> scale * (x - mean) / sqrt(variance + eps) + bias.

  Flax's layer with our axis names, of which the result has the dtype of the
  computation. Ba et al., 2016, https://arxiv.org/abs/1607.06450.

  Args:
    config: a transformer's, of which `norm_eps`, `dtype` and `param_dtype`.
    name: the layer's key among the parameters of the module that calls.
  """
  boxed = lambda init: nn.with_logical_partitioning(init, ("embed",))
  return nn.LayerNorm(
    config.norm_eps,
    dtype=DTYPES[config.dtype],
    param_dtype=DTYPES[config.param_dtype],
    scale_init=boxed(nn.initializers.ones),
    bias_init=boxed(nn.initializers.zeros),
    # E[x^2] - E[x]^2 cancels where the mean is large.
    use_fast_variance=False,
    name=name,
  )
