"""A convolution's gradients: JAX's numbers, in a form that is fast in loops."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.models.convolution import convolve

pytestmark = pytest.mark.core
CHANNELS_LAST = "b01f_01io->b01f"


def make(size=3, height=7, width=6, dtype="float32"):
  rng = np.random.default_rng(0)
  f = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return f(2, height, width, 3), f(size, size, 3, 5)


def reference(x, kernel, stride):
  """The definition: a sum over the window's places."""
  size, pad = kernel.shape[0], kernel.shape[0] // 2
  b, h, w, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows, columns = (-(-n // stride) for n in (h, w))
  y = jnp.zeros((b, rows, columns, kernel.shape[-1]), x.dtype)
  for i in range(size):
    for j in range(size):
      part = padded[:, i : i + h : stride, j : j + w : stride]
      y = y + jnp.einsum("bhwi,io->bhwo", part, kernel[i, j])
  return y


def gradients(fn, x, kernel, stride):
  loss = lambda x, kernel: jnp.sin(fn(x, kernel, stride)).sum()
  return jax.value_and_grad(loss, (0, 1))(x, kernel)


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_values_and_gradients_are_the_definitions(size, stride):
  x, kernel = make(size)
  found = gradients(convolve, x, kernel, stride)
  expected = gradients(reference, x, kernel, stride)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    found,
    expected,
  )


def test_workers_have_kernels_of_their_own():
  x, kernel = make()
  xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
  found = jax.vmap(lambda x, k: gradients(convolve, x, k, 2))(xs, kernels)
  alone = [gradients(convolve, x, k, 2) for x, k in zip(xs, kernels)]
  jax.tree.map(
    lambda a, *b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    *alone,
  )


def test_bfloat16_stays_so():
  x, kernel = make(dtype="bfloat16")
  _, (dx, dkernel) = gradients(convolve, x, kernel, 2)
  assert dx.dtype == dkernel.dtype == jnp.bfloat16


def train(kernel, xs):
  def step(kernel, x):
    _, (_, dkernel) = gradients(convolve, x, kernel, 2)
    return kernel - 0.1 * dkernel, None

  return jax.lax.scan(step, kernel, xs)[0]


def test_in_a_loop_on_cpus_all_of_them_are_channels_last():
  x, kernel = make()
  program = jax.jit(train).lower(kernel, x[None]).compile().as_text()
  labels = re.findall(r" convolution\(.*dim_labels=([^,\s]+)", program)
  assert len(labels) == 2 and set(labels) == {CHANNELS_LAST}


def test_elsewhere_gradients_are_jaxs_own():
  x, kernel = make()

  def form(platform):
    shapes = jax.eval_shape(lambda: (kernel, x[None]))
    found = jax.export.export(jax.jit(train), platforms=[platform])(*shapes)
    return set(re.findall(r"dim_numbers = (\S+)", found.mlir_module()))

  assert len(form("cpu")) == 1
  assert len(form("tpu")) == len(form("cuda")) == 2
