"""Networks of other kinds than MLPs, to meta-train or to meta-test on.

In muP or in standard parametrisation, as `tasks.MLP`.

Letters in shapes: b images or rows of a batch, h height, w width, c channels,
t tokens of a row, d channels of the stream, k heads, v vocabulary.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.learned.meta.tasks import (
  Task,
  clipped,
  cross_entropy,
  normal,
  sampled,
)

Params = dict[str, Any]


class ConvNet(NamedTuple):
  """Two convolutions of 3 x 3 and stride 2, a mean over space, an output."""

  inputs: int  # channels of an image
  width: int
  classes: int
  mup: bool = True

  def init(self, key: jax.Array) -> Params:
    sizes = (self.inputs, self.width, self.width, self.classes)
    params = {}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
      kernel, bias = jax.random.split(jax.random.fold_in(key, i))
      last = i == 2
      shape = (a, b) if last else (3, 3, a, b)
      w = normal(kernel, shape, math.prod(shape[:-1]))
      params[f"w{i}"] = jnp.zeros_like(w) if self.mup and last else w
      drawn = jax.random.normal(bias, (b,))
      params[f"b{i}"] = drawn if self.mup else jnp.zeros(b)
    return params

  def apply(self, params: Params, x: jax.Array) -> jax.Array:
    """x (b, h, w, c) -> logits (b, classes)."""
    for i in range(2):
      x = jax.lax.conv_general_dilated(
        x,
        params[f"w{i}"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
      x = jax.nn.relu(x + params[f"b{i}"][None, None, None])
    x = x.mean((1, 2))
    logits = x @ params["w2"] + params["b2"][None]
    return logits / x.shape[1] if self.mup else logits

  def multipliers(self) -> Any:
    """muP's absolute multipliers; 1 in standard parametrisation."""
    if not self.mup:
      return 1.0
    ones = dict.fromkeys(["w0", "w1", "w2", "b0", "b1", "b2"], 1.0)
    return {**ones, "w1": 1 / (9 * self.width)}


def conv_task(
  data: Mapping[str, Any],
  width: int,
  *,
  name: str = "conv",
  batch_size: int = 128,
  mup: bool = True,
) -> Task:
  """A small convolutional network that classifies images.

  Args:
    data: {"x": (n, h, w, c), "y": (n,) integers}.
    width: channels of both convolutions.
    name: of the task.
    batch_size: images of a batch.
    mup: parametrisation and multipliers.

  Raises:
    ValueError: x that are no images.
  """
  if np.ndim(data["x"]) != 4:
    raise ValueError(
      "conv_task: `x` are images (n, height, width, channels); got shape "
      f"{np.shape(data['x'])}."
    )
  classes = int(np.max(data["y"])) + 1
  net = ConvNet(data["x"].shape[-1], width, classes, mup)

  def loss(params, batch, key):
    del key  # nothing random in the network
    return cross_entropy(net.apply(params, batch["x"]), batch["y"])

  return Task(
    name,
    net.init,
    loss,
    sampled(batch_size),
    dict(data),
    clipped(classes),
    net.multipliers(),
  )


