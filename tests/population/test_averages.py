"""Mixing with an average, and what a dtype can hold of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.population.averages import mix


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mixture_is_rounded_once(dtype):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=99), dtype) for _ in range(2))
  wide = 0.75 * np.asarray(x, np.float32) + 0.25 * np.asarray(y, np.float32)
  found = mix(x, y, 0.25)
  assert found.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(found, np.float32), wide, rtol=float(jnp.finfo(dtype).eps)
  )


def test_whole_numbers_stay():
  x = jnp.arange(3)
  np.testing.assert_array_equal(mix(x, x + 10, 0.9), x)


@pytest.mark.parametrize("weight", [1e-2, 1e-3])
def test_small_pulls_add_up_in_float32_and_are_lost_in_bfloat16(weight):
  """As the docstring warns; a fifth at 0.01, two at 0.001."""
  start, target = 1.25, 1.25 * (1 - 0.15)
  count, ends = 300, {}
  for dtype in ("float32", "bfloat16"):
    x, y = jnp.asarray([start], dtype), jnp.asarray([target], dtype)
    for _ in range(count):
      x = mix(x, y, weight)
    ends[dtype] = float(x[0])
  left = (1 - weight) ** count
  expected = target + left * (start - target)
  np.testing.assert_allclose(ends["float32"], expected, rtol=1e-4)
  assert ends["bfloat16"] == start
