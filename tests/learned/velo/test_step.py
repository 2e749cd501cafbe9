"""VeLO's step against plain NumPy in float64, element after element."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import learned
from distrain_jax.learned.velo import losses, velo_shapes

TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
BETAS = (0.9, 0.99, 0.999)


SHAPES = (
  (),
  (7,),
  (5, 7),
  (7, 5),
  (6, 6),
  (3, 3, 4, 8),
  (3, 3, 8, 4),
  (8, 1),
  (1, 5),
  (2, 6, 6),
)
STEPS, TOTAL = 25, 60


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def rms(x):
  return np.sqrt(np.mean(np.square(x)))


class LossOracle:
  """Ten averages of the loss."""

  def __init__(self, total):
    lives = [10 * (total / 10) ** (k / 9) for k in range(10)]
    self.decay = [np.exp(-1 / life) for life in lives]
    self.mean, self.low = [0.0] * 10, [1e12] * 10
    self.seen = 0

  def step(self, loss):
    n = self.seen + 1
    if self.seen:
      corrected = [m / (1 - d**n) for m, d in zip(self.mean, self.decay)]
      loss = min(loss, 2 * abs(max(corrected)))
    self.seen = n
    now = []
    for k, d in enumerate(self.decay):
      self.mean[k] = d * self.mean[k] + (1 - d) * loss
      now.append(self.mean[k] / (1 - d**n))
      self.low[k] = min(self.low[k], now[k])
    if n <= 2:
      return [0.0] * 9
    out = []
    for k in range(9):
      gap = max(1e-8, now[k + 1] - self.low[k])
      out.append(min(max((now[k] - self.low[k]) / gap - 1, -1), 1))
    return out


class TensorOracle:
  """The averages and features of one tensor; a scalar is a vector of one."""

  def __init__(self, p):
    self.rank = sum(n > 1 for n in np.shape(p))
    self.p = np.array(p, np.float64).reshape(np.shape(p) or (1,))
    self.m = [np.zeros(self.p.shape) for _ in BETAS]
    self.v = np.zeros(self.p.shape)
    self.axes = None
    if self.p.ndim > 1:
      order = sorted(range(self.p.ndim), key=lambda a: (self.p.shape[a], a))
      self.axes = order[-1], order[-2]  # averaged away in rows, in columns
    self.row = [0.0 for _ in BETAS]
    self.col = [0.0 for _ in BETAS]

  def look(self):
    """The last 12 inputs of the LSTM, before a gradient."""
    unit = 1 / np.sqrt(max(1e-9, np.mean(self.p**2)))
    m, v = [unit * m for m in self.m], unit * self.v
    size = lambda x: 0.5 * min(max(np.log(1e-8 + abs(10 * x)), -5), 5)
    rank = [float(self.rank == i) for i in range(5)]
    spread = [size(np.mean((x - x.mean()) ** 2)) for x in m]
    odd = [size(np.mean((v - x.mean()) ** 2)) for x in m]
    return [size(v.mean()), *rank, *spread, *odd]

  def average(self, g):
    square = g**2 + 1e-30
    for i, b in enumerate(BETAS):
      self.m[i] = b * self.m[i] + (1 - b) * g
      row = col = square
      if self.axes:
        row = square.mean(self.axes[0], keepdims=True)
        col = square.mean(self.axes[1], keepdims=True)
      self.row[i] = b * self.row[i] + (1 - b) * row
      self.col[i] = b * self.col[i] + (1 - b) * col
    self.v = 0.999 * self.v + 0.001 * g**2

  def features(self, g):
    ones = np.ones(self.p.shape)
    floor = lambda x: 1 / np.sqrt(np.maximum(x, 1e-9))
    over = 1 / np.sqrt(self.v + 1e-6)
    of_g, of_m = [], []
    for r, c in zip(self.row, self.col):
      if self.axes:
        share = r / (r.mean(self.axes[1], keepdims=True) + 1e-9)
        of_g.append(floor(share) * floor(c))
        of_m.append(of_g[-1])
      else:
        of_g.append(floor(r + 1e-9))
        of_m.append(r**-0.5)
    found = [g, np.minimum(np.maximum(g, -0.1), 0.1), self.p, *self.m, self.v]
    found += [m * over for m in self.m] + [over]
    found += [g * x for x in of_g] + [g * over]
    found += [r * ones for r in self.row] + [c * ones for c in self.col]
    found += [ones / np.sqrt(r + 1e-8) for r in self.row]
    found += [ones / np.sqrt(c + 1e-8) for c in self.col]
    found += [m * x for m, x in zip(self.m, of_m)]
    return [f / np.sqrt(1e-5 + np.mean(f**2)) for f in found]


class Oracle:
  """A training by VeLO.

  Args:
    theta: arrays.
    params: a list of arrays.
    total: steps of the training.
    options: step_mult, interp_mult, scaled (by the tensor's size), mults.
  """

  def __init__(self, theta, params, total, **options):
    self.th = {k: np.asarray(v, np.float64) for k, v in theta.items()}
    self.tensors = [TensorOracle(p) for p in params]
    self.options, self.total, self.t = options, total, 0
    self.losses = LossOracle(total)
    self.h = [self.th["start_hidden"] for _ in params]
    self.c = [self.th["start_cell"] for _ in params]

  def lstm(self, xs):
    th = self.th
    line = lambda name, x: x @ th[name + "_w"] + th[name + "_b"]
    pooled = np.maximum([line("pool", x) for x in xs], 0).max(0)
    for n, x in enumerate(xs):
      z = np.concatenate([line("own", x) + pooled, self.h[n]])
      i, g, f, o = line("lstm", z).reshape(4, -1)
      self.c[n] = sigmoid(f + 1) * self.c[n] + sigmoid(i) * np.tanh(g)
      self.h[n] = sigmoid(o) * np.tanh(self.c[n])
      yield line("controls", self.h[n]), line("rate", self.h[n])[0]

  def step(self, grads, loss):
    th, o = self.th, self.options
    time = [np.tanh(10 * (self.t / self.total - x)) for x in TIMES]
    shared = time + self.losses.step(loss)
    xs = [np.array(shared + tensor.look()) for tensor in self.tensors]
    for n, (controls, rate) in enumerate(list(self.lstm(xs))):
      tensor = self.tensors[n]
      g = np.array(grads[n], np.float64).reshape(tensor.p.shape)
      g = np.minimum(np.maximum(g, -1000), 1000)
      tensor.average(g)
      net = {}
      for name in ("w0", "b0", "w1", "b1", "w2", "b2"):
        mixed = [a * b for a, b in zip(controls, th["bank_" + name])]
        net[name] = o["interp_mult"] * np.mean(mixed, 0)
      size = np.sqrt(np.mean(tensor.p**2) + 1e-9) if o["scaled"] else 1.0
      columns, out = tensor.features(g), np.zeros(tensor.p.shape)
      for index in np.ndindex(out.shape):
        x = np.array([column[index] for column in columns])
        x = np.maximum(x @ net["w0"] + net["b0"], 0)
        x = np.maximum(x @ net["w1"] + net["b1"], 0)
        d, mag, _ = x @ net["w2"] + net["b2"]
        out[index] = rate * o["step_mult"] * d * np.exp(0.001 * mag) * size
      tensor.p = tensor.p - o["mults"][n] * out
    self.t += 1


def make_start(lstm, bank):
  draw = jax.jit(learned.init_velo_theta, static_argnums=(1, 2))
  return draw(jax.random.key(0), lstm, bank)


def make_theta(seed=0, lstm=6, bank=4):
  """Random, with biases and a start of the LSTM that matter."""
  theta, rng = make_start(lstm, bank), np.random.default_rng(seed)
  for name in theta:
    if "_w" not in name:
      size = 0.02 if "bank" in name else 0.2
      noise = rng.normal(size=theta[name].shape, scale=size)
      theta[name] = jnp.asarray(noise, jnp.float32)
  return theta


def draws(seed, shapes=SHAPES, scale=1.0):
  rng = np.random.default_rng(seed)
  return [np.asarray(rng.normal(size=s, scale=scale), "f4") for s in shapes]


def losses_of(steps):
  """Falling and noisy, with a spike that is cut."""
  rng = np.random.default_rng(9)
  found = 2 * np.exp(-np.arange(steps) / 15) + rng.uniform(0, 0.5, steps)
  found[7] = 50.0
  return found.astype("f4")


CASES = {  # what the published VeLO does; muP's; gradients that are cut
  "velo": (SHAPES, 1.0, 40, (1e-5, 100.0, True)),
  "mup": (SHAPES[1:3], 1e-4, 8, (0.5, 1.0, False)),
  "cut": (SHAPES[1:3], 2000.0, 4096, (3e-7, 100.0, False)),
}


@pytest.mark.parametrize("case", CASES)
def test_25_steps_equal_the_oracle(case):
  shapes, scale, tile, (step_mult, interp_mult, scaled) = CASES[case]
  theta, params = make_theta(), draws(1, shapes, 0.3)
  mults = [1.0 if n % 2 else 0.5 for n in range(len(shapes))]
  sizes = {"step_mult": step_mult, "interp_mult": interp_mult}
  tx = learned.velo(
    theta,
    num_steps=TOTAL,
    mup=mults,
    param_scale_mult=scaled,
    tile=tile,
    **sizes,
  )

  @jax.jit
  def update(params, state, grads, loss):
    updates, state = tx.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state

  oracle = Oracle(theta, params, TOTAL, mults=mults, scaled=scaled, **sizes)
  got, state = params, tx.init(params)
  for i, loss in enumerate(losses_of(STEPS)):
    grads = draws(10 + i, shapes, scale)
    got, state = update(got, state, grads, loss)
    oracle.step(grads, float(loss))
  for n, tensor in enumerate(oracle.tensors):
    wanted, shape = tensor.p.reshape(shapes[n]), str(shapes[n])
    assert np.abs(wanted - params[n]).max() > 1e-4, shape  # it has moved
    np.testing.assert_allclose(got[n], wanted, atol=1e-6, err_msg=shape)
  np.testing.assert_allclose(state[0].hidden, oracle.h, atol=1e-5)
  np.testing.assert_allclose(state[0].losses.means, oracle.losses.mean, 1e-5)


def test_counts_are_those_of_the_authors():
  count = lambda *size: sum(math.prod(s) for s in velo_shapes(*size).values())
  assert count() == count(512, 256) == 2_320_385
  assert count(16, 8) == 5_057
  theta = jax.eval_shape(
    lambda k: learned.init_velo_theta(k), jax.random.key(0)
  )
  assert sum(x.size for x in jax.tree.leaves(theta)) == 2_320_385


def test_the_start_is_cut_normal_and_zero():
  theta = make_start(16, 8)
  for name, x in theta.items():
    if "_w" in name:
      spread = np.std(x) * np.sqrt(x.shape[-2])
      assert np.abs(x).max() * np.sqrt(x.shape[-2]) <= 2.0
      assert 0.6 < spread < 1.1, name  # 0.88, of few numbers in some
    else:
      np.testing.assert_array_equal(x, 0.0)


def test_loss_features_are_what_they_say():
  total = jnp.asarray(1000)
  lives = losses.horizons(total)
  np.testing.assert_allclose(lives, np.logspace(1, 3, 10), rtol=1e-5)
  step = jax.jit(lambda old, x, n: losses.next_losses(old, x, n, total, True))

  def run(values):
    state, seen = losses.init_losses(), []
    for n, value in enumerate(values):
      state, features = step(state, jnp.float32(value), jnp.asarray(n))
      seen.append(features)
    return state, np.array(seen)

  _, flat = run([3.0] * 5)
  np.testing.assert_array_equal(flat[:2], 0.0)
  _, falling = run(np.linspace(2, 1, 20))
  np.testing.assert_allclose(falling[3:], -1.0)  # the lowest it has been
  _, rising = run([1.0, 1.0, *np.linspace(1, 3, 30)])
  assert (rising[-1] > 0).all()  # the latest losses are the largest
  once, _ = run([1.0, 1.0, 1e6])
  nothing, _ = run([1.0, 1.0, np.nan])
  jax.tree.map(np.testing.assert_array_equal, once, nothing)
  assert float(once.means.max()) < 3


def test_tensors_hear_of_each_other():
  theta, shapes = make_theta(), ((4, 3), (5,))
  rule = learned.VeloRule(TOTAL, lstm=6)
  params, grads = draws(1, shapes), draws(2, shapes)
  other = [params[0], 100 * params[1]]

  @jax.jit
  def second(params):
    state = learned.velo_init(params, rule)
    for g in (grads, grads):  # before the first, no tensor stands out
      updates, state = learned.velo_step(
        theta, g, state, params, value=1.0, rule=rule
      )
    return updates[0]

  moved = np.abs(second(params) - second(other)).max()
  assert moved > 1e-3 * np.abs(second(params)).max()
