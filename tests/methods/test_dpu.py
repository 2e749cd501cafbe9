"""Delayed updates and weight prediction: NumPy loops, lateness, stability."""

import functools

import halves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

KEY, N, STEPS = halves.KEY, 4, 12
FACTORIES = {"dpu": dj.dpu, "weight_prediction": dj.weight_prediction}
by_name = pytest.mark.parametrize("name", FACTORIES)
by_rule = pytest.mark.parametrize("rule", halves.RULES)
small_tiles = halves.small_tiles()


def make(name, rule, **options):
  options = {"clip_norm": halves.RULES[rule].clip_norm, **options}
  options = {"wire_dtype": None, "accumulate": 2, **options}
  return FACTORIES[name](halves.loss_fn, halves.RULES[rule].tx, **options)


@functools.cache
def simulated(name, rule, **options):
  return dj.simulate(make(name, rule, **options), workers=N)


def train(run, steps=STEPS, state=None, first=0):
  """States after each step, as NumPy holds them, and each step's metrics."""
  if state is None:
    state = halves.begin(run)
  states, seen = [], []
  for i in range(first, first + steps):
    rows = jax.tree.map(np.float32, halves.batch(i))
    state, metrics = run.step(state, rows, KEY)
    states.append(jax.tree.map(np.asarray, state))
    seen.append([float(metrics[k]) for k in ("loss", "mae", "grad_norm")])
  return states, np.array(seen)


def gradient_at(params, step):
  rows = halves.batch(step)
  micro = zip(*(np.split(rows[k], 2 * N) for k in ("x", "y")))
  return halves.micro_sums(params, list(micro))


class Oracle:
  """The two recursions of the module's docstring, one gradient at a time."""

  def __init__(self, name, rule):
    self.predicts = name == "weight_prediction"
    self.now, self.point = halves.Optimizer(rule), halves.start()
    self.pending, self.norm = None, 0.0

  def step(self, i):
    new = gradient_at(self.point, i)
    norm = 0.0
    if self.pending is not None:
      self.now, norm = self.now.moved(self.pending)
      self.point = self.now.params
      if self.predicts:  # of the second step only the parameters are kept
        self.point = self.now.moved(self.pending)[0].params
    self.pending = new
    return new.loss / new.count, new.mae / new.count, norm

  def committed(self):
    return self.now.moved(self.pending)[0].params


@by_name
@by_rule
def test_they_are_the_recursions_of_a_plain_loop(name, rule):
  oracle, run = Oracle(name, rule), simulated(name, rule)
  states, seen = train(run)
  for i, state in enumerate(states):
    np.testing.assert_allclose(oracle.step(i), seen[i], rtol=1e-4)
    halves.near(halves.whole(state.shard.masters), oracle.now.params)
    halves.near(state.point, oracle.point)
  halves.near(run.params(states[-1]), oracle.committed())


@by_name
def test_so_they_are_on_a_mesh(name, mesh):
  expected, seen = train(simulated(name, "adamw"))
  run = dj.distribute(make(name, "adamw"), mesh(N))
  states, found = train(run)
  np.testing.assert_allclose(found, seen, rtol=1e-5)
  halves.near(states[-1].point, expected[-1].point, 2e-6)


@by_name
def test_an_optimizer_advances_once_a_step(name):
  states, _ = train(simulated(name, "adamw"))
  counts = [int(s.shard.opt_state[0].count[0]) for s in states]
  assert counts == list(range(STEPS))


def test_an_update_applies_the_gradient_of_a_step_ago_once():
  """The gradient is the step's number: what has been applied adds up."""

  def loss(w, batch, key):
    return w * batch["tag"].mean(), {}

  run = dj.simulate(dj.dpu(loss, optax.sgd(1.0), wire_dtype=None), workers=N)
  state = run.init(KEY, jnp.zeros(()))
  for i in range(1, 8):
    state, _ = run.step(state, {"tag": np.full(N, i, np.float32)}, KEY)
    assert float(state.point) == -sum(range(i))
    assert float(run.params(state)) == -sum(range(i + 1))


