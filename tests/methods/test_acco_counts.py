"""ACCO with workers that contribute different numbers of micro-batches."""

import functools

import halves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distrain_jax as dj
from distrain_jax import layout

pytestmark = pytest.mark.core

KEY, N, K = halves.KEY, 4, 3
SLOTS, EACH = N * 2 * K, 2  # micro-batches of a step at most, and their rows
FULL = np.full((N, 2), K)
RULE = halves.RULES["adamw"]
# Slices of a few elements beside the first two micro-batches of a half.
small_tiles = halves.small_tiles(alone=layout.ALONE)


def make(loss_fn=halves.loss_fn, tx=RULE.tx, **options):
  options = {"clip_norm": RULE.clip_norm, "wire_dtype": None, **options}
  return dj.acco(loss_fn, tx, accumulate=K, **options)


@functools.cache
def simulated():
  return dj.simulate(make(), workers=N, donate=False)


@functools.cache
def started():
  return halves.begin(simulated())


def taken(counts):
  """(SLOTS,): which micro-batches of a step count."""
  return (np.arange(K) < np.asarray(counts)[..., None]).ravel()


def counted(rows, counts):
  """The batch with NaN wherever no micro-batch is taken."""

  def one(x):
    x = np.float32(x)
    x[~np.repeat(taken(counts), EACH)] = np.nan
    return x

  return dj.Counted(jax.tree.map(one, rows), np.asarray(counts))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
  st.lists(st.integers(0, K), min_size=2 * N, max_size=2 * N),
  st.randoms(use_true_random=False),
)
def test_any_split_of_the_same_microbatches_gives_the_same(counts, random):
  counts = np.reshape(counts, (N, 2))
  total = counts.sum()
  pool = halves.batch(0, SLOTS * EACH)
  early, late = halves.halves_of(pool, N, K)
  micro = (early + late)[:total]
  slots = np.flatnonzero(taken(counts))
  random.shuffle(order := list(range(total)))
  rows = {"x": np.zeros((SLOTS * EACH, 3)), "y": np.zeros(SLOTS * EACH)}
  for slot, which in zip(slots, order):
    here = slice(slot * EACH, (slot + 1) * EACH)
    rows["x"][here], rows["y"][here] = micro[which]

  run = simulated()
  state, metrics = run.step(started(), counted(rows, counts), KEY)
  sums = halves.micro_sums(halves.start(), micro)
  expected, _ = halves.Optimizer("adamw").moved(sums)
  halves.near(run.params(state), expected.params)
  halves.near(metrics["loss"], sums.loss / max(total, 1))
  assert float(state.count + state.reduced_count) == total


ROUNDS = [  # some alone, a half of nobody's, a step of nobody's, all, one
  [[3, 1], [0, 2], [1, 0], [2, 3]],
  [[0, 0], [3, 3], [0, 0], [0, 0]],
  [[0, 1], [0, 3], [0, 0], [0, 2]],
  [[2, 0], [1, 0], [3, 0], [1, 0]],
  np.zeros((N, 2), int),
  [[1, 2], [3, 2], [0, 1], [2, 1]],
  np.zeros((N, 2), int),
  FULL,
  [[0, 0], [0, 0], [1, 0], [0, 0]],
]


def assert_oracle(run):
  oracle, state = halves.Acco("adamw"), halves.begin(run)
  for i, counts in enumerate(ROUNDS):
    rows = halves.batch(i, SLOTS * EACH)
    state, metrics = run.step(state, counted(rows, counts), KEY)
    expected = oracle.round(rows, N, K, np.asarray(counts))
    got = tuple(float(metrics[k]) for k in ("loss", "mae", "grad_norm"))
    halves.near(got, expected)
    halves.near(run.params(state), oracle.now.params)
    halves.near(halves.whole(state.shard.masters), oracle.before.params)
    halves.near(state.estimate, oracle.point)
    count = state.shard.opt_state[0].count
    assert (np.asarray(count) == oracle.before.updates).all()
  assert oracle.before.updates == len(ROUNDS) - 1 - 2  # two made no update
  assert run.step.compilations() == 1


def test_uneven_rounds_equal_the_oracle():
  assert_oracle(simulated())


def test_so_they_do_on_a_mesh_where_each_worker_makes_its_own_trips(mesh):
  assert_oracle(dj.distribute(make(), mesh(N)))


