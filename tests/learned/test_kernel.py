"""The TPU's kernel: interpreted, it is the XLA form; it compiles for a v5e."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from distrain_jax import learned
from distrain_jax.inspect import topologies
from distrain_jax.learned import kernel, tiles
from distrain_jax.learned.moments import init_moments, next_moments

OPTIONS = {"exp_mult": 0.001, "feature_eps": 1e-5, "precision": "highest"}


# Rows and columns that blocks do not divide; either of the two the larger.
@pytest.mark.parametrize(
  "shape", [(19, 150), pytest.param((140, 130), marks=pytest.mark.full)]
)
def test_interpreted_it_equals_the_tiled_form(shape):
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=shape), jnp.float32)
  g, p = draw(), draw()
  zeros = init_moments(p, 0, jnp.float32)
  moments = jax.jit(next_moments, static_argnums=3)(
    learned.decay_rates(theta), zeros, g, 0
  )
  args = (theta, g, p, moments, jnp.asarray(7))
  forms = (
    functools.partial(tiles.direction, tile=512),
    functools.partial(kernel.direction, tile=512, interpret="tpu"),
  )
  tiled, fused = (
    jax.jit(functools.partial(f, **OPTIONS))(*args) for f in forms
  )
  size = float(jnp.abs(tiled).max())
  np.testing.assert_allclose(fused, tiled, atol=2e-6 * size, rtol=0)


def test_on_a_cpu_it_is_the_tiled_form():
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  params = {"w": jnp.ones((16, 128)), "b": jnp.ones(4)}
  step = lambda tx: jax.jit(tx.update)(params, tx.init(params), params)
  same = (learned.mulo(theta, implementation=x) for x in ("pallas", "tiled"))
  jax.tree.map(np.testing.assert_array_equal, *map(step, same))


def test_it_compiles_for_a_tpu_and_spills_no_hidden_units():
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  where = SingleDeviceSharding(topologies.topology("v5e:2x4").devices[0])
  tx = learned.mulo(theta, implementation="pallas", tile=2**18)
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  x = put(jax.ShapeDtypeStruct((1000, 2048), jnp.float32))
  state = jax.tree.map(put, jax.eval_shape(tx.init, x))
  compiled = jax.jit(tx.update).lower(x, state, x).compile()
  assert compiled.as_text().count("tpu_custom_call") == 1
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * x.size
