"""PAPA and DART: what becomes of the members, and when."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

N, KEY = 4, jax.random.key(3)
BATCH = {"x": np.arange(N, dtype=np.float32)[:, None]}


def still(params, batch, key):
  del batch, key
  return 0.0 * params["a"].sum(), {}


def pull(params, batch, key):
  del key
  return ((params["a"] - batch["x"].mean()) ** 2).sum(), {}


def starts(n=N):
  rng = np.random.default_rng(0)
  return {"a": rng.normal(size=(n, 3, 5)).astype(np.float32)}


def trace(method, steps, n=N, start=None):
  """(steps + 1, N, 3, 5): the members' weights."""
  run = dj.simulate(method, workers=n)
  state = run.init(KEY, start or starts(n), per_worker=True)
  out = [np.asarray(state.params["a"])]
  rows = {"x": np.arange(n, dtype=np.float32)[:, None]}
  for _ in range(steps):
    state, _ = run.step(state, rows, KEY)
    out.append(np.asarray(state.params["a"]))
  return np.stack(out)


def apart(x):
  return np.square(x - x.mean(0)).sum()


def changed(values):
  return [bool(np.any(a != b)) for a, b in itertools.pairwise(values)]


def papa(loss=still, tx=None, **options):
  return dj.papa(loss, tx or optax.sgd(0.1), **options)


def test_a_pull_keeps_the_mean_and_shrinks_the_distance():
  schedule = lambda step: 1.0 / (1 + step)
  values = trace(papa(every=2, alpha=0.8, relative_rate=schedule), 6)
  assert changed(values) == [False, True] * 3
  np.testing.assert_allclose(values[-1].mean(0), values[0].mean(0), atol=1e-6)
  for step in (1, 3, 5):
    weight = 0.2 * schedule(step + 1)  # of the step after
    ratio = apart(values[step + 1]) / apart(values[step])
    np.testing.assert_allclose(ratio, (1 - weight) ** 2, rtol=1e-5)


def test_the_authors_counter_starts_anew_with_every_epoch():
  values = trace(papa(every=3, tied=False, epoch_steps=5, stop_after=9), 11)
  assert changed(values) == [i in (0, 3, 5, 8) for i in range(11)]


def test_alpha_1_is_an_ensemble_to_the_bit():
  tx = optax.adam(0.1)
  one = trace(papa(pull, tx, every=1, alpha=1, tied=False), 3)
  two = trace(dj.ensemble(pull, tx), 3)
  np.testing.assert_array_equal(one, two)


def test_papa_all_replaces_everyone_by_the_mean():
  values = trace(papa(variant="all", every=2), 2)
  np.testing.assert_array_equal(values[1], values[0])
  np.testing.assert_allclose(apart(values[2]), 0, atol=1e-10)
  np.testing.assert_allclose(values[2][0], values[0].mean(0), atol=1e-6)


def test_a_pull_comes_every_ten_steps_unless_told_otherwise():
  values = trace(papa(tied=False), 20)
  assert changed(values) == [i in (9, 19) for i in range(20)]


