"""Next-token losses whose logits never exist whole.

The logits of a batch, in float32, are often the largest array of a step, and
their gradient as large again. Here a scan makes those of a chunk of tokens at a
time. Where the loss is differentiated, the same iteration turns them into their
own gradient, and that into the gradients of what they are products of: nothing
is kept for the backward pass but these, and nothing is computed twice, as in
Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024,
https://arxiv.org/abs/2410.10989.

Letters in shapes: b sequences, t tokens, c of them a chunk, n chunks a
sequence, e embed, v vocab.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax


def logits(x: jax.Array, head: jax.Array) -> jax.Array:
  """x (..., e) @ head (e, v) -> (..., v), float32.

  Products in the arrays' dtype, their sums in float32: the loss takes
  exponentials.
  """
  return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def cross_entropy(z: jax.Array, labels: jax.Array) -> jax.Array:
  """-log softmax(z)[label], the shape of labels, in nats; NaN beyond z."""
  # No one-hot labels: they turn a label beyond the classes into a loss of 0.
  return optax.softmax_cross_entropy_with_integer_labels(z, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mean_cross_entropy(
  x: jax.Array, head: jax.Array, targets: jax.Array, chunk: int
) -> jax.Array:
  """`cross_entropy(logits(x, head), targets).mean()`, in chunks.

  Reverse-mode differentiation only, and once.

  Args:
    x: (b, t, e), what the output layer is applied to.
    head: (e, v), the output layer.
    targets: (b, t), whole numbers.
    chunk: c. The logits of b c tokens exist at once.

  Raises:
    ValueError: if t is not a multiple of a smaller c.
  """
  return token_losses(x, head, targets, chunk)[0].mean()


def token_losses(
  x: jax.Array, head: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Each token's loss, and whether the likeliest token is its target.

  Args:
    x, head, targets, chunk: as for `mean_cross_entropy`. Not to be
      differentiated: a backward pass would keep the logits of all chunks.

  Returns:
    (b, t), float32, and (b, t), bool.
  """

  def one(_, part):
    x, targets = part
    z = logits(x, head)
    return None, (cross_entropy(z, targets), z.argmax(-1) == targets)

  parts = _chunks(x, chunk), _chunks(targets, chunk)
  _, (losses, hits) = jax.lax.scan(one, None, parts)
  return _whole(losses), _whole(hits)


def _forward(x, head, targets, chunk):
  """The loss, and the gradients of the sum over tokens of their losses."""

  def one(dhead, part):
    x, targets = part
    z = logits(x, head)
    losses = cross_entropy(z, targets)
    dz = jax.nn.softmax(z) - jax.nn.one_hot(targets, z.shape[-1])
    dz = dz.astype(x.dtype)  # in [-1, 1]: it fits float16 too
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = dot("bcv,ev->bce", dz, head).astype(x.dtype)
    return dhead + dot("bce,bcv->ev", x, dz), (losses, dx)

  # In float32: one product over all tokens would sum so, too; in a narrower
  # dtype every chunk would add a rounding.
  start = jnp.zeros(head.shape, jnp.float32)
  parts = _chunks(x, chunk), _chunks(targets, chunk)
  dhead, (losses, dx) = jax.lax.scan(one, start, parts)
  if head.dtype != jnp.float16:  # which has no room for a sum over tokens
    dhead = dhead.astype(head.dtype)
  return losses.mean(), (_whole(dx), dhead, head[:0])


def _backward(chunk, kept, g):
  del chunk
  dx, dhead, like = kept
  scale = g / (dx.shape[0] * dx.shape[1])
  scaled = lambda d, dtype: (d * scale).astype(dtype)
  return scaled(dx, dx.dtype), scaled(dhead, like.dtype), None


mean_cross_entropy.defvjp(_forward, _backward)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
  """(b, t, ...) -> (n, b, c, ...)."""
  t = x.shape[1]
  chunk = min(chunk, t)
  if t % chunk:
    near = max(k for k in range(1, chunk) if t % k == 0)
    raise ValueError(
      f"logits_chunk={chunk} must divide the {t} tokens of a row; the nearest "
      f"below is {near} (in a config file: config.loss.logits_chunk)."
    )
  return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _whole(x: jax.Array) -> jax.Array:
  """(n, b, c, ...) -> (b, t, ...)."""
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def check(model: Any, logits_chunk: int | None) -> None:
  """Refuses a chunk that cannot be, or a model that has only whole logits.

  Raises:
    ValueError: with what the model would have to have.
  """
  whole = isinstance(logits_chunk, int) and not isinstance(logits_chunk, bool)
  if logits_chunk is not None and not (whole and logits_chunk >= 0):
    raise ValueError(
      "language_model: `logits_chunk` is how many tokens of a row have logits "
      "at once, a whole number above 0; 0 or None: all of them. Got "
      f"{logits_chunk!r}."
    )
  if logits_chunk and not callable(getattr(model, "hidden", None)):
    raise ValueError(
      f"language_model: logits_chunk={logits_chunk} makes the logits itself, "
      "but this model has no method `hidden(tokens, train=...) -> (x (batch, "
      "tokens, embed), head (embed, vocab))`, whose product they are: "
      f"{type(model).__name__}. Write one, or leave logits_chunk unset."
    )