class Decoder(NamedTuple):
  """A transformer that predicts the next token; norms come before branches.

  muP: attention logits are over the size of a head, not over its root; the
  output layer is zero at the start and its result over its fan in.
  """

  vocab: int
  length: int  # t
  embed: int  # d
  layers: int = 2
  heads: int = 2  # k
  mup: bool = True

  def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of every parameter: its shape, and how many leading axes are summed."""
    d, k = self.embed, self.heads
    found = {
      "embedding": ((self.vocab, d), 1),
      "position": ((self.length, d), 0),
    }
    for i in range(self.layers):
      for name in ("query", "key", "value"):
        found[f"{name}{i}"] = ((d, k, d // k), 1)
      found[f"out{i}"] = ((k, d // k, d), 2)
      found[f"up{i}"] = ((d, 4 * d), 1)
      found[f"down{i}"] = ((4 * d, d), 1)
      found[f"norm{i}"] = ((2, d), 0)
    return {**found, "last_norm": ((d,), 0), "output": ((d, self.vocab), 1)}

  def init(self, key: jax.Array) -> Params:
    params = {}
    for i, (name, (shape, summed)) in enumerate(self.shapes().items()):
      own = jax.random.fold_in(key, i)
      if "norm" in name:
        params[name] = jnp.ones(shape)
      elif name == "output" and self.mup:
        params[name] = jnp.zeros(shape)
      else:
        # Places have no fan in: as large as the tokens' vectors.
        fan_in = math.prod(shape[:summed]) if summed else self.vocab
        params[name] = normal(own, shape, fan_in)
    return params

  def attention_logits(self, q: jax.Array, k: jax.Array) -> jax.Array:
    """q, k (b, t, heads, size) -> (b, heads, t, t)."""
    size = q.shape[-1]
    scale = 1 / size if self.mup else 1 / math.sqrt(size)
    return jnp.einsum("bikd,bjkd->bkij", q, k) * scale

  def apply(self, params: Params, tokens: jax.Array) -> jax.Array:
    """tokens (b, t) -> logits (b, t, v)."""
    t = tokens.shape[1]
    past = jnp.tril(jnp.ones((t, t), bool))[None, None]
    x = params["embedding"][tokens] + params["position"][None, :t]
    for i in range(self.layers):
      norms = params[f"norm{i}"]
      y = _norm(x, norms[0])
      read = lambda name, y=y, i=i: jnp.einsum(
        "btd,dks->btks", y, params[f"{name}{i}"]
      )
      logits = self.attention_logits(read("query"), read("key"))
      weights = jax.nn.softmax(jnp.where(past, logits, -1e30))
      y = jnp.einsum("bkij,bjks->biks", weights, read("value"))
      x = x + jnp.einsum("btks,ksd->btd", y, params[f"out{i}"])
      y = _norm(x, norms[1]) @ params[f"up{i}"]
      x = x + jax.nn.relu(y) @ params[f"down{i}"]
    logits = _norm(x, params["last_norm"]) @ params["output"]
    return logits / self.embed if self.mup else logits

  def multipliers(self) -> Any:
    """muP's absolute multipliers; 1 in standard parametrisation."""
    if not self.mup:
      return 1.0
    hidden = ("query", "key", "value", "out", "up", "down")
    return {
      name: 1 / math.prod(shape[:summed])
      if name.rstrip("0123456789") in hidden
      else 1.0
      for name, (shape, summed) in self.shapes().items()
    }


def _norm(x, scale):
  """Over the root of the mean square, times a scale."""
  root = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  return x * root * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def text_task(
  text: Any,
  embed: int,
  *,
  vocab: int = 256,
  length: int = 32,
  layers: int = 2,
  heads: int = 2,
  name: str = "text",
  batch_size: int = 32,
  mup: bool = True,
) -> Task:
  """A small transformer that predicts the next token of one long text.

  Args:
    text: (n,) integers below `vocab`, such as bytes.
    embed: channels of the stream, a multiple of `heads`.
    vocab: v.
    length: tokens of a row.
    layers: blocks.
    heads: of attention.
    name: of the task.
    batch_size: rows of a batch, from random places.
    mup: parametrisation and multipliers.

  Raises:
    ValueError: a text shorter than a row, or heads that do not divide embed.
  """
  if np.ndim(text) != 1 or len(text) <= length + 1 or embed % heads:
    raise ValueError(
      "text_task: wanted one axis of more than length + 1 tokens, and embed a "
      f"multiple of heads; got shape {np.shape(text)}, length={length}, "
      f"embed={embed}, heads={heads}."
    )
  net = Decoder(vocab, length, embed, layers, heads, mup)

  def batch(data, key):
    starts = jax.random.randint(key, (batch_size,), 0, len(data) - length)
    rows = data[starts[:, None] + jnp.arange(length + 1)[None]]
    return rows.astype(jnp.int32)

  def loss(params, rows, key):
    del key  # no dropout
    logits = net.apply(params, rows[:, :-1])
    return cross_entropy(logits.reshape(-1, vocab), rows[:, 1:].ravel())

  multipliers = net.multipliers()
  return Task(name, net.init, loss, batch, text, clipped(vocab), multipliers)