@pytest.mark.parametrize("variant", ["all", "pair"])
def test_what_repairs_an_average_is_told_all_it_may_need(variant):
  """Here it takes the place of the average, with what it was told."""

  def repair(own, average, rows, mean, sharing):
    assert sharing == (None if variant == "pair" else "population")
    of = jax.lax.axis_index("population").astype(jnp.float32)
    draw = jax.random.uniform(rows.key)
    told = [own["a"][0, 0], average["a"][0, 0], mean(own)["a"][0, 0]]
    told += [mean({"of": of})["of"], rows.batch["x"][0, 0], draw]
    new = average["a"].ravel().at[: len(told)].set(jnp.stack(told))
    return {"a": new.reshape(average["a"].shape)}

  def keyed(params, batch, key):
    del batch
    return 0.0 * params["a"].sum() + jax.random.uniform(key), {}

  method = papa(keyed, variant=variant, every=2, repair=repair)
  plain = trace(papa(variant=variant, every=2), 2)
  values = trace(method, 2)
  np.testing.assert_array_equal(values[:2], plain[:2])
  told = values[2].reshape(N, -1)
  np.testing.assert_array_equal(told[:, 6:], plain[2].reshape(N, -1)[:, 6:])
  own, average, again, of, row, draw = told[:, :6].T
  np.testing.assert_array_equal(own, plain[1][:, 0, 0])
  np.testing.assert_array_equal(average, plain[2][:, 0, 0])
  np.testing.assert_array_equal(again, average)
  np.testing.assert_array_equal(row, np.arange(N))
  assert len(set(draw.tolist())) == N  # each member's own key
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, starts(), per_worker=True)
  for _ in range(2):
    state, metrics = run.step(state, BATCH, KEY)
  np.testing.assert_allclose(metrics["loss"], draw.mean(), rtol=1e-6)
  if variant == "all":
    np.testing.assert_array_equal(of, [(N - 1) / 2] * N)
  else:  # half the sum of two members' numbers, those of the pair
    pairs = list(itertools.combinations(range(N), 2))
    for n in range(N):
      means = [(values[1][i] + values[1][j]) / 2 for i, j in pairs]
      close = [np.allclose(plain[2][n], x, atol=1e-6) for x in means]
      assert of[n] == sum(pairs[close.index(True)]) / 2


def test_repair_of_variables_may_change_what_is_not_trained():
  def loss(params, model_state, batch, key):
    del key
    return 0.0 * params["a"].sum() + batch["x"].sum(), ({}, model_state)

  def repair(own, average, *_):
    assert isinstance(own, dj.Variables)
    state = {"mean": average.model_state["mean"] + 1}
    return dj.Variables({"a": 2 * average.params["a"]}, state)

  options = {"variant": "all", "every": 1, "repair": repair}
  run = dj.simulate(papa(dj.stateful(loss), **options), workers=N)
  start = dj.Variables(starts(), {"mean": np.arange(N, dtype=np.float32)})
  state, _ = run.step(run.init(KEY, start, per_worker=True), BATCH, KEY)
  np.testing.assert_allclose(state.model_state["mean"], 2.5)
  expected = 2 * np.tile(starts()["a"].mean(0), (N, 1, 1))
  np.testing.assert_allclose(state.params["a"], expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_papa_2_makes_each_of_two_random_members(n):
  values = trace(papa(variant="pair", every=1), 1, n)
  pairs = list(itertools.combinations(range(n), 2)) or [(0, 0)]
  parents = []
  for new in values[1]:
    means = [(values[0][i] + values[0][j]) / 2 for i, j in pairs]
    close = [np.allclose(new, mean, atol=1e-6) for mean in means]
    assert sum(close) == 1
    parents.append(pairs[close.index(True)])
  assert len(set(parents)) == min(n, len(pairs))


def test_pairs_are_not_those_of_the_first_member_alone():
  """As they are in the authors' code, from four members on."""
  seen = set()
  run = dj.simulate(papa(variant="pair", every=1), workers=N)
  for seed in range(30):
    eye = {"a": np.eye(N, dtype=np.float32).reshape(N, 1, N)}
    state = run.init(KEY, eye, per_worker=True)
    state, _ = run.step(state, BATCH, jax.random.key(seed))
    for row in np.asarray(state.params["a"]).reshape(N, N):
      seen.add(tuple(np.flatnonzero(row)))
  assert seen == set(itertools.combinations(range(N), 2))


def test_statistics_are_pulled_as_well_and_moments_are_not():
  def loss(params, model_state, batch, key):
    del key
    return ((params["a"] - batch["x"].sum()) ** 2).sum(), (
      {},
      {"mean": batch["x"].sum(), "count": model_state["count"] + 1},
    )

  method = papa(dj.stateful(loss), optax.adam(0.1), variant="all", every=1)
  run = dj.simulate(method, workers=N)
  state_of = {"mean": np.zeros(N, np.float32), "count": np.zeros(N, np.int32)}
  start = dj.Variables({"a": np.zeros((N, 1), np.float32)}, state_of)
  state, _ = run.step(run.init(KEY, start, per_worker=True), BATCH, KEY)
  np.testing.assert_allclose(state.model_state["mean"], 1.5)
  assert state.model_state["count"].tolist() == [1] * N
  moments = np.ravel(optax.tree.get(state.opt_state, "mu")["a"])
  assert len(set(moments.tolist())) == N


def test_dart_is_one_model_on_all_rows_and_then_branches():
  tx = optax.sgd(0.1, momentum=0.9)
  same = {"a": np.repeat(starts(1)["a"], N, 0)}
  values = trace(dj.dart(pull, tx, joint_steps=3, every=2), 9, start=same)
  np.testing.assert_array_equal(values[:4], values[:4, :1].repeat(N, 1))
  joint = dj.simulate(dj.ddp(pull, tx), workers=N)
  state = joint.init(KEY, {"a": same["a"][0]})
  for step in range(3):
    state, _ = joint.step(state, BATCH, KEY)
    np.testing.assert_allclose(
      values[step + 1][0], joint.params(state)["a"], rtol=1e-6
    )
  together = [apart(x) < 1e-10 for x in values]
  assert together == [i <= 3 or i in (5, 7, 9) for i in range(10)]
  # The average is of what the branches had become.
  assert apart(values[4]) > 1e-3


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_dart_interpolates(weight):
  values = trace(dj.dart(still, optax.sgd(0.1), every=1, weight=weight), 1)
  expected = (1 - weight) * values[0] + weight * values[0].mean(0)
  np.testing.assert_allclose(values[1], expected, atol=1e-6)


@pytest.mark.parametrize("opt_state", ["kept", "averaged", "reset"])
def test_what_dart_does_with_an_optimizers_state(opt_state):
  method = dj.dart(pull, optax.adam(0.1), every=1, opt_state=opt_state)
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, starts(), per_worker=True)
  state, _ = run.step(state, BATCH, KEY)
  moment = np.asarray(optax.tree.get(state.opt_state, "mu")["a"])
  count = np.ravel(optax.tree.get(state.opt_state, "count")).tolist()
  assert count == [1] * N  # a schedule's place is not lost
  if opt_state == "reset":
    assert not moment.any()
  else:
    assert (apart(moment) < 1e-9) == (opt_state == "averaged")


