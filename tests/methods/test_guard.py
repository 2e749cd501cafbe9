"""Bad steps: all workers skip one or none, and count it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax.methods.guard import SETTLED

pytestmark = pytest.mark.core

N = 4
KEY = functools.partial(jax.random.key, 0)
TX = optax.adam(0.05)
METHODS = {
  "ddp": lambda: dj.ddp(loss_fn, TX),
  "zero1": lambda: dj.zero1(loss_fn, TX, param_dtype="bfloat16"),
}


def loss_fn(params, batch, key):
  """Each row adds its `shift`; sqrt has no finite gradient where `edge` is 0."""
  error = batch["x"] @ params["w"].astype(jnp.float32) - batch["y"]
  noise = jax.random.uniform(key, minval=0.9, maxval=1.1)
  edge = jnp.sqrt(
    batch["edge"] * jnp.square(params["w"].astype(jnp.float32)[0])
  )
  return jnp.mean(noise * error**2 + edge + batch["shift"]), {}


def make_batch(step=0, edge=1.0, **last):
  """8 rows; the last one, of the last worker, is changed by `last`."""
  rng = np.random.default_rng(step)
  x = rng.normal(size=(8, 3)).astype(np.float32)
  batch = {"x": x, "y": x.sum(1), "shift": np.zeros(8, np.float32)}
  for name, value in last.items():
    batch[name][-1] = value
  return batch | {"edge": np.full(8, edge, np.float32)}


@pytest.fixture(scope="module")
def make(mesh):
  """make(method, runner, **options) -> the guarded run, compiled once."""

  @functools.cache
  def run(method, runner="simulate", workers=N, **options):
    guarded = dj.guard(METHODS[method](), **options)
    if runner == "simulate":
      return dj.simulate(guarded, workers=workers, donate=False)
    return dj.distribute(guarded, mesh(workers), donate=False)

  return run


def start(run):
  return run.init(KEY(), {"w": jnp.array([1.0, -1.0, 0.5])})


def steps(run, state, batches):
  for batch in batches:
    state, metrics = run.step(state, batch, KEY())
  return state, metrics


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("runner", ["simulate", "distribute"])
def test_nan_of_one_worker_is_skipped_by_all_and_counted(method, runner, make):
  run = make(method, runner)
  before, _ = steps(run, start(run), [make_batch(0)])
  after, metrics = steps(run, before, [make_batch(1, y=np.nan)])
  assert np.isnan(metrics["loss"])
  assert int(metrics["bad_steps"]) == 1
  assert_same(after._replace(bad=before.bad), before)  # else to the bit
  assert int(after.bad) == 1
  # Outputs declared replicated are so, on each device.
  for leaf in jax.tree.leaves(after.inner.params):
    copies = [np.asarray(s.data) for s in leaf.addressable_shards]
    assert_same(copies, [copies[0]] * len(copies))


@pytest.mark.parametrize("method", METHODS)
def test_after_a_skipped_step_the_run_goes_on_as_if_it_had_not_been(
  method, make
):
  run = make(method, "distribute")
  good = [make_batch(i) for i in range(3)]
  bad = make_batch(9, y=np.inf)
  with_bad, _ = steps(run, start(run), [good[0], bad, good[1], bad, good[2]])
  without, _ = steps(run, start(run), good)
  assert int(with_bad.bad) == 2
  assert_same(with_bad._replace(bad=without.bad), without)


def test_a_gradient_that_is_not_finite_is_bad_though_the_loss_is(make):
  run = make("ddp")
  before = start(run)
  after, metrics = steps(run, before, [make_batch(0, edge=0.0)])
  assert np.isfinite(metrics["loss"])
  assert not np.isfinite(metrics["grad_norm"])
  assert int(after.bad) == 1
  assert_same(after.inner, before.inner)


def test_good_steps_are_those_of_the_method_itself(make):
  bare = dj.simulate(METHODS["zero1"](), workers=N, donate=False)
  run = make("zero1", spike=10.0)
  batches = [make_batch(i) for i in range(4)]
  want, _ = steps(bare, start(bare), batches)
  got, metrics = steps(run, start(run), batches)
  assert_same(got.inner, want)
  assert int(metrics["bad_steps"]) == 0


def test_count_applies_what_it_counts(make):
  bare = dj.simulate(METHODS["ddp"](), workers=N, donate=False)
  run = make("ddp", action="count", spike=2.0)
  batches = [make_batch(0), make_batch(1, y=np.nan), make_batch(2)]
  got, metrics = steps(run, start(run), batches)
  assert_same(got.inner, steps(bare, start(bare), batches)[0])
  assert np.isnan(got.inner.params["w"]).all()
  assert int(metrics["bad_steps"]) == 2  # the NaN, and what came of it


def test_the_mean_loss_is_plain_at_first_and_then_forgets(make):
  run = make("ddp", spike=5.0)
  state, mean = start(run), 0.0
  for i in range(60):
    bad = i % 7 == 3
    batch = make_batch(i, y=np.nan) if bad else make_batch(i)
    state, metrics = run.step(state, batch, KEY())
    if bad:
      continue
    good, loss = int(state.good) - 1, float(metrics["loss"])
    mean += max(0.02, 1 / (good + 1)) * (loss - mean)
    np.testing.assert_allclose(state.mean_loss, mean, rtol=1e-5)
  assert int(state.bad) == 9
  assert int(state.good) == 51


@pytest.mark.parametrize("runner", ["simulate", "distribute"])
def test_a_spike_is_skipped_once_the_mean_is_settled(runner, make):
  run = make("ddp", runner, spike=3.0)
  early, _ = steps(run, start(run), [make_batch(0), make_batch(1, shift=1e4)])
  assert int(early.bad) == 0  # who knows yet what is high
  settled, _ = steps(run, start(run), [make_batch(i) for i in range(SETTLED)])
  limit = 3.0 * float(settled.mean_loss)
  _, metrics = steps(run, settled, [make_batch(99)])
  room = limit - float(metrics["loss"])
  for above, bad in ((-0.01, 0), (0.01, 1)):
    shift = 8 * (room + above)  # of one row of 8
    after, metrics = steps(run, settled, [make_batch(99, shift=shift)])
    np.testing.assert_allclose(metrics["loss"], limit + above, rtol=1e-4)
    assert int(metrics["bad_steps"]) == bad
    assert (int(after.inner.step) == int(settled.inner.step)) == bool(bad)


def test_a_method_without_grad_norm_is_judged_by_its_loss():
  method = METHODS["ddp"]()

  def step(state, batch, key):
    state, metrics = method.step(state, batch, key)
    return state, {"loss": metrics["loss"]}

  run = dj.simulate(dj.guard(method._replace(step=step)), workers=N)
  state, metrics = run.step(start(run), make_batch(0, y=np.nan), KEY())
  assert int(metrics["bad_steps"]) == 1
  state, metrics = run.step(state, make_batch(0), KEY())
  assert int(metrics["bad_steps"]) == 1


@pytest.mark.parametrize("method", METHODS)
def test_counters_outlive_another_number_of_workers(method, make):
  four = make(method)
  two = make(method, "simulate", 2)
  batches = [make_batch(0), make_batch(1, y=np.nan), make_batch(2)]
  state, _ = steps(four, start(four), batches)
  back = four.adopt(two.adopt(state))
  assert_same(back, state)
  assert int(back.bad) == 1


def test_what_cannot_change_its_workers_still_cannot():
  method = METHODS["ddp"]()._replace(reshard=None)
  assert dj.guard(method).reshard is None


@pytest.mark.parametrize(
  "options, message",
  [
    ({"action": "ignore"}, "`action` is skip or count; got 'ignore'"),
    ({"spike": 0.5}, "above 1, or 0 for no such check; got 0.5"),
    ({"spike": float("nan")}, "above 1, or 0 for no such check; got nan"),
    ({"spike": -2.0}, "above 1, or 0 for no such check; got -2.0"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    dj.guard(METHODS["ddp"](), **options)
