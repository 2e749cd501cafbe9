"""Methods that promise plain training's numbers, held to a NumPy loop.

The oracle is written by hand in float64: gradients of a two-layer network,
SGD, momentum and AdamW, clipping, a decay mask. It knows no workers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

STEPS, ROWS, INPUTS, WIDTH = 20, 24, 3, 5
TOLERANCE = 1e-5
DECAY = 0.1

METHODS = {"ddp": dj.ddp, "zero1": dj.zero1, "fsdp": dj.fsdp}


def matrices(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


class Rule(NamedTuple):
  optimizer: str
  tx: optax.GradientTransformation
  rate: float
  clip_norm: float | None  # reached in some of the steps, not in all


RULES = [
  Rule("sgd", optax.sgd(0.1), 0.1, None),
  Rule("momentum", optax.sgd(0.05, momentum=0.9), 0.05, 0.7),
  Rule(
    "adamw",
    optax.adamw(0.02, weight_decay=DECAY, mask=matrices),
    0.02,
    0.7,
  ),
]
by_rule = pytest.mark.parametrize(
  "rule", RULES, ids=[r.optimizer for r in RULES]
)


def start():
  """Leaves of 15, 5, 5 and 1 elements: of the workers, 3 divide one."""
  rng = np.random.default_rng(0)
  return {
    "w": rng.normal(size=(INPUTS, WIDTH)),
    "b": 0.1 * rng.normal(size=WIDTH),
    "v": rng.normal(size=WIDTH),
    "gain": np.array(1.5),
  }


def batches():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(STEPS, ROWS, INPUTS))
  return x, np.sin(2 * x.sum(-1)) + 0.1 * rng.normal(size=(STEPS, ROWS))


def manual_gradient(p, x, y):
  """Loss, mean absolute error and gradient of mean((gain tanh(xw + b) v - y)^2)."""
  hidden = np.tanh(x @ p["w"] + p["b"])  # (rows, width)
  out = hidden @ p["v"]
  error = p["gain"] * out - y
  d_out = 2 * error / len(y) * p["gain"]
  d_hidden = np.outer(d_out, p["v"]) * (1 - hidden**2)
  grads = {
    "w": x.T @ d_hidden,
    "b": d_hidden.sum(0),
    "v": hidden.T @ d_out,
    "gain": np.array((2 * error / len(y) * out).sum()),
  }
  return np.mean(error**2), np.mean(np.abs(error)), grads


def oracle_update(rule, p, g, memory, t):
  """New value of one leaf; memory is that leaf's dict of moments."""
  if rule.optimizer == "sgd":
    return p - rule.rate * g
  if rule.optimizer == "momentum":
    memory["m"] = 0.9 * memory.get("m", 0.0) + g
    return p - rule.rate * memory["m"]
  memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
  memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g**2
  m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
  decay = DECAY * p if p.ndim > 1 else 0.0
  return p - rule.rate * (m / (np.sqrt(v) + 1e-8) + decay)


@functools.cache
def oracle(optimizer):
  """Parameters after all steps, and (STEPS, 3) loss, error, gradient norm."""
  (rule,) = [r for r in RULES if r.optimizer == optimizer]
  params, memory, seen = start(), {}, []
  for t, (x, y) in enumerate(zip(*batches()), start=1):
    loss, mae, grads = manual_gradient(params, x, y)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    shrink = 1.0 if rule.clip_norm is None else min(1, rule.clip_norm / norm)
    params = {
      name: oracle_update(
        rule, p, shrink * grads[name], memory.setdefault(name, {}), t
      )
      for name, p in params.items()
    }
    seen.append((loss, mae, norm))
  return params, np.array(seen)


def loss_fn(params, batch, key):
  del key
  hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
  error = params["gain"] * (hidden @ params["v"]) - batch["y"]
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def as_float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def train(run):
  key, seen = jax.random.key(0), []
  state = run.init(key, as_float32(start()))
  for x, y in zip(*map(np.float32, batches())):
    state, metrics = run.step(state, {"x": x, "y": y}, key)
    seen.append([float(metrics[m]) for m in ("loss", "mae", "grad_norm")])
  return run.params(state), np.array(seen)


def assert_same(got, expected):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE),
    got,
    expected,
  )


@by_rule
def test_the_rules_clip_in_some_steps_and_not_in_others(rule):
  _, seen = oracle(rule.optimizer)
  if rule.clip_norm is not None:
    assert 0 < np.mean(seen[:, 2] > rule.clip_norm) < 1


@by_rule
def test_plain_single_device_training_equals_the_oracle(rule):
  clip = optax.clip_by_global_norm(rule.clip_norm or np.inf)
  tx = optax.chain(clip, rule.tx)

  @jax.jit
  def step(params, opt_state, batch):
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, batch, None)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params = as_float32(start())
  opt_state = tx.init(params)
  for x, y in zip(*map(np.float32, batches())):
    params, opt_state = step(params, opt_state, {"x": x, "y": y})
  assert_same(params, oracle(rule.optimizer)[0])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("name", METHODS)
@by_rule
def test_simulated_equals_the_oracle(rule, name, workers, accumulate):
  method = METHODS[name](
    loss_fn, rule.tx, accumulate=accumulate, clip_norm=rule.clip_norm
  )
  assert_same(
    train(dj.simulate(method, workers=workers)), oracle(rule.optimizer)
  )


@by_rule
def test_so_it_does_where_the_workers_divide_a_leaf(rule):
  method = dj.fsdp(loss_fn, rule.tx, accumulate=2, clip_norm=rule.clip_norm)
  run = dj.simulate(method, workers=3)
  cut = run.abstract(jax.random.key(0), as_float32(start())).params
  assert cut.pieces[0]["w"].shape == (3, 1, WIDTH)
  assert_same(train(run), oracle(rule.optimizer))


@pytest.mark.parametrize("name", METHODS)
@by_rule
def test_distributed_equals_the_oracle(rule, name, mesh):
  method = METHODS[name](
    loss_fn, rule.tx, accumulate=3, clip_norm=rule.clip_norm
  )
  assert_same(train(dj.distribute(method, mesh(8))), oracle(rule.optimizer))
