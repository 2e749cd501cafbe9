"""A chain of equal reversible blocks on flattened inputs.

Every block is a coupling of PETRA (Rivaud et al., 2024,
https://arxiv.org/abs/2406.02052), (x, r) -> (r + F(x), x), F a norm and an MLP
with one hidden layer: for pipelines of any depth, balanced, of one code.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.models import options, parts
from distrain_jax.models.layers import Dense
from distrain_jax.models.norms import layer_norm

Streams = tuple[jax.Array, jax.Array]


class Stem(nn.Module):
  """x (b, ...) -> two streams (b, width) of different features, float32."""

  width: int
  grid: float | None
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> Streams:
    del train  # one rule for training and evaluation
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    names, dtypes = ("inputs", "embed"), (self.dtype, self.param_dtype)
    x = Dense(2 * self.width, names, *dtypes, name="dense")(x)
    return parts.to_streams(tuple(jnp.split(x, 2, axis=-1)), self.grid)


class Branch(nn.Module):
  """F: x (b, width) -> dense(activation(dense(norm(x)))), float32.

  The number is a name alone: it leaves modules equal, and so able to share
  compiled code.
  """

  hidden: int
  activation: str
  dropout: float
  norm_eps: float
  dtype: str
  param_dtype: str
  number: int = dataclasses.field(compare=False)  # of its axis `hidden_k`

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    width, name = x.shape[-1], f"hidden_{self.number}"
    dtypes = (self.dtype, self.param_dtype)
    x = layer_norm(self, "norm")(x)
    x = Dense(self.hidden, ("embed", name), *dtypes, name="dense_0")(x)
    x = options.ACTIVATIONS[self.activation](x)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = Dense(width, (name, "embed"), *dtypes, name="dense_1")(x)
    return parts.to_streams(x, None)


class Head(nn.Module):
  """Two streams (b, width) -> logits (b, classes), float32."""

  classes: int
  norm_eps: float
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, streams: Streams, *, train: bool) -> jax.Array:
    del train  # one rule for training and evaluation
    x = layer_norm(self, "norm")(jnp.concatenate(streams, axis=-1))
    names, dtypes = ("embed", "classes"), (self.dtype, self.param_dtype)
    x = Dense(self.classes, names, *dtypes, name="output")(x)
    return x.astype(jnp.float32)


class RevMLP(nn.Module):
  """x (b, ...) -> logits (b, classes), float32."""

  width: int = 128  # of each of the two streams
  hidden: int = 128  # units of a block's hidden layer
  blocks: int = 4
  classes: int = 10
  activation: str = "gelu"  # gelu, relu, silu, tanh
  dropout: float = 0.0  # fraction of hidden units zeroed; needs rngs: dropout
  norm_eps: float = 1e-5
  # The streams and what is added to them are rounded to multiples of it, for
  # reconstruction without error; None: not. See stages.coupling.
  grid: float | None = None
  dtype: str = "float32"  # of the computation; streams are float32
  param_dtype: str = "float32"

  def __post_init__(self):
    sizes = ("width", "hidden", "blocks", "classes")
    options.check_positive("rev_mlp", **{n: getattr(self, n) for n in sizes})
    options.check_rate("rev_mlp", dropout=self.dropout)
    options.pick("rev_mlp: activation", self.activation, options.ACTIVATIONS)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options.check_dtypes("rev_mlp", **dtypes)
    parts.check_grid("rev_mlp", self.grid)
    super().__post_init__()

  @nn.nowrap
  def parts(self) -> tuple[parts.Part, ...]:
    """stem, block_0, block_1, ..., head."""
    dtypes = (self.dtype, self.param_dtype)
    last = (self.norm_eps, *dtypes)
    stem = Stem(self.width, self.grid, *dtypes)
    branch = lambda k: Branch(
      self.hidden, self.activation, self.dropout, *last, k
    )
    blocks = (
      parts.Part(f"block_{k}", branch(k), coupling=True, grid=self.grid)
      for k in range(self.blocks)
    )
    head = parts.Part("head", Head(self.classes, *last))
    return (parts.Part("stem", stem), *blocks, head)

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    return parts.run(self, x, train)
