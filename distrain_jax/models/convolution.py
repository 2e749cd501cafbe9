"""A convolution whose gradients are fast inside loops on CPUs too.

XLA calls its fast convolution on CPUs only for channels-last operands, and
rewrites others to that form at the top level of a program, not in the body of
a loop (https://github.com/jax-ml/jax/issues/12868). JAX's gradients of a
convolution have another form, so that every scan over micro-batches, ticks or
layers ran them some twenty times slower. Here they are written channels last
from the start; elsewhere they are JAX's own. The price is forward mode
(`jax.jvp`), which a function with a gradient of its own does not have.
"""

import functools

import jax
import jax.numpy as jnp

_LAST = ("NHWC", "HWIO", "NHWC")


def _plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Padded by (size - 1) / 2 on all sides; without forward-mode derivatives.

  Args:
    x: (b, h, w, i).
    kernel: (size, size, i, o), in x's dtype; the size is odd.
    stride: of both axes.

  Returns:
    (b, ceil(h / stride), ceil(w / stride), o), in that dtype.
  """
  pad = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    dimension_numbers=_LAST,
  )


convolve = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _forward(x, kernel, stride):
  return convolve(x, kernel, stride), (x, kernel)


def _backward(stride, operands, dy):
  return jax.lax.platform_dependent(
    *operands,
    dy,
    cpu=functools.partial(_channels_last, stride),
    default=functools.partial(_own, stride),
  )


convolve.defvjp(_forward, _backward)


def _own(stride, x, kernel, dy):
  """Both gradients as JAX has them."""
  return jax.vjp(lambda x, kernel: _plain(x, kernel, stride), x, kernel)[1](dy)


def _channels_last(stride, x, kernel, dy):
  """Both gradients as convolutions over channels-last operands."""
  size, pad = kernel.shape[0], kernel.shape[0] // 2
  # Rows and columns at the end that no window reaches.
  unread = [(n + 2 * pad - size) % stride for n in x.shape[1:3]]
  strides, ones = (stride, stride), (1, 1)
  around = size - 1 - pad
  dx = jax.lax.conv_general_dilated(
    dy,
    jnp.swapaxes(kernel[::-1, ::-1], 2, 3),
    ones,
    [(around, around + n) for n in unread],
    lhs_dilation=strides,
    dimension_numbers=_LAST,
  )
  # Input channels are the rows of this one, the batch is what is summed over.
  dkernel = jax.lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    dy.transpose(1, 2, 0, 3),
    ones,
    [(pad, pad - n) for n in unread],
    rhs_dilation=strides,
    dimension_numbers=_LAST,
  )
  return dx, dkernel.transpose(1, 2, 0, 3)
