"""A residual network whose layers and units can be left out, and SDP on it.

h = h + tanh((s_l h) a_l + b_l) c_l for each layer l, then gain (h v). In NumPy
and float64 with masks and gradients by hand, and in JAX on what it is given.

Letters in shapes: N workers, L layers, E channels of the stream, M units.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import distrain_jax as dj

N, L, E, M, ROWS, STEPS = 4, 4, 4, 8, 16, 3
RATE, DECAY, CLIP_NORM = 0.02, 0.1, 1.2  # the clip bites in some steps
KEY = jax.random.key(0)
NAMES = {
  "a": ("layers", "embed", "mlp"),
  "b": ("layers", "mlp"),
  "c": ("layers", "mlp", "embed"),
  "s": ("layers", "embed"),
  "v": ("embed",),
  "gain": (),
}
WRITERS = {k: k == "c" for k in NAMES}
LEVELS = {"neuron": 0.5, "block": 0.5, "both": (0.5, 0.5)}
# Once, so that what is judged elementwise is judged once.
ADAMW = optax.adamw(
  RATE,
  weight_decay=DECAY,
  mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
)


def start(units=M):
  rng = np.random.default_rng(0)
  return {
    "a": 0.3 * rng.normal(size=(L, E, units)),
    "b": 0.1 * rng.normal(size=(L, units)),
    "c": 0.2 * rng.normal(size=(L, units, E)),
    "s": 1 + 0.1 * rng.normal(size=(L, E)),
    "v": 0.5 * rng.normal(size=E),
    "gain": np.array(1.2),
  }


def batch(step, rows=ROWS):
  """Rows of different workers differ in their mean too."""
  rng = np.random.default_rng(1 + step)
  x = rng.normal(size=(rows, E)) + np.linspace(-1, 1, rows)[:, None]
  return {"x": x, "y": np.sin(x.sum(1))}


def same_for_all(step):
  """Every worker has the same rows."""
  rows = batch(step, ROWS // N)
  return jax.tree.map(lambda x: np.concatenate([x] * N), rows)


def loss_fn(params, rows, key):
  del key

  def layer(h, p):
    hidden = jnp.tanh((h * p["s"][None]) @ p["a"] + p["b"][None])
    return h + hidden @ p["c"], None

  layers = {k: params[k] for k in "abcs"}
  h, _ = jax.lax.scan(layer, rows["x"].astype(params["v"].dtype), layers)
  error = params["gain"] * (h @ params["v"]) - rows["y"]
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def gradient(p, on, x, y):
  """Loss and gradients in NumPy with the hidden units `on` (L, M), 0 or 1."""
  streams, hiddens, h = [], [], x
  for k in range(L):
    streams.append(h)
    hiddens.append(np.tanh((h * p["s"][k]) @ p["a"][k] + p["b"][k]) * on[k])
    h = h + hiddens[k] @ p["c"][k]
  out = h @ p["v"]
  error = p["gain"] * out - y
  d_out = 2 * error / len(y)
  g = {k: np.zeros_like(z) for k, z in p.items()}
  g["gain"] = np.array((d_out * out).sum())
  g["v"] = h.T @ (d_out * p["gain"])
  d_h = np.outer(d_out * p["gain"], p["v"])
  for k in reversed(range(L)):
    g["c"][k] = hiddens[k].T @ d_h
    d_in = (d_h @ p["c"][k].T) * (1 - hiddens[k] ** 2) * on[k]
    g["b"][k] = d_in.sum(0)
    scaled = streams[k] * p["s"][k]
    g["a"][k] = scaled.T @ d_in
    d_scaled = d_in @ p["a"][k].T
    g["s"][k] = (d_scaled * streams[k]).sum(0)
    d_h = d_h + d_scaled * p["s"][k]
  return np.mean(error**2), g


def masks(level, units=M):
  """Units that each worker holds at coverage 1/2 of each, (N, L, M)."""
  on = np.zeros((N, L, units))
  for w in range(N):
    for k in range(L):
      holds = level == "neuron" or (k - w) % N < N // 2
      for u in range(units):
        if level == "neuron" and units == M:  # N groups of M / N
          on[w, k, u] = (u // (M // N) - w) % N < N // 2
        elif level == "neuron":  # groups of one: half of them from w's place
          on[w, k, u] = (u - w * units // N) % units < units // 2
        elif level == "block":
          on[w, k, u] = holds
        elif holds:  # the two holders have one half each
          lower = w == min(k, (k - 1) % N)
          on[w, k, u] = (u < units // 2) == lower
  return on


def whole_masks(level, on):
  """{parameter: (N, ...)}: who trains what."""
  layer = on.any(2, keepdims=True) if level != "neuron" else np.ones((N, L, 1))
  ones = {k: np.ones((N, *x.shape)) for k, x in start().items()}
  return {
    **ones,
    "a": np.repeat(on[:, :, None, :], E, axis=2),
    "b": on,
    "c": np.repeat(on[:, :, :, None], E, axis=3),
    "s": np.repeat(layer, E, axis=2),
  }


class Oracle:
  """SDP with AdamW in plain loops: dense arrays, masks, means over holders."""

  def __init__(self, level, masking, on):
    self.p, self.taken = start(on.shape[2]), 0
    self.on, self.masking = on, masking
    self.trains = whole_masks(level, on)
    self.m = {k: np.zeros_like(x) for k, x in self.p.items()}
    self.v = {k: np.zeros_like(x) for k, x in self.p.items()}

  def step(self, rows):
    """The mean loss of the workers, and the gradient's norm."""
    sums = {k: np.zeros_like(x) for k, x in self.p.items()}
    losses = []
    for w in range(N):
      mine = slice(w * ROWS // N, (w + 1) * ROWS // N)
      on = self.on[w] if self.masking == "forward" else np.ones_like(self.on[w])
      loss, g = gradient(self.p, on, rows["x"][mine], rows["y"][mine])
      losses.append(loss)
      for k in sums:
        sums[k] = sums[k] + g[k] * self.trains[k][w]
    means = {k: s / self.trains[k].sum(0) for k, s in sums.items()}
    norm = np.sqrt(sum((g**2).sum() for g in means.values()))
    self.taken += 1
    for k, g in means.items():
      self._move(k, g * min(1, CLIP_NORM / norm))
    return np.mean(losses), norm

  def _move(self, k, g):
    self.m[k] = 0.9 * self.m[k] + 0.1 * g
    self.v[k] = 0.999 * self.v[k] + 0.001 * g**2
    m = self.m[k] / (1 - 0.9**self.taken)
    v = self.v[k] / (1 - 0.999**self.taken)
    decay = DECAY * self.p[k] if self.p[k].ndim > 1 else 0.0
    self.p[k] = self.p[k] - RATE * (m / (np.sqrt(v) + 1e-8) + decay)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def shapes_of(params):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def make(level="neuron", *, units=M, tx=ADAMW, loss=loss_fn, **options):
  """SDP on this network, at coverage 1/2 where no other is given."""
  shapes = shapes_of(float32(start(units)))
  half = LEVELS.get(level, 0.5)
  options = {"coverage": half, "level": level, **options}
  return dj.sdp(loss, tx, names=NAMES, shapes=shapes, **options)


class Case(NamedTuple):
  run: dj.Run
  begun: object  # NumPy: the state before the first step
  state: object  # NumPy: after STEPS
  seen: np.ndarray  # (STEPS, 2): loss, grad_norm
  params: dict  # NumPy: the whole model at the end


def numbered(params):
  """Every element of the model has a number of its own."""
  out, at = {}, 1
  for k, x in params.items():
    out[k] = np.arange(at, at + x.size, dtype=np.float32).reshape(x.shape)
    at += x.size
  return out


def numpy(tree):
  return jax.tree.map(np.array, tree)


@functools.cache
def trained(level, masking, shard, units=M, accumulate=1, **options):
  """A method after some steps: compiled once for all tests."""
  method = make(
    level,
    units=units,
    masking=masking,
    shard_optimizer=shard,
    accumulate=accumulate,
    clip_norm=CLIP_NORM,
    **options,
  )
  run, seen = dj.simulate(method, workers=N), []
  state = run.init(KEY, float32(start(units)))
  begun = numpy(state)
  for i in range(STEPS):
    state, metrics = run.step(state, float32(batch(i)), KEY)
    seen.append([float(metrics[k]) for k in ("loss", "grad_norm")])
  params = numpy(run.params(state))
  return Case(run, begun, numpy(state), np.array(seen), params)


@functools.cache
def ids(level):
  """{parameter: (N, ...)}: the numbers of what workers hold, if not all."""
  run = dj.simulate(make(level), workers=N)
  held = numpy(run.init(KEY, numbered(start())).params).held
  return {k: x for k, x in held.items() if x is not None}


CASES = [  # accumulate alternates
  (level, masking, shard, 1 + (i + j + shard) % 2)
  for i, level in enumerate(LEVELS)
  for j, masking in enumerate(("forward", "backward"))
  for shard in (False, True)
]


def case(level, masking, shard, accumulate=None):
  """One of `CASES`."""
  for found in CASES:
    if found[:3] == (level, masking, shard):
      return trained(*found[:3], accumulate=found[3])
  raise KeyError((level, masking, shard))


def of_worker(params, w):
  """What worker w has, as one tree, from a state's `params`."""
  pick = lambda shared, held: shared if held is None else np.asarray(held)[w]
  return jax.tree.map(
    pick, params.shared, params.held, is_leaf=lambda x: x is None
  )


def near(got, expected, tolerance=1e-5):
  def one(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

  jax.tree.map(one, got, expected)


def equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)
