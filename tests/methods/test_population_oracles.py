"""Populations against plain loops in NumPy, and with a member that fails."""

import itertools

import jax
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

N, KEY, RATE, MOMENTUM, STEPS = 4, jax.random.key(3), 0.1, 0.9, 7
TX = optax.sgd(RATE, momentum=MOMENTUM)


def loss_fn(params, batch, key):
  del key
  return ((params["a"] - batch["x"].mean()) ** 2).sum(), {}


def starts():
  rng = np.random.default_rng(0)
  return {"a": rng.normal(size=(N, 4, 5)).astype(np.float32)}


def rows(step):
  """Differ by member and by step."""
  x = np.arange(N)[:, None] * (1 + step % 3) - 1.0
  return {"x": x.astype(np.float32)}


def loops(after, joint=0, start=None):
  """(STEPS + 1, N, 4, 5); `after(step, a)` follows each member's own step.

  In the first `joint` steps all take the mean of their gradients.
  """
  a = np.float64((start or starts())["a"])
  m, out = np.zeros_like(a), [a]
  for step in range(STEPS):
    g = 2 * (a - rows(step)["x"][:, :, None])
    if step < joint:
      g = np.broadcast_to(g.mean(0), g.shape)
    m = MOMENTUM * m + g
    a = a - RATE * m
    if step >= joint:
      a = after(step, a)
    out.append(a)
  return np.stack(out)


def trained(method, start=None):
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, start or starts(), per_worker=True)
  out = [np.asarray(state.params["a"])]
  for step in range(STEPS):
    state, _ = run.step(state, rows(step), KEY)
    out.append(np.asarray(state.params["a"]))
  return np.stack(out)


def mean_of(a):
  return np.broadcast_to(a.mean(0), a.shape)


def near(got, expected):
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_papa_pulls_what_a_members_step_has_made():
  schedule = lambda step: 1.0 / (1 + step)
  method = dj.papa(loss_fn, TX, every=2, alpha=0.7, relative_rate=schedule)

  def pull(step, a):
    weight = 0.3 * schedule(step + 1) if (step + 1) % 2 == 0 else 0.0
    return (1 - weight) * a + weight * mean_of(a)

  near(trained(method), loops(pull))


def test_papa_all_becomes_the_mean_of_what_steps_have_made():
  method = dj.papa(loss_fn, TX, variant="all", every=3, tied=False)
  near(
    trained(method),
    loops(lambda step, a: mean_of(a) if (step + 1) % 3 == 0 else a),
  )


def test_dart_is_joint_and_then_apart():
  one = {"a": np.repeat(starts()["a"][:1], N, 0)}
  method = dj.dart(loss_fn, TX, joint_steps=2, every=2, weight=0.6)

  def meet(step, a):
    due = (step - 1) % 2 == 0
    return 0.4 * a + 0.6 * mean_of(a) if due else a

  near(trained(method, one), loops(meet, joint=2, start=one))


def test_sparta_of_everything_is_the_mean_and_of_a_part_its_part():
  everything = dj.sparta(loss_fn, TX, rate=1.0, layer_schedule="constant")
  near(trained(everything), loops(lambda step, a: mean_of(a)))
  part = dj.sparta(loss_fn, TX, rate=0.4, layer_schedule="constant")
  got, apart = trained(part), trained(dj.ensemble(loss_fn, TX))
  # After one step a coordinate is its member's own or the mean, never both.
  own, mean = apart[1], mean_of(apart[1])
  averaged = np.isclose(got[1], mean, atol=1e-6).all(0)
  kept = (got[1] == own).all(0)
  assert (averaged ^ kept).all() and averaged.sum() == 8  # 0.4 of 20


def test_each_step_chooses_and_routes_anew():
  """And a run that is restored, as it was."""
  still = lambda params, batch, key: (0.0 * params["a"].sum(), {})
  method = dj.wash(still, TX, rate=0.5, layer_schedule="constant")
  start = {"a": np.repeat(np.arange(N, dtype=np.float32), 64).reshape(N, 64)}
  run = dj.simulate(method, workers=N, donate=False)
  states = [run.init(KEY, start, per_worker=True)]
  for _ in range(3):
    states.append(run.step(states[-1], rows(0), KEY)[0])
  values = [np.asarray(x.params["a"]) for x in states]
  again = np.asarray(run.step(states[1], rows(0), KEY)[0].params["a"])
  np.testing.assert_array_equal(again, values[2])
  chosen = [(a != b).any(0) for a, b in itertools.pairwise(values)]
  assert all(x.any() and not x.all() for x in chosen)
  assert len({x.tobytes() for x in chosen}) == 3
  # From one and the same state, another step's key sends values elsewhere.
  moved = states[1]._replace(params=states[0].params)
  first, other = (run.step(s, rows(0), KEY)[0] for s in (states[0], moved))
  both = chosen[0] & (np.asarray(other.params["a"]) != start["a"]).any(0)
  got, elsewhere = (np.asarray(x.params["a"])[:, both] for x in (first, other))
  assert both.any() and (got != elsewhere).any()


@pytest.mark.parametrize("factory", ["wash", "sparta"])
def test_what_a_member_loses_is_not_passed_on(factory):
  method = getattr(dj, factory)(
    loss_fn, TX, rate=1.0, layer_schedule="constant"
  )
  run = dj.simulate(dj.guard(method), workers=N, donate=False)
  before, _ = run.step(run.init(KEY, starts(), per_worker=True), rows(0), KEY)
  spoilt = rows(1)
  spoilt["x"][2] = np.nan
  after, metrics = run.step(before, spoilt, KEY)
  assert int(metrics["worst_member"]) == 2
  jax.tree.map(np.testing.assert_array_equal, after.inner, before.inner)
