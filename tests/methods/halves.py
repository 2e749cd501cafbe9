"""Rounds of two halves, in NumPy and float64, and the same task in JAX.

mean((gain tanh(x w + b) v - y)^2), its gradient by hand; SGD, momentum, AdamW.
"""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import layout

INPUTS, WIDTH, ROWS = 3, 5, 96  # rows of a whole batch
DECAY = 0.1
KEY = jax.random.key(0)


def matrices(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


class Rule(NamedTuple):
  tx: optax.GradientTransformation
  rate: float
  clip_norm: float | None  # bites in some of the steps


RULES = {  # made once, so that what is compiled is found again
  "sgd": Rule(optax.sgd(0.1), 0.1, None),
  "momentum": Rule(optax.sgd(0.05, momentum=0.9), 0.05, 1.3),
  "adamw": Rule(
    optax.adamw(0.02, weight_decay=DECAY, mask=matrices), 0.02, 1.3
  ),
}


def start():
  """Leaves of 15, 5, 5 and 1 elements: none is a multiple of the workers."""
  rng = np.random.default_rng(0)
  return {
    "w": rng.normal(size=(INPUTS, WIDTH)),
    "b": 0.1 * rng.normal(size=WIDTH),
    "v": rng.normal(size=WIDTH),
    "gain": np.array(1.5),
  }


def batch(step, rows=ROWS):
  """Other rows every step; their mean moves along the batch."""
  rng = np.random.default_rng(1 + step)
  x = rng.normal(size=(rows, INPUTS)) + np.linspace(-1, 1, rows)[:, None]
  return {"x": x, "y": np.sin(2 * x.sum(1))}


def repeated(rows, times):
  """The same rows again and again."""
  return jax.tree.map(lambda x: np.concatenate([x] * times), rows)


def loss_fn(params, rows, key):
  del key
  params = float32(params)
  hidden = jnp.tanh(rows["x"] @ params["w"] + params["b"][None])
  error = params["gain"] * (hidden @ params["v"]) - rows["y"]
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def small_tiles(rows=1, alone=12):
  """A module's fixture: buffers of a few elements are cut into slices.

  `w` travels alone, if `alone` is no more than its elements.
  """

  @pytest.fixture(autouse=True, scope="module")
  def patched():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(layout, "TILES", (rows, 1))
      patch.setattr(layout, "LANES", 1)
      patch.setattr(layout, "ALONE", alone)
      yield

  return patched


def begin(run):
  return run.init(KEY, float32(start()))


def steps(run, state, count, first=0):
  """The state after so many steps, and the last one's metrics."""
  for i in range(first, first + count):
    rows = jax.tree.map(np.float32, batch(i))
    state, metrics = run.step(state, rows, KEY)
  return state, metrics


def saved(state):
  """What a checkpoint holds."""
  return jax.tree.map(np.array, state)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def near(got, expected, tolerance=1e-5):
  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

  jax.tree.map(one, got, expected)


def equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def whole(stacked):
  """Leaves (N, ..., m) of pieces back to the parameters' shapes."""
  one = lambda x, like: np.asarray(x).ravel()[: like.size].reshape(like.shape)
  return jax.tree.map(one, stacked, start())


def padding(stacked):
  """What `whole` takes off."""
  one = lambda x, like: np.asarray(x).ravel()[like.size :]
  return jax.tree.map(one, stacked, start())


class Sums(NamedTuple):
  """Of micro-batches: what they add up to, and how many they are."""

  count: int
  loss: float
  mae: float
  grads: dict


def micro_sums(p, micro):
  """Sums over micro-batches [(x, y), ...] of their means and gradients."""
  grads = {k: np.zeros_like(x) for k, x in p.items()}
  loss = mae = 0.0
  for x, y in micro:
    hidden = np.tanh(x @ p["w"] + p["b"])  # (rows, width)
    out = hidden @ p["v"]
    error = p["gain"] * out - y
    d_out = 2 * error / len(y) * p["gain"]
    d_hidden = np.outer(d_out, p["v"]) * (1 - hidden**2)
    grads["w"] += x.T @ d_hidden
    grads["b"] += d_hidden.sum(0)
    grads["v"] += hidden.T @ d_out
    grads["gain"] = grads["gain"] + (2 * error / len(y) * out).sum()
    loss += np.mean(error**2)
    mae += np.mean(np.abs(error))
  return Sums(len(micro), loss, mae, grads)


def together(a, b):
  grads = {k: a.grads[k] + b.grads[k] for k in a.grads}
  return Sums(a.count + b.count, a.loss + b.loss, a.mae + b.mae, grads)


class Optimizer:
  """Parameters and moments; `moved` leaves the original as it was."""

  def __init__(self, name):
    self.name, self.params, self.updates = name, start(), 0
    zeros = lambda: {k: np.zeros_like(p) for k, p in self.params.items()}
    self.m, self.v = zeros(), zeros()

  def moved(self, sums):
    """The optimizer after an update, and the mean gradient's norm."""
    if sums.count == 0:
      return self, 0.0
    new = copy.deepcopy(self)
    grads = {k: g / sums.count for k, g in sums.grads.items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    most = RULES[self.name].clip_norm
    shrink = 1.0 if most is None else min(1.0, most / norm)
    new.updates += 1
    for k, g in grads.items():
      new.params[k] = new.params[k] - RULES[self.name].rate * new._direction(
        k, shrink * g
      )
    return new, norm

  def _direction(self, k, g):
    if self.name == "sgd":
      return g
    if self.name == "momentum":
      self.m[k] = 0.9 * self.m[k] + g
      return self.m[k]
    self.m[k] = 0.9 * self.m[k] + 0.1 * g
    self.v[k] = 0.999 * self.v[k] + 0.001 * g**2
    m = self.m[k] / (1 - 0.9**self.updates)
    v = self.v[k] / (1 - 0.999**self.updates)
    decay = DECAY * self.params[k] if self.params[k].ndim > 1 else 0.0
    return m / (np.sqrt(v) + 1e-8) + decay


def halves_of(rows, workers, k, counts=None):
  """The micro-batches of both halves, of all workers together."""
  found = ([], [])
  x, y = (np.split(rows[name], workers * 2 * k) for name in ("x", "y"))
  for i, micro in enumerate(zip(x, y)):
    worker, half, place = i // (2 * k), i // k % 2, i % k
    if counts is None or place < counts[worker][half]:
      found[half].append(micro)
  return found


class Acco:
  """ACCO from its table: two halves a round, an estimate between the two."""

  def __init__(self, name):
    self.now = self.before = Optimizer(name)  # committed; and a commit ago
    self.point = start()  # theta~
    self.norm = 0.0  # of the gradient last committed

  def round(self, rows, workers, k, counts=None):
    """Loss, mean absolute error, and the norm of the round before."""
    early, late = halves_of(rows, workers, k, counts)
    seen_norm = self.norm
    early = micro_sums(self.point, early)  # g~_t
    late = micro_sums(self.now.params, late)  # g_t
    self.point = self.now.moved(early)[0].params  # its moments are dropped
    both = together(early, late)
    self.before, (self.now, self.norm) = self.now, self.now.moved(both)
    taken = max(both.count, 1)
    return both.loss / taken, both.mae / taken, seen_norm
