"""The GPU's kernel: interpreted, it is the XLA form; it compiles for an H100."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ptx
import pytest
from jax.sharding import SingleDeviceSharding

from distrain_jax import learned
from distrain_jax.inspect import topologies
from distrain_jax.learned import kernel, kernel_gpu, tiles
from distrain_jax.learned.moments import init_moments, next_moments

OPTIONS = {"exp_mult": 0.5, "feature_eps": 1e-5, "precision": "highest"}
full = pytest.mark.full


def arguments(shape, hidden=4, seed=0):
  """Of `direction`, after one gradient; few hidden units compile fast."""
  theta = jax.jit(learned.init_theta, static_argnums=1)(
    jax.random.key(seed), hidden
  )
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  # Biases are 0 to start with, and what is 0 could be left out unnoticed.
  theta |= {name: draw(*theta[name].shape) for name in ("b0", "b1", "b2")}
  g, p = draw(*shape), draw(*shape)
  moments = jax.jit(next_moments, static_argnums=3)(
    learned.decay_rates(theta), init_moments(p, 0, jnp.float32), g, 0
  )
  return theta, g, p, moments, jnp.asarray(7)


# Rows and columns that blocks do not divide, either of the two the larger; two
# columns a thread.
@pytest.mark.parametrize(
  "shape, hidden",
  [
    ((19, 150), 4),
    ((151, 129), 4),
    ((5, 290), 4),
    pytest.param((7, 1000), 32, marks=full),
  ],
)
def test_interpreted_it_equals_the_tiled_form(shape, hidden):
  assert kernel_gpu.fits(shape)
  args = arguments(shape, hidden)
  forms = (
    functools.partial(tiles.direction, tile=512),
    functools.partial(kernel.direction, tile=512, interpret="cuda"),
  )
  tiled, fused = (
    jax.jit(functools.partial(f, **OPTIONS))(*args) for f in forms
  )
  size = float(jnp.abs(tiled).max())
  np.testing.assert_allclose(fused, tiled, atol=1e-6 * size, rtol=0)


@pytest.mark.parametrize("c", [128, 129, 255, 256, 383, 511, 640, 1000, 4096])
def test_blocks_cover_every_column_and_stay_inside(c):
  width = kernel_gpu.choose_width(c)
  assert width % kernel_gpu.THREADS == 0 and width <= c
  assert width <= kernel_gpu.MOST * kernel_gpu.THREADS
  # Overlapping blocks do less than twice the work.
  assert -(-c // width) * width < 2 * c


def calls(platform, shape=(16, 256)):
  """How often a program for a platform calls Mosaic: (for GPUs, for TPUs)."""
  args = arguments(shape)
  go = functools.partial(kernel.direction, tile=512, **OPTIONS)
  lowered = jax.jit(go).trace(*args).lower(lowering_platforms=(platform,))
  text = lowered.as_text()
  return text.count("@mosaic_gpu"), text.count("@tpu_custom_call")


def test_each_platform_gets_its_own_kernel():
  found = {name: calls(name) for name in ("cuda", "tpu", "cpu", "rocm")}
  assert found == {"cuda": (1, 0), "tpu": (0, 1), "cpu": (0, 0), "rocm": (0, 0)}


@pytest.mark.parametrize(
  "capability, expected",
  [("8.9", False), ("9.0", True), ("12.0", True), ("gfx942", True)],
)
def test_gpus_older_than_hopper_are_told_by_their_capability(
  monkeypatch, capability, expected
):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(kernel_gpu.jax, "devices", lambda: [device])
  assert kernel_gpu.supported() is expected


def test_older_gpus_get_the_tiled_form(monkeypatch):
  monkeypatch.setattr(kernel_gpu, "supported", lambda: False)
  assert calls("cuda") == (0, 0)


def test_it_compiles_for_an_h100_and_its_registers_suffice(monkeypatch, capfd):
  # The whole network and the most columns a thread: most registers.
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  theta = jax.jit(learned.init_theta)(jax.random.key(0))
  where = SingleDeviceSharding(topologies.topology("h100:8").devices[0])
  tx = learned.mulo(theta, implementation="pallas", tile=2**18)
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  x = put(jax.ShapeDtypeStruct((1000, 2048), jnp.float32))
  assert kernel_gpu.choose_width(2048) == 4 * kernel_gpu.THREADS
  state = jax.tree.map(put, jax.eval_shape(tx.init, x))
  compiled = jax.jit(tx.update).lower(x, state, x).compile()
  assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 1
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * x.size
  said = capfd.readouterr()
  said = said.out + said.err
  assert "learned_rule" in said
  assert "0 bytes spill stores, 0 bytes spill loads" in said


# One column a thread and three, blocks that overlap.
@pytest.mark.parametrize(
  "shape, hidden",
  [((7, 260), 4), ((6, 520), 4), pytest.param((9, 1000), 32, marks=full)],
)
def test_what_it_compiles_to_computes_the_same(
  monkeypatch, capfd, shape, hidden
):
  """The H100's code, before its assembler, on a machine made of NumPy."""

  @jax.jit
  def folded(theta, grad, param, moments, count):
    x = tiles.inputs(grad, param, moments)
    sizes = tiles.mean_squares(tiles.cut_up(x, 512), grad.size)
    net = tiles.fold(theta, count, sizes, x.sides, OPTIONS["feature_eps"])
    return net, x

  net, x = folded(*arguments(shape, hidden))
  expected = tiles.network(net, x, OPTIONS["exp_mult"], "highest")
  where = SingleDeviceSharding(topologies.topology("h100:8").devices[0])
  put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  go = functools.partial(kernel_gpu.network, exp_mult=OPTIONS["exp_mult"])
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  jax.jit(go).lower(*jax.tree.map(put, (net, x))).compile()
  said = capfd.readouterr()
  width = kernel_gpu.choose_width(shape[1])
  given = map(np.asarray, kernel_gpu.prepare(net, x, width))
  arrays = [*given, np.full(shape, np.nan)]  # the kernel's, in its order
  machine = ptx.Machine(said.out + said.err, arrays, kernel_gpu.THREADS)
  down, across = -(-shape[0] // kernel_gpu.ROWS), -(-shape[1] // width)
  for block in range(down * across):
    machine.run(block)
  size = float(jnp.abs(expected).max())
  result = machine.array(len(arrays) - 1)
  np.testing.assert_allclose(result, expected, atol=2e-6 * size, rtol=0)


@full
def test_after_2000_steps_on_given_gradients_parameters_are_the_same(
  monkeypatch,
):
  """Errors may add up in averages and parameters, not by way of gradients."""
  interpreted = functools.partial(kernel.direction, interpret="cuda")
  monkeypatch.setattr(kernel, "direction", interpreted)
  shape = (6, 140)
  start = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

  @functools.partial(jax.jit, static_argnums=0)
  def go(implementation):
    # The shipped weights, which are made for muP's multipliers.
    tx = learned.mulo(implementation=implementation, mup=1.0)

    def step(carry, key):
      params, state = carry
      grads = jax.random.normal(key, shape)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 2000)
    return jax.lax.scan(step, (start, tx.init(start)), keys)[0]

  (tiled, a), (fused, b) = go("tiled"), go("pallas")
  moved = float(jnp.abs(tiled - start).max())
  assert moved > 0.01
  np.testing.assert_allclose(fused, tiled, atol=1e-6 * moved, rtol=0)
  jax.tree.map(np.testing.assert_array_equal, a, b)  # of gradients alone
