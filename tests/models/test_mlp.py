import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models


def test_logits_equal_numpy():
  model = models.create("mlp", widths=(5, 4), classes=3, activation="tanh")
  x = np.random.default_rng(0).normal(size=(6, 2, 3, 1)).astype(np.float32)
  params = models.init(model, jax.random.key(0), x).params
  params = jax.tree.map(lambda a: a + 0.1, params)  # biases other than 0
  y = x.reshape(6, 6)
  for name in ("dense_0", "dense_1", "output"):
    layer = jax.tree.map(np.asarray, params[name])
    y = y @ layer["kernel"] + layer["bias"]
    y = y if name == "output" else np.tanh(y)
  logits = model.apply({"params": params}, x)
  np.testing.assert_allclose(logits, y, rtol=1e-5, atol=1e-6)


def test_no_hidden_layer_is_a_linear_model():
  model = models.create("mlp", widths=())
  params = models.init(model, jax.random.key(0), jnp.zeros((1, 8, 8, 1))).params
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes == {"output": {"bias": (10,), "kernel": (64, 10)}}


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
  model = models.create("mlp", widths=(4096,), classes=1, dropout=0.25)
  x = jnp.ones((1, 3))
  params = {
    "dense_0": {"kernel": jnp.ones((3, 4096)), "bias": jnp.zeros(4096)},
    "output": {"kernel": jnp.ones((4096, 1)) / 4096, "bias": jnp.zeros(1)},
  }
  run = lambda **options: model.apply({"params": params}, x, **options).item()
  noisy = run(train=True, rngs={"dropout": jax.random.key(0)})
  assert run() == pytest.approx(3)
  assert noisy == pytest.approx(3, abs=0.15)  # 10 standard deviations
  assert noisy != run()


@pytest.mark.parametrize(
  "options, message",
  [
    (
      {"widths": (8, 0)},
      r"`widths\[1\]` must be a whole number above 0; got 0",
    ),
    ({"activation": "relo"}, "activation='relo' .* Did you mean 'relu'"),
    ({"dropout": -0.1}, r"`dropout` must be in \[0, 1\)"),
    ({"width": (8,)}, "mlp has no option 'width'. Did you mean 'widths'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("mlp", **options)
