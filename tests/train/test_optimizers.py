"""A config's optimizer against the formulas, in NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import train
from distrain_jax.train import optimizers

STEPS = 10


@pytest.fixture
def config():
  """config(**changes) -> config.optimizer."""

  def make(**changes):
    c = train.default_config().optimizer
    c.update(changes)
    return c

  return make


@pytest.mark.parametrize(
  "name, decay",
  [
    ("constant", lambda t: 1.0),
    ("linear", lambda t: 1.0 + t * (0.1 - 1.0)),
    ("cosine", lambda t: 0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2),
  ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_rises_linearly_then_decays_to_its_last_step(
  name, decay, warmup, config
):
  c = config(
    schedule=name, learning_rate=2.0, warmup_steps=warmup, final_fraction=0.1
  )
  rate = optimizers.schedule(c, STEPS)
  for step in range(STEPS + 3):  # and stays there
    t = min(1.0, (step - warmup) / (STEPS - warmup))
    want = 2.0 * (step / warmup if step < warmup else decay(t))
    np.testing.assert_allclose(rate(jnp.int32(step)), want, rtol=1e-5)


@pytest.mark.parametrize("warmup", [STEPS, 2 * STEPS])
def test_a_short_run_may_be_all_warm_up(warmup, config):
  rate = optimizers.schedule(config(warmup_steps=warmup), STEPS)
  np.testing.assert_allclose(rate(5), 5 / warmup * 1e-3, rtol=1e-5)


def test_only_what_has_two_axes_or_more_decays():
  shapes = {
    "scalar": (),
    "bias": (3,),
    "matrix": (3, 2),
    "kernel": (3, 3, 1, 2),
  }
  mask = optimizers.decay_mask({k: jnp.zeros(s) for k, s in shapes.items()})
  assert mask == {
    "scalar": False,
    "bias": False,
    "matrix": True,
    "kernel": True,
  }


def sgd(c, p, g, m, t):
  return p - rate_at(c, t) * g, m


def momentum(c, p, g, m, t):
  velocity = c.momentum * m.get("v", 0.0) + g
  move = g + c.momentum * velocity if c.nesterov else velocity
  return p - rate_at(c, t) * move, {"v": velocity}


def adam(c, p, g, m, t):
  first = c.b1 * m.get("m", 0.0) + (1 - c.b1) * g
  second = c.b2 * m.get("v", 0.0) + (1 - c.b2) * g * g
  unbiased = first / (1 - c.b1 ** (t + 1))
  scale = np.sqrt(second / (1 - c.b2 ** (t + 1))) + c.eps
  return p - rate_at(c, t) * unbiased / scale, {"m": first, "v": second}


def rate_at(c, t):
  return c.learning_rate * (1 - t / STEPS)  # linear to 0


def oracle(c, params, gradients):
  """Coupled decay joins the gradient; adamw's is apart, times the rate."""
  rule = {"adamw": adam, "adam": adam, "momentum": momentum, "sgd": sgd}[c.name]
  memory = {k: {} for k in params}
  for t, grads in enumerate(gradients):
    for k, p in params.items():
      decay = c.weight_decay * p if p.ndim > 1 else 0.0
      g = grads[k] if c.name == "adamw" else grads[k] + decay
      new, memory[k] = rule(c, p, g, memory[k], t)
      params[k] = new - (rate_at(c, t) * decay if c.name == "adamw" else 0.0)
  return params


@pytest.mark.parametrize(
  "name", ["sgd", "momentum", "nesterov", "adam", "adamw"]
)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_each_optimizer_is_its_formula(name, decay, config):
  c = config(
    name="momentum" if name == "nesterov" else name,
    nesterov=name == "nesterov",
    learning_rate=0.2,
    schedule="linear",
    weight_decay=decay,
    b1=0.8,
    b2=0.95,
    eps=1e-3,
    momentum=0.7,
  )
  rng = np.random.default_rng(0)
  draw = lambda: {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
  start, gradients = draw(), [draw() for _ in range(STEPS)]
  tx = optimizers.build(c, STEPS)
  single = lambda tree: {k: jnp.float32(v) for k, v in tree.items()}
  params = single(start)
  state = tx.init(params)
  for grads in gradients:
    updates, state = tx.update(single(grads), state, params)
    params = optax.apply_updates(params, updates)
  for k, want in oracle(c, start, gradients).items():
    np.testing.assert_allclose(params[k], want, rtol=2e-5, atol=2e-6)