def test_a_step_without_any_microbatch_changes_nothing_and_says_zero():
  run = simulated()
  nothing = np.zeros((N, 2), int)
  rows = halves.batch(0, SLOTS * EACH)
  state, _ = run.step(started(), counted(rows, FULL), KEY)
  state, metrics = run.step(state, counted(rows, nothing), KEY)
  assert float(metrics["loss"]) == float(metrics["mae"]) == 0.0
  assert float(metrics["grad_norm"]) > 0.0  # of what was pending
  before = jax.tree.map(np.asarray, (state.shard, run.params(state)))
  halves.equal(state.estimate, before[1])
  state, metrics = run.step(state, counted(rows, nothing), KEY)
  halves.equal((state.shard, run.params(state)), before)
  assert float(metrics["grad_norm"]) == 0.0


def test_all_microbatches_counted_is_as_without_counts():
  run, plain = simulated(), dj.simulate(make(), workers=N, donate=False)
  state = expected = started()
  for i in range(3):
    rows = jax.tree.map(np.float32, halves.batch(i, SLOTS * EACH))
    counts = FULL + i  # there are no more than K to take
    state, metrics = run.step(state, dj.Counted(rows, counts), KEY)
    expected, plains = plain.step(expected, rows, KEY)
    halves.near(metrics, plains, 2e-6)
    halves.near(run.params(state), plain.params(expected), 2e-6)


def value(params, rows, key):
  return params * rows["x"].mean(), {}


@pytest.mark.parametrize("warmup", [0, 1])
def test_the_gradient_is_a_sum_over_a_sum_and_not_a_mean_of_means(warmup):
  method = make(value, optax.sgd(1.0), clip_norm=None, warmup=warmup)
  run = dj.simulate(method, workers=2)
  x = np.zeros((2, 2, K), np.float32)
  x[0, 0], x[1, 1, 0] = 1.0, 5.0
  counts = np.array([[3, 0], [0, 1]])
  batch = dj.Counted({"x": x.ravel()}, counts)
  state = run.init(KEY, jnp.zeros(()))
  state, metrics = run.step(state, batch, KEY)
  assert float(run.params(state)) == -(3 * 1 + 5) / 4
  nothing = dj.Counted({"x": x.ravel() * np.nan}, 0 * counts)
  state, metrics = run.step(state, nothing, KEY)
  assert float(run.params(state)) == -2.0
  assert float(metrics["grad_norm"]) == (0.0 if warmup else 2.0)


@pytest.mark.parametrize(
  ("counts", "says"),
  [
    (np.full((N, 2), 1.0), r"float32 and, for one worker, the shape \(1, 2\)"),
    (np.full((N, 3), 1), r"the shape \(1, 3\) instead of \(1, 2\)"),
    (np.full((2 * N, 2), 1), r"the shape \(2, 2\) instead of \(1, 2\)"),
    (np.full(N, 1), r"the shape \(1,\) instead of \(1, 2\)"),
    (np.full((N, 2), True), "got bool"),
  ],
)
def test_counts_that_are_not_one_whole_number_a_half_are_refused(counts, says):
  rows = jax.tree.map(np.float32, halves.batch(0, SLOTS * EACH))
  with pytest.raises(ValueError, match="acco: Counted.counts.*" + says):
    simulated().step(started(), dj.Counted(rows, counts), KEY)


def test_counts_of_other_workers_than_there_are_are_refused():
  rows = jax.tree.map(np.float32, halves.batch(0, SLOTS * EACH))
  batch = dj.Counted(rows, np.ones((N - 1, 2), int))
  with pytest.raises(ValueError, match=r"counts.*\(3, 2\)"):
    simulated().step(started(), batch, KEY)


def test_statistics_that_all_workers_make_together_cannot_be_counted():
  fn = lambda params, seen, rows, key: (
    params * rows["x"].mean(),
    ({}, jax.lax.pmean(seen, "data")),
  )
  loss_fn = dj.stateful(fn, stats="synchronised")
  run = dj.simulate(make(loss_fn, optax.sgd(1.0)), workers=N)
  state = run.init(KEY, dj.Variables(jnp.zeros(()), jnp.zeros(())))
  batch = dj.Counted({"x": np.ones(SLOTS, np.float32)}, FULL)
  with pytest.raises(ValueError, match=r"acco: .*stats='averaged'"):
    run.step(state, batch, KEY)