def modes(name, a, steps):
  """Parameters of the quadratic a w^2 / 2 from 1, step by step, rate 1."""

  def loss(w, batch, key):
    return jnp.mean(a * w**2 / 2 + 0 * batch["x"]), {}

  factory = getattr(dj, name)
  run = dj.simulate(factory(loss, optax.sgd(1.0), wire_dtype=None), workers=1)
  state, seen = run.init(KEY, jnp.ones(())), []
  for _ in range(steps):
    state, _ = run.step(state, {"x": np.zeros(2, np.float32)}, KEY)
    seen.append(float(run.params(state)))
  return np.array(seen)


@pytest.mark.parametrize(
  ("name", "limit"), [("dpu", 1.0), ("weight_prediction", 0.618), ("acco", 2.0)]
)
def test_on_a_quadratic_they_are_stable_up_to_their_limit(name, limit):
  below = np.abs(modes(name, 0.97 * limit, 400))
  above = np.abs(modes(name, 1.03 * limit, 400))
  assert below[-20:].max() < 0.5 * below[:20].max()
  assert above[-20:].max() > 2 * above[:20].max()


@pytest.mark.parametrize("a", [0.3, 1.5])
def test_acco_s_factor_on_a_quadratic_is_that_of_sgd(a):
  seen = modes("acco", a, 12)
  np.testing.assert_allclose(seen, (1 - a) ** np.arange(1, 13), rtol=1e-4)


@by_name
def test_warm_up_is_ddp_and_loses_no_gradient(name):
  rule = halves.RULES["adamw"]
  ddp = dj.ddp(halves.loss_fn, rule.tx, accumulate=2, clip_norm=rule.clip_norm)
  plain = dj.simulate(ddp, workers=N)
  early = simulated(name, "adamw", warmup=5)
  states, seen = train(early)
  expected, plain_seen = train(plain, steps=6)
  for i in range(5):
    halves.near(states[i].point, expected[i].params, 2e-6)
    np.testing.assert_allclose(seen[i], plain_seen[i], rtol=1e-5)
  # The first gradient after it is DDP's too, and is the next to be applied.
  halves.near(early.params(states[5]), expected[5].params, 2e-6)


@by_name
def test_only_the_micro_batches_that_were_taken_count(name):
  run = simulated(name, "sgd")
  state = halves.begin(run)
  rows = jax.tree.map(np.float32, halves.batch(0))
  rows["x"][: 96 // N // 2] = np.nan  # what worker 0 would begin with
  counts = np.array([[0], [2], [1], [2]])
  state, _ = run.step(state, dj.Counted(rows, counts), KEY)
  oracle = halves.Optimizer("sgd")
  taken = []
  for w in range(N):
    for i in range(counts[w, 0]):
      at = slice((2 * w + i) * 12, (2 * w + i + 1) * 12)
      taken.append((rows["x"][at].astype(float), rows["y"][at]))
  expected, _ = oracle.moved(halves.micro_sums(oracle.params, taken))
  halves.near(run.params(state), expected.params)
  nobody = dj.Counted(rows, np.zeros((N, 1), int))
  before = run.params(state)
  state, metrics = run.step(state, nobody, KEY)  # commits what was pending
  halves.equal(run.params(state), before)
  assert float(metrics["loss"]) == 0
  after, metrics = run.step(jax.tree.map(jnp.copy, state), nobody, KEY)
  halves.equal(after.shard, state.shard)


@by_name
def test_another_number_of_workers_goes_on_with_what_is_pending(name):
  run = simulated(name, "momentum")
  states, _ = train(run, steps=5)
  expected = run.params(states[-1])
  two = dj.simulate(make(name, "momentum", accumulate=4), workers=2)
  state = two.adopt(states[-1])
  halves.near(two.params(state), expected, 2e-6)
  later, _ = train(two, steps=4, state=state, first=5)
  straight, _ = train(
    run, steps=4, state=jax.tree.map(jnp.asarray, states[-1]), first=5
  )
  halves.near(two.params(later[-1]), run.params(straight[-1]), 2e-5)


@by_name
def test_counts_are_of_one_part(name):
  run = simulated(name, "sgd")
  state = run.abstract(KEY, halves.float32(halves.start()))
  rows = jax.tree.map(np.float32, halves.batch(0))
  with pytest.raises(ValueError, match=r"shape \(workers, 1\)"):
    run.step.lower(state, dj.Counted(rows, np.ones((N, 2), int)), KEY)
