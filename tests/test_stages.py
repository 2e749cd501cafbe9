"""Blocks: couplings and their inverses, and the loss made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import petra_networks as nets
import pytest

from distrain_jax import stages

KEY = jax.random.key(0)


def chain(count, grid=None, width=16):
  rng = np.random.default_rng(0)
  fn = lambda p, s, x, k: (jnp.tanh(x @ p["a"]) @ p["c"], s)
  blocks = [stages.coupling(f"block_{i}", fn, grid=grid) for i in range(count)]
  params = [
    {"a": nets.normal(rng, width, width), "c": nets.normal(rng, width, width)}
    for _ in range(count)
  ]
  streams = tuple(
    jnp.asarray(rng.normal(size=(8, width)), jnp.float32) for _ in range(2)
  )
  return blocks, params, streams


def there_and_back(blocks, params, x):
  for block, p in zip(blocks, params):
    x, _ = block.forward(p, {}, x, KEY)
  for block, p in zip(blocks[::-1], params[::-1]):
    x = block.inverse(p, {}, x, KEY)
  return x


@pytest.mark.parametrize("count", [1, 8])
def test_the_inverse_is_right_to_rounding(count):
  blocks, params, x = chain(count)
  back = there_and_back(blocks, params, x)
  assert 0 < float(stages.relative_error(back, x)) < 1e-5


def test_on_a_grid_it_is_exact():
  grid = 2.0**-12
  blocks, params, x = chain(16, grid)
  x = tuple(stages.on_grid(a, grid) for a in x)
  back = there_and_back(blocks, params, x)
  jax.tree.map(np.testing.assert_array_equal, back, x)


@pytest.mark.parametrize("grid", [0.3, -0.5, 0])
def test_a_grid_is_a_power_of_two(grid):
  with pytest.raises(ValueError, match="`grid` is a power of two"):
    stages.coupling("block", lambda p, s, x, k: (x, s), grid=grid)


def test_two_couplings_are_a_block_of_the_reversible_residual_network():
  blocks, params, (x1, x2) = chain(2)
  f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]
  # Gomez et al., eq. 8: y1 = x1 + F(x2), y2 = x2 + G(y1).
  y1 = x1 + f(params[0], x2)
  y2 = x2 + f(params[1], y1)
  streams = (x2, x1)
  for block, p in zip(blocks, params):
    streams, _ = block.forward(p, {}, streams, KEY)
  np.testing.assert_allclose(streams[0], y2, rtol=1e-6)
  np.testing.assert_allclose(streams[1], y1, rtol=1e-6)


@pytest.mark.parametrize("fn", [nets.branch, nets.dropping])
def test_going_back_is_the_inverse_and_the_vjp(fn):
  blocks, params, state = nets.make("r", stats=True, fn=fn)
  block, own = blocks[1], stages.of_block("block_0", params, state)
  rng = np.random.default_rng(1)
  draw = lambda: tuple(
    jnp.asarray(rng.normal(size=(4, nets.WIDTH)), jnp.float32) for _ in "ab"
  )
  x, dy = draw(), draw()
  y, after = block.forward(*own, x, KEY)
  back = block.reverse(*own, y, dy, KEY)
  _, pull = jax.vjp(lambda p, x: block.forward(p, own[1], x, KEY)[0], own[0], x)
  grads, dx = pull(dy)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, (back.x, back.dx, back.grads), (x, dx, grads))
  jax.tree.map(close, back.model_state, after)


def test_an_inverse_of_ones_own_is_used():
  fn = lambda p, s, x, k: (x * p["scale"], s)
  block = stages.reversible("scale", fn, lambda p, s, y, k: y / p["scale"])
  params, x = {"scale": jnp.asarray(2.0)}, jnp.arange(6.0).reshape(2, 3)
  back = block.reverse(params, {}, 2 * x, jnp.ones((2, 3)), KEY)
  np.testing.assert_array_equal(back.x, x)
  np.testing.assert_array_equal(back.dx, 2 * jnp.ones((2, 3)))
  assert float(back.grads["scale"]) == float(x.sum())


@pytest.mark.parametrize("fn", [nets.branch, nets.dropping])
def test_reversible_back_propagation_has_the_gradient_of_the_plain_one(fn):
  blocks, params, state = nets.make("rrnr", stats=True, fn=fn)
  batch = nets.batches(2)
  results = []
  for keep in (True, False):
    loss = stages.loss_fn(blocks, keep_activations=keep)
    of = jax.value_and_grad(loss, has_aux=True)
    results.append(jax.jit(of)(params, state, batch, KEY))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, *results)


def test_reversible_back_propagation_keeps_no_activation():
  blocks, params, x = chain(12, width=64)
  names = [b.name for b in blocks]
  head = stages.last("head", lambda p, s, x, t, k: (x[0].mean(), ({}, s)))
  blocks = [*blocks, head]
  params = dict(zip(names, params))
  streams = tuple(jnp.zeros((2048, 64)) for _ in x)

  def temporaries(keep):
    loss = stages.loss_fn(blocks, keep_activations=keep)
    fn = lambda p, x: loss(p, {}, (x, jnp.zeros(())), KEY)[0]
    compiled = jax.jit(jax.grad(fn)).lower(params, streams).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # 12 hidden activations at least, against what one block needs.
  assert temporaries(False) < 0.5 * temporaries(True)
