"""NNX and Equinox models, trained by ddp and by their own libraries' loops."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import distrain_jax as dj
from distrain_jax.models import adapters

STEPS, KEY = 20, jax.random.key(3)
TX = optax.sgd(0.2, momentum=0.9)


def batches():
  images, labels = load_digits(return_X_y=True)
  for start in range(0, STEPS * 64, 64):
    rows = slice(start, start + 64)
    image = (images[rows] / 16).astype(np.float32)
    yield {"image": image, "label": labels[rows].astype(np.int32)}


def measure(logits, batch):
  losses = optax.softmax_cross_entropy_with_integer_labels
  loss = losses(logits, batch["label"]).mean()
  return loss, {"accuracy": (logits.argmax(-1) == batch["label"]).mean()}


def train(adapted, workers):
  method = dj.ddp(adapted.loss_fn, TX)
  run = dj.simulate(method, workers=workers)
  state, losses = run.init(KEY, adapted.params), []
  for batch in batches():
    state, metrics = run.step(state, batch, KEY)
    losses.append(metrics["loss"].item())
  assert 0 <= metrics["accuracy"] <= 1
  return adapted.merge(run.params(state)), losses


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class NNXModel(nnx.Module):
  """Parameters in a list, an integer one, a counter; norm and dropout apart."""

  def __init__(self, *, norm=False, dropout=0.0):
    rngs = nnx.Rngs(0)
    self.layers = nnx.List(
      [nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)]
    )
    self.norm = nnx.BatchNorm(16, rngs=rngs) if norm else None
    self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
    if norm:
      self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
      self.shift = nnx.Param(jnp.ones((), jnp.int32))

  def __call__(self, x):
    x = self.layers[0](x)
    if self.norm is not None:
      self.calls[...] += 1
      x = self.norm(x) * self.shift[...]
    x = nnx.relu(x)
    return self.layers[1](x if self.dropout is None else self.dropout(x))


def nnx_loss(model, batch, key):
  del key
  return measure(model(batch["image"]), batch)


def nnx_loop(model):
  """As Flax's documentation trains: references, updated in place."""
  trained = lambda path, x: isinstance(x, nnx.Param) and x.dtype == jnp.float32
  optimizer, losses = nnx.Optimizer(model, TX, wrt=trained), []
  grad_fn = nnx.value_and_grad(
    lambda model, batch: nnx_loss(model, batch, None),
    has_aux=True,
    argnums=nnx.DiffState(0, trained),
  )
  step = nnx.jit(grad_fn)
  for batch in batches():
    (loss, _), grads = step(model, batch)
    optimizer.update(model, grads)
    losses.append(loss.item())
  return losses


def assert_same_nnx(a, b):
  variables = nnx.Not(nnx.RngState)
  jax.tree.map(close, nnx.state(a, variables), nnx.state(b, variables))


@pytest.mark.parametrize("workers", [1, 4])
def test_an_nnx_model_trains_as_in_its_own_loop(workers):
  model = NNXModel()
  adapted = adapters.nnx(model, nnx_loss)
  assert isinstance(adapted.params, dict)
  trained, losses = train(adapted, workers)
  assert_same_nnx(model, NNXModel())  # the given one is as it was
  close(losses, nnx_loop(model))
  assert_same_nnx(trained, model)
  assert losses[-1] < 0.7 * losses[0]


def test_an_nnx_models_state_is_carried_and_its_integers_are_kept():
  model = NNXModel(norm=True)
  adapted = adapters.nnx(model, nnx_loss)
  assert set(adapted.params.model_state) == {"calls", "norm", "shift"}
  assert "shift" not in adapted.params.params
  trained, losses = train(adapted, 1)
  assert trained.calls[...] == STEPS
  close(losses, nnx_loop(model))
  assert_same_nnx(trained, model)  # parameters and running statistics
  assert losses[-1] < 0.7 * losses[0]


def test_nnx_statistics_are_averaged_over_workers():
  adapted = adapters.nnx(NNXModel(norm=True), nnx_loss, stats="averaged")
  trained, _ = train(adapted, 4)
  first = next(batches())["image"].reshape(4, 16, 64)
  assert trained.norm.mean[...].shape == (16,)
  merged = adapted.merge(adapted.params)
  hidden = np.einsum(
    "wbi,io->wbo", first, np.asarray(merged.layers[0].kernel[...])
  )
  run = dj.simulate(dj.ddp(adapted.loss_fn, TX), workers=4)
  state = run.init(KEY, adapted.params)
  state, _ = run.step(state, next(batches()), KEY)
  stats = run.params(state).model_state["norm"]
  close(stats["mean"], 0.01 * hidden.mean((0, 1)))  # nnx's momentum is 0.99
  close(stats["var"], 0.99 + 0.01 * hidden.var(1).mean(0))


def test_nnx_dropout_follows_the_key_and_is_no_state():
  model = NNXModel(dropout=0.5)
  params, loss_fn, merge = adapters.nnx(model, nnx_loss)
  batch = next(batches())
  loss = lambda seed: loss_fn(params, batch, jax.random.key(seed))[0].item()
  assert loss(0) == loss(0) != loss(1)
  assert set(params) == {"layers"}
  model.eval()
  evaluated = merge(params)
  evaluated.eval()
  close(evaluated(batch["image"]), model(batch["image"]))


class EquinoxModel(eqx.Module):
  layers: list
  shift: jax.Array
  activation: object

  def __init__(self):
    first, second = jax.random.split(jax.random.key(0))
    self.layers = [
      eqx.nn.Linear(64, 16, key=first),
      eqx.nn.Linear(16, 10, key=second),
    ]
    self.shift = jnp.ones((), jnp.int32)
    self.activation = jax.nn.relu

  def __call__(self, x):
    x = self.activation(self.layers[0](x)) * self.shift
    return self.layers[1](x)


def equinox_loss(model, batch, key):
  del key
  return measure(jax.vmap(model)(batch["image"]), batch)


def equinox_loop(model):
  """As Equinox's documentation trains."""
  opt_state = TX.init(eqx.filter(model, eqx.is_inexact_array))
  losses, loss = [], lambda model, batch: equinox_loss(model, batch, None)
  step = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
  for batch in batches():
    (value, _), grads = step(model, batch)
    updates, opt_state = TX.update(grads, opt_state)
    model = eqx.apply_updates(model, updates)
    losses.append(value.item())
  return model, losses


@pytest.mark.parametrize("workers", [1, 4])
def test_an_equinox_model_trains_as_in_its_own_loop(workers):
  model = EquinoxModel()
  adapted = adapters.equinox(model, equinox_loss)
  trained, losses = train(adapted, workers)
  expected, expected_losses = equinox_loop(model)
  close(losses, expected_losses)
  arrays = lambda model: eqx.filter(model, eqx.is_array)
  jax.tree.map(close, arrays(trained), arrays(expected))
  assert trained.shift.dtype == jnp.int32
  assert trained.activation is jax.nn.relu
  assert losses[-1] < 0.7 * losses[0]


def test_equinox_missing_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "equinox", None)
  with pytest.raises(ImportError, match="pip install equinox"):
    adapters.equinox(None, equinox_loss)
