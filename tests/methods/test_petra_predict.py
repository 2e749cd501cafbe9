"""PETRA's forward passes with predicted parameters."""

import jax
import jax.numpy as jnp
import optax
import petra_networks as nets
import pytest
from test_petra import KEY, SGD, a_run, close, distance, equal, steps

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
  ("k", "buffer", "predict"),
  [(1, "none", 1.0), (3, "none", 0.5), (2, "graph", 1.0)],
)
def test_equals_the_oracle(k, buffer, predict):
  count = 12  # far enough: momentum and prediction soon run away together
  run, model, blocks = a_run(accumulate=k, buffer=buffer, predict=predict)
  x, y = nets.batches(count)
  state, _ = steps(run, run.init(KEY, model), x, y, k * nets.ROWS)
  got = run.params(run.drain(state, KEY))
  oracle = nets.Oracle(
    blocks, *model, SGD, k=k, mode=buffer, key=KEY, predict=predict
  )
  oracle.run(x.reshape(count, nets.ROWS, -1), y.reshape(count, -1))
  close(got.params, oracle.params(), 5e-6)
  plain = nets.Oracle(blocks, *model, SGD, k=k, mode=buffer, key=KEY)
  plain.run(x.reshape(count, nets.ROWS, -1), y.reshape(count, -1))
  assert distance(got.params, plain.params()) > 1e-3


def steady(size):
  """An optimizer whose updates are all alike, and which adds gradients up."""

  def update(grads, state, params=None):
    return jax.tree.map(lambda g: jnp.full_like(g, size), grads), jax.tree.map(
      jnp.add, state, grads
    )

  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), update
  )


STEADY = steady(0.02)


@pytest.mark.parametrize("k", [1, 2])
def test_where_updates_are_alike_what_is_predicted_comes_true(k):
  """Inputs are then reconstructed exactly, however late they are.

  But for the first micro-batches: there is no update yet to predict from.
  """
  x, y = nets.batches(36)
  half = 20 * nets.ROWS  # from the first update on, of all that comes back

  def recorded(buffer, predict):
    run, model, _ = a_run(STEADY, accumulate=k, buffer=buffer, predict=predict)
    state = run.init(KEY, model)
    found = []
    for rows in (slice(0, half), slice(half, None)):
      state, _ = steps(run, state, x[rows], y[rows], k * nets.ROWS)
      found.append(jax.device_get(state.opt_state))
    return jax.tree.map(jnp.subtract, found[1], found[0])

  for predict, least, most in ((1.0, 0.0, 2e-5), (0.0, 1e-3, 10.0)):
    gap = distance(recorded("none", predict), recorded("input", predict))
    assert least <= gap <= most


def test_a_restored_state_goes_on_and_the_mesh_agrees():
  x, y = nets.batches(12)
  half = 6 * nets.ROWS
  ends = []
  for on_mesh in (False, True):
    run, model, _ = a_run(accumulate=2, predict=1.0, on_mesh=on_mesh)
    state, _ = steps(
      run, run.init(KEY, model), x[:half], y[:half], 2 * nets.ROWS
    )
    saved = jax.device_get(state)
    state, _ = steps(run, state, x[half:], y[half:], 2 * nets.ROWS)
    places = jax.tree.map(lambda x: x.sharding, run.abstract(KEY, model))
    other, _ = steps(
      run, jax.device_put(saved, places), x[half:], y[half:], 2 * nets.ROWS
    )
    equal(jax.device_get(state), jax.device_get(other))
    ends.append(jax.device_get(run.params(state)))
  close(*ends)
  assert "predicting" in run.method.layout
