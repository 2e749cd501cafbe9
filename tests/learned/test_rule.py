"""The learned rule against NumPy, and its forms against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import learned
from distrain_jax.learned import rule, step, tiles
from distrain_jax.learned.moments import init_moments, next_moments

SHAPES = {
  "scalar": (),
  "vector": (7,),
  "wide": (5, 7),
  "tall": (7, 5),
  "square": (6, 6),
  "conv": (3, 3, 4, 8),
  "conv_back": (3, 3, 8, 4),
  "column": (8, 1),
  "row": (1, 5),
  "ties": (2, 6, 6),
}
STEPS = 25


def make_theta(seed=0):
  """Random, with decays that are not the bases and outputs that matter."""
  rng = np.random.default_rng(seed)
  theta = jax.jit(learned.init_theta)(jax.random.key(seed))
  for name in theta:
    if name[0] != "w":
      size = 0.1 if name[0] == "b" else 0.03
      noise = rng.normal(size=theta[name].shape, scale=size)
      theta[name] = jnp.asarray(noise, jnp.float32)
  return theta


def make_tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  draw = lambda shape: np.asarray(rng.normal(size=shape, scale=scale), "f4")
  return {name: draw(shape) for name, shape in SHAPES.items()}


class Oracle:
  """One tensor, float64, element by element where that is affordable."""

  def __init__(self, theta, p, step_mult, mult):
    self.theta = {k: np.asarray(v, np.float64) for k, v in theta.items()}
    self.p = np.asarray(p, np.float64).reshape(np.shape(p) or (1,))
    self.size, self.mult, self.t = step_mult, mult, 0
    self.shape = self.p.shape
    self.m = [np.zeros(self.shape) for _ in range(3)]
    self.v = np.zeros(self.shape)
    self.matrix = len(self.shape) >= 2
    if self.matrix:
      # Bubble sort is stable: of equal axes the later one ends up larger.
      axes = list(range(len(self.shape)))
      for _ in axes:
        for i in range(len(axes) - 1):
          if self.shape[axes[i]] > self.shape[axes[i + 1]]:
            axes[i], axes[i + 1] = axes[i + 1], axes[i]
      self.d1, self.d0 = axes[-2], axes[-1]
      drop = lambda a: tuple(n for i, n in enumerate(self.shape) if i != a)
      self.r = [np.zeros(drop(self.d0)) for _ in range(3)]
      self.c = [np.zeros(drop(self.d1)) for _ in range(3)]
    else:
      self.f = [np.zeros(self.shape) for _ in range(3)]

  def rate(self, base, offset):
    return 1 - np.exp(10 * (np.log(1 - base) / 10 + offset))

  def step(self, g):
    th = self.theta
    g = np.asarray(g, np.float64).reshape(self.shape)
    bases = (0.9, 0.99, 0.999)
    for i in range(3):
      b = self.rate(bases[i], th["momentum_decays"][i])
      self.m[i] = b * self.m[i] + (1 - b) * g
      b = min(max(self.rate(bases[i], th["adafactor_decays"][i]), 0), 1)
      sq = g**2 + 1e-30
      if self.matrix:
        self.r[i] = b * self.r[i] + (1 - b) * sq.mean(self.d0)
        self.c[i] = b * self.c[i] + (1 - b) * sq.mean(self.d1)
      else:
        self.f[i] = b * self.f[i] + (1 - b) * sq
    b = min(max(self.rate(0.999, th["rms_decays"][0]), 0), 1)
    self.v = b * self.v + (1 - b) * g**2
    columns = [self.normal(f) for f in self.features(g)]
    out = np.zeros(self.shape)
    for index in np.ndindex(self.shape):
      x = [column[index] for column in columns]
      for scale in (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5):
        x.append(np.tanh(self.t / scale - 1))
      x = np.maximum(np.array(x) @ th["w0"] + th["b0"], 0)
      x = np.maximum(x @ th["w1"] + th["b1"], 0)
      d, mag = x @ th["w2"] + th["b2"]
      out[index] = self.mult * self.size * d * np.exp(0.001 * mag)
    self.p, self.t = self.p - out, self.t + 1

  def normal(self, f):
    return f / np.sqrt(1e-5 + (f**2).mean())

  def features(self, g):
    S = lambda x: 1 / np.sqrt(np.maximum(x, 1e-9))
    inverse = 1 / np.sqrt(self.v + 1e-6)
    fs = [g, self.p, *self.m, self.v]
    fs += [m * inverse for m in self.m] + [inverse]
    if not self.matrix:
      fs += [g * S(f + 1e-9) for f in self.f]
      fs += self.f + self.f
      fs += [(f + 1e-8) ** -0.5 for f in self.f] * 2
      return fs + [m * (f + 1e-6) ** -0.5 for m, f in zip(self.m, self.f)]
    # Where d1 is among the axes that r kept.
    kept = self.d1 - (self.d0 < self.d1)
    spread_r = lambda r: np.repeat(
      np.expand_dims(r, self.d0), self.shape[self.d0], self.d0
    )
    spread_c = lambda c: np.repeat(
      np.expand_dims(c, self.d1), self.shape[self.d1], self.d1
    )
    pre = []
    for r, c in zip(self.r, self.c):
      ratio = r / (r.mean(kept, keepdims=True) + 1e-9)
      pre.append(spread_r(S(ratio)) * spread_c(S(c)))
    fs += [g * x for x in pre]
    fs += [spread_r(r) for r in self.r] + [spread_c(c) for c in self.c]
    fs += [spread_r((r + 1e-8) ** -0.5) for r in self.r]
    fs += [spread_c((c + 1e-8) ** -0.5) for c in self.c]
    return fs + [m * x for m, x in zip(self.m, pre)]


def train(tx, params, grads):
  update = jax.jit(
    lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(
      *tx.update(g, s, p)
    )
  )
  state = tx.init(params)
  for g in grads:
    params, state = update(params, state, g)
  return params


@pytest.mark.parametrize(
  ("implementation", "scale", "names"),
  [
    ("tiled", 1.0, tuple(SHAPES)),
    ("tiled", 1e-4, ("vector", "conv")),
    ("reference", 1.0, ("scalar", "tall", "ties")),
  ],
)
def test_25_steps_equal_the_oracle(scale, implementation, names):
  some = lambda tree: {name: tree[name] for name in names}
  theta, params = make_theta(), some(make_tree(1, 0.3))
  grads = [some(make_tree(10 + i, scale)) for i in range(STEPS)]
  multipliers = {n: 1.0 if i % 2 else 0.25 for i, n in enumerate(names)}
  tx = learned.mulo(
    theta, mup=multipliers, implementation=implementation, tile=8
  )
  got = train(tx, params, grads)
  for name, p in params.items():
    oracle = Oracle(theta, p, 0.01, multipliers[name])
    for g in grads:
      oracle.step(g[name])
    wanted = oracle.p.reshape(p.shape)
    assert np.abs(wanted - p).max() > 1e-3  # it has moved
    np.testing.assert_allclose(got[name], wanted, atol=1e-6, err_msg=name)


def trained_moments(theta, shape, count, scale=1.0, stacked=0):
  moments = init_moments(jnp.zeros(shape), stacked, jnp.float32)
  rates = learned.decay_rates(theta)
  step = jax.jit(next_moments, static_argnums=3)
  rng = np.random.default_rng(3)
  for _ in range(count):
    g = jnp.asarray(rng.normal(size=shape, scale=scale), jnp.float32)
    moments = step(rates, moments, g, stacked)
  return g, moments


OPTIONS = {"exp_mult": 0.001, "feature_eps": 1e-5, "precision": "highest"}


# Prime lengths leave rows over; (1, n) and (n, 1) have nothing on one side.
@pytest.mark.parametrize(
  ("shape", "tile"),
  [
    ((64, 48), 100),
    ((37, 41), 100),
    ((3, 3, 5, 16), 40),
    ((101,), 16),
    ((1, 97), 16),
    ((97, 1), 10**6),
  ],
)
def test_tiles_of_any_size_equal_the_whole(shape, tile):
  theta = make_theta()
  g, moments = trained_moments(theta, shape, 3)
  p = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  args = (theta, g, p, moments, jnp.asarray(5))
  whole = jax.jit(lambda *a: rule.direction(*a, **OPTIONS))(*args)
  tiled = jax.jit(lambda *a: tiles.direction(*a, tile=tile, **OPTIONS))(*args)
  size = float(jnp.abs(whole).max())
  np.testing.assert_allclose(tiled, whole, atol=2e-6 * size, rtol=0)


def test_a_feature_is_normalised_to_its_size_over_the_floor():
  theta = make_theta()
  g, moments = trained_moments(theta, (6, 9), 3, scale=1e-3)
  eps = 1e-5
  for f in rule.features(g, 0.1 * g, moments):
    raw = float(jnp.mean(f * f))
    wanted = np.sqrt(raw / (raw + eps))
    got = float(jnp.sqrt(jnp.mean(rule.normalise(f, eps) ** 2)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_time_starts_at_tanh_of_minus_one_and_is_not_normalised():
  start = rule.time_features(jnp.asarray(0))
  np.testing.assert_allclose(start, np.full(11, np.tanh(-1.0)), rtol=1e-6)
  late = rule.time_features(jnp.asarray(3000))
  assert float(late[0]) == 1.0 and abs(float(late[7])) < 1e-6


def test_the_multiplier_scales_the_update_and_nothing_else():
  theta, few = make_theta(), ("scalar", "vector", "wide")
  params, grads = ({k: make_tree(i)[k] for k in few} for i in (1, 2))
  updates = []
  for mult in (1.0, 0.25):  # a power of two: exact
    tx = learned.mulo(theta, mup=mult)
    updates.append(jax.jit(tx.update)(grads, tx.init(params), params))
  quarter = jax.tree.map(lambda x: 0.25 * x, updates[0][0])
  jax.tree.map(np.testing.assert_array_equal, quarter, updates[1][0])
  jax.tree.map(np.testing.assert_array_equal, updates[0][1], updates[1][1])


def test_decays_of_the_published_weights():
  """Offsets of the released muLO_M and what they stand for."""
  theta = {
    **make_theta(),
    "momentum_decays": jnp.array([0.15216392, 0.14245212, 0.06812963]),
    "rms_decays": jnp.array([0.01079706]),
    "adafactor_decays": jnp.array([0.18621896, -0.10864615, -0.06185547]),
  }
  m, v, f = learned.decay_rates(theta)
  np.testing.assert_allclose(m, [0.5421, 0.95844, 0.99802], atol=1e-4)
  np.testing.assert_allclose(v, [0.99889], atol=1e-5)
  np.testing.assert_allclose(f, [0.35614, 0.99663, 0.99946], atol=1e-4)


def test_stacked_layers_are_parameters_of_their_own():
  theta = make_theta()
  rng = np.random.default_rng(0)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  stack = {"w": draw(3, 4, 6), "b": draw(3, 6), "g": draw(3)}
  grads = jax.tree.map(lambda x: draw(*x.shape), stack)
  whole = learned.mulo(theta, stacked=1, tile=8)
  got, state = jax.jit(whole.update)(grads, whole.init(stack), stack)
  assert state[0].moments["w"].factors[0].shape == (3, 3, 4)
  one = learned.mulo(theta)
  update = jax.jit(one.update)
  for i in range(3):
    at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    own, g = at(stack), at(grads)
    alone, _ = update(g, one.init(own), own)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7)
    jax.tree.map(near, at(got), alone)
  # Seen as one parameter it would be another update.
  other, _ = update(grads, one.init(stack), stack)
  assert float(jnp.abs(other["w"] - got["w"]).max()) > 1e-4


def test_temporaries_stay_below_64_bytes_an_element():
  theta, x = make_theta(), jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  tx = learned.mulo(theta)
  state = jax.eval_shape(tx.init, x)
  step = jax.jit(tx.update, donate_argnums=(0, 1))
  memory = step.lower(x, state, x).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 64 * 4096**2


def sizes(n, scaling):
  """Root mean squares of a hidden matrix's normalised features at width n."""
  theta, rng = make_theta(), np.random.default_rng(0)
  draw = lambda power: jnp.asarray(rng.normal(size=(n, n)) / n**power, "f4")
  rates, moments = learned.decay_rates(theta), None
  for _ in range(2):  # gradients and parameters as they are under muP
    g, p = step.seen(1e-4 * draw(1), draw(0.5), 1 / n, scaling)
    old = init_moments(g, 0, jnp.float32) if moments is None else moments
    moments = jax.jit(next_moments, static_argnums=3)(rates, old, g, 0)
  found = rule.features(g, p, moments)
  rms = lambda f: jnp.sqrt(jnp.mean(rule.normalise(f, 1e-5) ** 2))
  return np.array([float(rms(f)) for f in found])


