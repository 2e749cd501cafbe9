"""A multi-layer perceptron on flattened inputs.

With `mup` as in Thérien et al., 2024, https://arxiv.org/abs/2406.00153.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options
from distrain_jax.models.layers import Dense


class MLP(nn.Module):
  """x (b, ...) -> logits (b, classes), float32.

  Hidden layer k computes dropout(activation(x @ kernel + bias)) and names its
  units `hidden_k`; the output layer is linear.

  With `mup` its kernel starts at 0 and its result, bias included, is divided by
  the width of the last hidden layer, that of the whole network also where units
  are left out; all biases start from a standard normal distribution. The other
  kernels start at 1 / sqrt(fan in), in either parametrisation.
  """

  widths: tuple[int, ...] = (128, 128)  # of the hidden layers
  classes: int = 10
  activation: str = "relu"  # gelu, relu, silu, tanh
  dropout: float = 0.0  # fraction of hidden units zeroed; needs rngs: dropout
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"
  mup: bool = False  # for mulo, mup_adamw, mup_sgd: see `learned.mup_info`

  def __post_init__(self):
    object.__setattr__(self, "widths", tuple(self.widths))
    widths = {f"widths[{k}]": width for k, width in enumerate(self.widths)}
    options.check_positive("mlp", classes=self.classes, **widths)
    options.check_rate("mlp", dropout=self.dropout)
    options.pick("mlp: activation", self.activation, options.ACTIVATIONS)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("mlp", **dtypes)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    dtypes, name = (self.dtype, self.param_dtype), "inputs"
    zeros, normal = nn.initializers.zeros, nn.initializers.normal(1.0)
    own = {"bias_init": normal} if self.mup else {}
    for k, width in enumerate(self.widths):
      names = (name, f"hidden_{k}")
      x = Dense(width, names, *dtypes, **own, name=f"dense_{k}")(x)
      x = options.ACTIVATIONS[self.activation](x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
      name = names[1]
    if self.mup:
      own |= {"kernel_init": zeros, "divisor": (1, *self.widths)[-1]}
    names = (name, "classes")
    x = Dense(self.classes, names, *dtypes, **own, name="output")(x)
    return x.astype(jnp.float32)
