"""A config's optimizer against the formulas, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import methods, models, train
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


SMALL = {"embed": 8, "heads": 4, "mlp": 12}
MODELS = {
  "llama": SMALL | {"layers": 2, "kv_heads": 2},
  "llama, not scanned": SMALL | {"layers": 2, "kv_heads": 2, "scan": False},
  "gpt_neo": SMALL | {"layers": 4, "window": 3},
  "vit": SMALL | {"layers": 2},
}
# Ends of the paths of what is a matrix, whether or not layers are stacked.
MATRICES = ("key", "query", "value", "out", "down", "gate", "up", "embedding")
MATRICES += ("output", "position", "patch", "kernel")


@pytest.fixture(params=MODELS, scope="module")
def named(request):
  """(parameters, their logical names) of a small model."""
  model = models.create(request.param.split(",")[0], **MODELS[request.param])
  example = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  if request.param == "vit":
    example = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  params = models.init(model, jax.random.key(0), example).params
  return params, models.logical_names(model, example)


def is_matrix(path) -> bool:
  return path[-1].key in MATRICES


def test_norms_and_biases_of_stacked_layers_do_not_decay(named):
  params, names = named
  mask = optimizers.decay_mask(names)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  assert {decays for _, decays in leaves} == {True, False}
  for path, decays in leaves:
    assert decays == is_matrix(path), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["ddp", "zero1", "acco"])
def test_only_matrices_decay_also_where_the_optimizer_sees_pieces(
  name, named, config
):
  params, names = named
  params = jax.tree.map(jnp.ones_like, params)
  c = config(learning_rate=0.5, schedule="constant", weight_decay=0.25)
  loss_fn = lambda params, batch, key: (0.0 * jnp.sum(batch), {})
  tx = optimizers.build(c, STEPS, names)
  run = dj.simulate(methods.FACTORIES[name](loss_fn, tx), workers=2)
  key = jax.random.key(0)
  state, _ = run.step(run.init(key, params), jnp.zeros((4, 1)), key)
  for path, x in jax.tree_util.tree_leaves_with_path(run.params(state)):
    want = 1 - 0.5 * 0.25 if is_matrix(path) else 1.0
    np.testing.assert_array_equal(x, np.full(x.shape, want, np.float32))


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_without_names_axes_are_counted(name, config):
  c = config(name=name, learning_rate=0.1, weight_decay=0.5)
  shapes = {"scalar": (), "bias": (3,), "matrix": (3, 2), "kernel": (3, 1, 2)}
  ones = {k: jnp.ones(s) for k, s in shapes.items()}
  tx = optimizers.build(c, STEPS)
  zeros = jax.tree.map(jnp.zeros_like, ones)
  updates, _ = tx.update(zeros, tx.init(ones), ones)
  moved = {k for k, x in updates.items() if (x != 0).any()}
  assert moved == {"matrix", "kernel"}


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