REFUSED = {
  "papa": {
    "a variant": ({"variant": "some"}, "one of pull, all, pair; got 'some'"),
    "no step": ({"every": 0}, "`every` is the number of steps"),
    "alpha": ({"alpha": 1.5}, r"`alpha` is what a member keeps"),
    "an epoch": ({"epoch_steps": 0}, "`epoch_steps` is a number of steps"),
    "no schedule": ({}, "needs `relative_rate`: a function"),
    "no number": (
      {"variant": "all"},
      "variant='all' needs `every`, .* five epochs: 5 ",
    ),
    "nothing to repair": (
      {"tied": False, "repair": lambda own, average, *_: average},
      "but with variant='pull' it stays near itself",
    ),
  },
  "dart": {
    "negative steps": ({"joint_steps": -1}, "`joint_steps` is a number of st"),
    "no step": ({"every": 0}, "`every` is a number of steps, at least 1"),
    "no weight": ({"weight": 0}, "`weight` is that of the average, above 0"),
    "a state": ({"opt_state": "gone"}, "one of kept, averaged, reset; got"),
  },
}


@pytest.mark.parametrize(
  "factory, case", [(f, c) for f, cases in REFUSED.items() for c in cases]
)
def test_bad_options_are_refused(factory, case):
  options, message = REFUSED[factory][case]
  with pytest.raises(ValueError, match=message):
    getattr(dj, factory)(still, optax.sgd(0.1), **options)


def test_a_schedule_may_be_traced():
  rate = optax.cosine_decay_schedule(1.0, 10)
  values = trace(papa(every=1, relative_rate=rate), 2)
  assert changed(values) == [True, True]
  assert jnp.isfinite(values).all()
