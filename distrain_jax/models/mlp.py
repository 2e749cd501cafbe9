"""A multi-layer perceptron on flattened inputs."""

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
  """

  widths: tuple[int, ...] = (128, 128)  # of the hidden layers
  classes: int = 10
  activation: str = "relu"  # gelu, relu, silu, tanh
  dropout: float = 0.0  # fraction of hidden units zeroed; needs rngs: dropout
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"

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
    for k, width in enumerate(self.widths):
      names = (name, f"hidden_{k}")
      x = Dense(width, names, *dtypes, name=f"dense_{k}")(x)
      x = options.ACTIVATIONS[self.activation](x)
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
      name = names[1]
    x = Dense(self.classes, (name, "classes"), *dtypes, name="output")(x)
    return x.astype(jnp.float32)
