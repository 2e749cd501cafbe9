"""A loss that does not run on a subnetwork: what the message says."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj

pytestmark = pytest.mark.core

KEY = toys.KEY


def begin(method, params=None):
  run = dj.simulate(method, workers=4)
  params = toys.float32(toys.start()) if params is None else params
  return run, run.init(KEY, params)


def build(names, params, loss, **options):
  shapes = toys.shapes_of(params)
  return dj.sdp(loss, optax.sgd(0.1), names=names, shapes=shapes, **options)


def step(loss, **options):
  run, state = begin(toys.make(loss=loss, **options))
  return run.step(state, toys.float32(toys.batch(0)), KEY)


def configured(params, rows, key):
  """Knows its width."""
  return params["b"].reshape(toys.L, 2, toys.M // 2).mean(), {}


def deep(params, rows, key):
  """Knows its depth."""
  h = rows["x"]
  for k in range(toys.L):
    layer = {n: params[n] for n in "abcs"}
    assert layer["s"].shape[0] == toys.L, "a block is missing"
    h = h + jnp.tanh(h @ layer["a"][k]) @ layer["c"][k]
  return h.mean(), {}


def test_a_loss_that_knows_its_width_is_refused_with_the_arrays():
  says = (
    r"not on a subnetwork with fewer 'mlp': with params\['a'\] of shape "
    r"\(4, 4, 4\) in place of \(4, 4, 8\), .* it raised TypeError: .*reshape"
  )
  with pytest.raises(ValueError, match=says) as caught:
    step(configured)
  assert isinstance(caught.value.__cause__, TypeError)
  step(configured, masking="backward")  # there it sees the whole model


@pytest.mark.parametrize("level", ["block", "both"])
def test_a_loss_that_knows_its_depth_is_refused_with_the_arrays(level):
  says = (
    r"fewer 'layers': with params\['a'\] of shape \(2, 4, 8\) in place of "
    r"\(4, 4, 8\), .* it raised AssertionError: a block is missing"
  )
  with pytest.raises(ValueError, match=says):
    step(deep, level=level)


def test_the_family_that_a_loss_cannot_do_without_is_found():
  names = {"a": ("hidden_0",), "b": ("hidden_1",)}
  params = {k: np.zeros(8, np.float32) for k in names}

  def loss(params, rows, key):
    return params["a"].sum() + (params["b"] * jnp.arange(8.0)).sum(), {}

  run, state = begin(build(names, params, loss), params)
  says = r"fewer 'hidden_1': with params\['b'\] of shape \(4,\) .*\(8,\), it"
  with pytest.raises(ValueError, match=says):
    run.step(state, {"x": np.zeros(4, np.float32)}, KEY)


def test_what_a_loss_raises_on_the_whole_model_too_is_left_as_it_is():
  def broken(params, rows, key):
    raise KeyError("no such rows")

  with pytest.raises(KeyError, match="no such rows"):
    step(broken)
  with pytest.raises(TypeError, match="aux must be a dict"):
    step(lambda params, rows, key: (params["gain"], 3.0))
  run, state = begin(toys.make(accumulate=3))
  with pytest.raises(ValueError, match=r"batch\['x'\] has shape"):
    run.step(state, toys.float32(toys.batch(0)), KEY)


def test_a_loss_that_needs_every_block_is_refused_with_those_it_lacked():
  names = dict.fromkeys(("block_0", "block_1", "head"), (None,))
  params = {k: np.zeros(3, np.float32) for k in names}

  def loss(params, rows, key):
    return sum(params[k].mean() for k in names), {}

  blocks = {"level": "block", "blocks": ("block_0", "block_1")}
  run, state = begin(build(names, params, loss, **blocks), params)
  says = (
    r"fewer 'blocks': without block_\d, it raised KeyError: 'block_\d' .*`blo"
  )
  with pytest.raises(ValueError, match=says):
    run.step(state, {"x": np.zeros(4, np.float32)}, KEY)
