"""Workers that train alone, in NumPy and float64, and the same task in JAX.

mean((tanh(x w) v - y)^2), gradients by hand; SGD, momentum and AdamW.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

WORKERS, ROWS, STEPS = 4, 16, 13
RATE, CLIP_NORM, DECAY = 0.05, 0.6, 0.1  # the clip bites in some steps
KEY = jax.random.key(0)
OPTIMIZERS = {  # made once, so that what is compiled is found again
  "sgd": optax.sgd(RATE),
  "momentum": optax.sgd(RATE, momentum=0.9),
  "adamw": optax.adamw(RATE, weight_decay=DECAY),
}


def start():
  """w: 4 rows, v: 3, a scalar: in two fragments, w is cut and v is not."""
  rng = np.random.default_rng(0)
  w, v = rng.normal(size=(4, 3)), rng.normal(size=3)
  return {"w": w, "v": v, "gain": np.array(1.2)}


def batch(step):
  """Rows of different workers differ in their mean too."""
  rng = np.random.default_rng(1 + step)
  x = rng.normal(size=(ROWS, 4)) + np.linspace(-1, 1, ROWS)[:, None]
  return {"x": x, "y": np.sin(x.sum(1))}


def loss_fn(params, rows, key):
  del key
  out = jnp.tanh(rows["x"] @ params["w"]) @ params["v"]
  error = params["gain"] * out - rows["y"]
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def train(run, steps=STEPS, state=None, first=0):
  """The state and the metrics of each step."""
  seen = []
  if state is None:
    state = run.init(KEY, float32(start()))
  for i in range(first, first + steps):
    state, metrics = run.step(state, float32(batch(i)), KEY)
    seen.append([float(metrics[k]) for k in ("loss", "mae", "grad_norm")])
  return state, np.array(seen)


def near(got, expected, tolerance=2e-5):
  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

  jax.tree.map(one, got, expected)


class Worker:
  """One worker's parameters and optimizer."""

  def __init__(self, optimizer):
    self.params, self.optimizer, self.taken = start(), optimizer, 0
    zeros = lambda: {k: np.zeros_like(p) for k, p in self.params.items()}
    self.m, self.v = zeros(), zeros()

  def step(self, x, y):
    """Loss, mean absolute error and the gradient's norm."""
    p = self.params
    hidden = np.tanh(x @ p["w"])  # (rows, 3)
    out = hidden @ p["v"]
    error = p["gain"] * out - y
    d_out = 2 * error / len(y) * p["gain"]
    grads = {
      "w": x.T @ (np.outer(d_out, p["v"]) * (1 - hidden**2)),
      "v": hidden.T @ d_out,
      "gain": np.array((2 * error / len(y) * out).sum()),
    }
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    shrink = min(1, CLIP_NORM / norm)
    self.taken += 1
    self.params = {k: self._moved(k, shrink * grads[k]) for k in p}
    return np.mean(error**2), np.mean(np.abs(error)), norm

  def _moved(self, k, g):
    p = self.params[k]
    if self.optimizer == "sgd":
      return p - RATE * g
    if self.optimizer == "momentum":
      self.m[k] = 0.9 * self.m[k] + g
      return p - RATE * self.m[k]
    self.m[k] = 0.9 * self.m[k] + 0.1 * g
    self.v[k] = 0.999 * self.v[k] + 0.001 * g**2
    m = self.m[k] / (1 - 0.9**self.taken)
    v = self.v[k] / (1 - 0.999**self.taken)
    return p - RATE * (m / (np.sqrt(v) + 1e-8) + DECAY * p)


def all_step(workers, step):
  """Every worker on its rows; the means of what they report."""
  rows = batch(step)
  x, y = (np.split(rows[k], len(workers)) for k in ("x", "y"))
  return np.mean([w.step(*own) for w, *own in zip(workers, x, y)], axis=0)


def average(trees):
  return jax.tree.map(lambda *x: np.mean(x, axis=0), *trees)