FADING = [0, *range(2, 9), *range(13, 19)]  # g, m, v, m / root of v, row, col
VARYING = [9, *range(19, 25)]  # inverse roots of squares


def test_features_of_a_hidden_matrix_keep_their_size_at_every_width():
  narrow, wide = sizes(16, None), sizes(256, None)
  assert (wide[FADING] < 0.3 * narrow[FADING]).all()
  narrow, wide = sizes(16, "fan_in"), sizes(256, "fan_in")
  np.testing.assert_allclose(wide, narrow, rtol=0.1)
  assert (wide[VARYING] > 0.99).all()


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
def test_scaled_epsilons_see_a_wide_matrix_as_a_narrow_one(implementation):
  n, few = 64.0, ("tall",)
  params, grads = ({k: make_tree(i)[k] for k in few} for i in (1, 2))
  by = lambda tree, x: jax.tree.map(lambda a: np.float32(a / x), tree)

  def step_of(params, grads, mult, eps_scaling):
    tx = learned.mulo(
      make_theta(),
      mup=mult,
      implementation=implementation,
      eps_scaling=eps_scaling,
      tile=8,
    )
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]

  plain = step_of(params, grads, 1.0, None)
  wide = by(params, np.sqrt(n)), by(grads, n)
  got = step_of(*wide, 1 / n, "fan_in")
  near = lambda a, b: np.testing.assert_allclose(n * a, b, atol=1e-7, rtol=1e-4)
  jax.tree.map(near, got, plain)
