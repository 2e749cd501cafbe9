"""WASH and its neighbours as methods: what moves, when, and what does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import spmd
from distrain_jax.population import rates

pytestmark = pytest.mark.core

N, KEY = 4, jax.random.key(3)
SHAPES = {"a": (6, 8), "b": (40,), "c": (5, 9)}
BATCH = {"x": np.zeros((N, 1), np.float32)}


def still(params, batch, key):
  """A loss whose gradient is 0: nothing moves but by an exchange."""
  del batch, key
  return 0.0 * sum(x.sum() for x in jax.tree.leaves(params)), {}


def pull(params, batch, key):
  """A gradient that differs by member and coordinate."""
  noise = jax.random.uniform(key)
  return sum(
    ((x - batch["x"].sum() - noise) ** 2).sum() for x in jax.tree.leaves(params)
  ), {}


def starts(n=N, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda s: rng.normal(size=(n, *s)).astype(np.float32)
  return {name: draw(shape) for name, shape in SHAPES.items()}


def begin(method, start=None, workers=N):
  run = dj.simulate(method, workers=workers)
  start = starts(workers) if start is None else start
  return run, run.init(KEY, start, per_worker=True)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def distance(tree):
  return sum(
    np.square(x - x.mean(0)).sum() for x in map(np.asarray, tree.values())
  )


@pytest.mark.parametrize("shuffle", ["latin_square", "independent"])
def test_a_step_without_learning_only_moves_values(shuffle):
  method = dj.wash(still, optax.sgd(0.1), rate=0.8, shuffle=shuffle)
  run, state = begin(method)
  before = jax.tree.map(np.asarray, state.params)
  for _ in range(5):
    state, _ = run.step(state, BATCH, KEY)
  after = jax.tree.map(np.asarray, state.params)
  for name, x in before.items():
    np.testing.assert_array_equal(np.sort(after[name], 0), np.sort(x, 0))
    np.testing.assert_allclose(after[name].mean(0), x.mean(0), atol=1e-6)
  np.testing.assert_allclose(distance(after), distance(before), rtol=1e-6)
  assert np.mean(after["a"] != before["a"]) > 0.5
  np.testing.assert_array_equal(after["c"], before["c"])  # the last layer


def test_a_step_is_an_ensembles_and_then_a_shuffle():
  """So that nothing but the shuffle is WASH's own."""
  options = {"accumulate": 1, "clip_norm": 0.5, "learning_rates": (1, 2, 3, 4)}
  tx = optax.adam(0.1)
  alone, state = begin(dj.ensemble(pull, tx, **options))
  wash, other = begin(dj.wash(pull, tx, rate=0.9, **options))
  batch = {"x": np.arange(N, dtype=np.float32)[:, None]}
  state, _ = alone.step(state, batch, KEY)
  other, _ = wash.step(other, batch, KEY)
  equal(state.opt_state, other.opt_state)
  for name in SHAPES:
    one, two = np.asarray(state.params[name]), np.asarray(other.params[name])
    np.testing.assert_array_equal(np.sort(one, 0), np.sort(two, 0))
  assert np.any(one_of(state, "a") != one_of(other, "a"))


def one_of(state, name):
  return np.asarray(state.params[name])


@pytest.mark.parametrize("factory", ["wash", "sparta"])
def test_rate_0_is_an_ensemble_to_the_bit_and_sends_only_metrics(factory, mesh):
  tx = optax.sgd(0.05, momentum=0.9)
  method = getattr(dj, factory)(pull, tx, axis="data", rate=0.0)
  runs = [
    dj.distribute(m, mesh(N))
    for m in (method, dj.ensemble(pull, tx, axis="data"))
  ]
  states = [run.init(KEY, starts(), per_worker=True) for run in runs]
  for _ in range(3):
    states = [run.step(s, BATCH, KEY)[0] for run, s in zip(runs, states)]
  equal(*states)
  sent = dj.inspect.bytes_sent(runs[0], states[0], BATCH, KEY)
  assert sum(sent.values()) <= 2 * 4 * 2 * (N + 2)


def test_one_member_trains_as_plain_optax_does():
  tx = optax.adam(0.1)
  run, state = begin(dj.wash(pull, tx, rate=1.0), starts(1), workers=1)
  batch = {"x": np.ones((1, 1), np.float32)}
  params = jax.tree.map(lambda x: jnp.asarray(x[0]), starts(1))
  opt_state = tx.init(params)

  @jax.jit
  def step(params, opt_state, key):
    grads = jax.grad(lambda p: pull(p, batch, key)[0])(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for i in range(3):
    state, _ = run.step(state, batch, KEY)
    key = jax.random.fold_in(jax.random.fold_in(KEY, i), 0)
    params, opt_state = step(params, opt_state, key)
  for name in SHAPES:
    np.testing.assert_allclose(
      state.params[name][0], params[name], rtol=1e-5, atol=1e-6
    )


def marked() -> optax.GradientTransformation:
  """An optimizer whose state tells which weight it belongs to."""

  def init(params):
    return {
      "twice": jax.tree.map(lambda x: 2 * x, params),
      "count": jnp.zeros(()),
    }

  update = lambda grads, state, params=None: (grads, state)
  return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("shuffle", ["latin_square", "independent"])
@pytest.mark.parametrize("moves", [True, False])
def test_moments_follow_their_weights_if_asked_to(moves, shuffle):
  method = dj.wash(
    still, marked(), rate=1.0, shuffle_optimizer=moves, shuffle=shuffle
  )
  run, state = begin(method)
  before = jax.tree.map(np.asarray, state.opt_state)
  state, _ = run.step(state, BATCH, KEY)
  if moves:
    equal(state.opt_state["twice"], jax.tree.map(lambda x: 2 * x, state.params))
  else:
    equal(state.opt_state, before)
  assert np.any(one_of(state, "a") != starts()["a"])


def test_an_optimizer_whose_state_is_of_another_form_is_refused():
  method = dj.wash(still, optax.adafactor(0.1), shuffle_optimizer=True)
  with pytest.raises(ValueError, match=r"state has an array of shape .*adamw"):
    begin(method, {"a": np.ones((N, 256, 256), np.float32)})


def moved(method, steps):
  """Which of the first steps move anything."""
  run, state = begin(method)
  out = []
  for _ in range(steps):
    before = one_of(state, "a")
    state, _ = run.step(state, BATCH, KEY)
    out.append(bool(np.any(one_of(state, "a") != before)))
  return out


def test_a_period_and_an_end():
  method = dj.wash(still, optax.sgd(0.1), rate=1.0, period=3, stop_after=7)
  assert moved(method, 12) == [i in (2, 5) for i in range(12)]


def test_a_tied_rate_follows_the_schedule():
  tied = functools.partial(dj.wash, still, optax.sgd(0.1), rate=1.0, tied=True)
  falls = lambda step: jnp.where(step < 5, 1.0, 0.0)
  assert moved(tied(relative_rate=falls), 10) == [i < 5 for i in range(10)]
  half = moved(tied(relative_rate=lambda step: 0.5), 60)
  assert 15 < sum(half) < 45


def test_running_statistics_stay_a_members_own(mesh):
  def loss(params, model_state, batch, key):
    del key
    mean = 0.5 * model_state["mean"] + 0.5 * batch["x"].mean()
    return ((params["a"] - mean) ** 2).sum(), ({}, {"mean": mean})

  def train(stats):
    method = dj.wash(
      dj.stateful(loss, stats=stats), optax.sgd(0.1), axis="data", rate=1.0
    )
    run = dj.distribute(method, mesh(N))
    zeros = {"mean": np.zeros(N, np.float32)}
    start = dj.Variables({"a": starts()["a"]}, zeros)
    state = run.init(KEY, start, per_worker=True)
    batch = {"x": np.arange(N, dtype=np.float32)[:, None]}
    for _ in range(2):
      state, _ = run.step(state, batch, KEY)
    return state, run.params(state)

  for stats in ("averaged", "local"):
    state, model = train(stats)
    np.testing.assert_allclose(state.model_state["mean"], 0.75 * np.arange(N))
    np.testing.assert_allclose(model.model_state["mean"], 0.75 * 1.5)
  with pytest.raises(
    ValueError, match="would normalise a member by the others"
  ):
    train("synchronised")


def test_metrics_name_the_worst_member_even_if_it_is_not_finite():
  loss = lambda params, batch, key: (params["a"].sum() + batch["x"].sum(), {})
  run, state = begin(dj.wash(loss, optax.sgd(0.0), leave=(1,)))
  for x, worst in (([0, 5, 1, 1], 2), ([0, 0, np.nan, 0], 3)):
    start = starts()
    for value in start.values():
      value[:] = 0
    state = run.init(KEY, start, per_worker=True)
    batch = {"x": np.array(x, np.float32)[:, None]}
    _, metrics = run.step(state, batch, KEY)
    # Its number: member 1 is not there.
    assert int(metrics["worst_member"]) == worst
    np.testing.assert_array_equal(metrics["worst_loss"], np.max(x))
    np.testing.assert_array_equal(metrics["loss"], np.mean(x))


def test_a_gradient_that_is_not_finite_is_its_members_fault():
  def loss(params, batch, key):
    del key
    x = batch["x"].sum()  # of the square root the slope at 0 is infinite
    return 10.0 - x + 0.0 * jnp.sqrt(params["a"] * (1 - x)).sum(), {}

  run, state = begin(dj.ensemble(loss, optax.sgd(0.0)))
  start = {
    k: np.abs(v) * (np.arange(N) != 1)[:, None, None]
    for k, v in starts().items()
    if k == "a"
  }
  state = run.init(KEY, start, per_worker=True)
  batch = {"x": np.float32([0.0, 0.5, 0.0, 0.0])[:, None]}
  _, metrics = run.step(state, batch, KEY)
  assert np.isfinite(metrics["worst_loss"])
  assert not np.isfinite(metrics["grad_norm"])
  assert int(metrics["worst_member"]) == 1


def test_members_learn_at_rates_of_their_own():
  loss = lambda params, batch, key: (params["a"].sum(), {})
  rates = (1.0, 0.5, 2.0, 0.25)
  run, state = begin(dj.ensemble(loss, optax.sgd(1.0), learning_rates=rates))
  before = one_of(state, "a")
  state, _ = run.step(state, BATCH, KEY)
  step = before - one_of(state, "a")
  for member, rate in enumerate(rates):
    np.testing.assert_allclose(step[member], rate, rtol=1e-5)


def adopt(state, members, leave):
  method = dj.wash(pull, optax.adam(0.1), leave=leave)
  return dj.simulate(method, workers=members).adopt(state)


@pytest.fixture(scope="module")
def trained():
  run, state = begin(dj.wash(pull, optax.adam(0.1), rate=0.5))
  for _ in range(2):
    state, _ = run.step(state, BATCH, KEY)
  return jax.tree.map(np.asarray, state)


def test_the_others_go_on_as_they_were_when_one_leaves(trained):
  new = adopt(trained, 3, (1,))
  assert new.number.tolist() == [0, 2, 3]
  for field in ("params", "opt_state"):
    kept = jax.tree.map(
      lambda x: x[np.array([0, 2, 3])], getattr(trained, field)
    )
    equal(getattr(new, field), kept)
  # And once more, from what is left.
  again = adopt(new, 2, (1, 3))
  equal(
    again.params, jax.tree.map(lambda x: x[np.array([0, 2])], trained.params)
  )


def test_a_member_joins_from_the_average_of_those_who_are_sound(trained):
  sick = jax.tree.map(np.copy, trained)
  sick.params["b"][2, 7] = np.nan
  new = adopt(sick, 5, (2,))
  assert new.number.tolist() == [0, 1, 3, 4, 5]
  stay = np.array([0, 1, 3])
  for x, y in zip(jax.tree.leaves(trained.params), jax.tree.leaves(new.params)):
    np.testing.assert_array_equal(y[:3], x[stay])
    for joined in (3, 4):
      np.testing.assert_allclose(y[joined], x[stay].mean(0), rtol=1e-6)
  count = jax.tree.leaves(new.opt_state)[0]
  assert count.tolist() == [2] * 5


def test_a_member_that_is_not_finite_starts_anew(trained):
  sick = jax.tree.map(np.copy, trained)
  sick.params["a"][0] = np.inf
  new = adopt(sick, 5, ())
  stay = np.array([1, 2, 3])
  for joins in (0, 4):
    np.testing.assert_allclose(
      new.params["a"][joins], trained.params["a"][stay].mean(0), rtol=1e-6
    )
  np.testing.assert_array_equal(new.params["a"][1:4], trained.params["a"][1:])


def test_no_member_is_dropped_without_being_named(trained):
  with pytest.raises(
    ValueError, match=r"2 of whom would be lost .*Say who lea"
  ):
    adopt(trained, 2, (1,))


def test_randomness_stays_a_members_own_when_others_leave():
  loss = lambda p, b, k: (0.0 * p["a"].sum(), {"u": jax.random.uniform(k)})
  drawn = []
  for members, leave in ((4, ()), (3, (1,))):
    run, state = begin(
      dj.ensemble(loss, optax.sgd(0.1), leave=leave), starts(members), members
    )
    rows = {"x": np.zeros((members, 1), np.float32)}
    _, metrics = run.step(state, rows, KEY)
    drawn.append(float(metrics["u"]) * members)
  gone = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(KEY, 0), 1))
  np.testing.assert_allclose(drawn[0] - drawn[1], gone, rtol=1e-5)


def test_schedules_by_depth():
  shapes = {
    "a": jax.ShapeDtypeStruct((10,), jnp.float32),
    "b": jax.ShapeDtypeStruct((3, 20), jnp.float32),
  }
  depths = {"a": 0, "b": np.array([1, 2, 3])}
  of = functools.partial(rates.layer_rates, "wash", shapes, depths, rate=0.3)
  first, rest = of(layer_schedule="decreasing", equal_volume=False)
  np.testing.assert_allclose([first, *rest], [0.3, 0.2, 0.1, 0.0], atol=1e-12)
  first, rest = of(layer_schedule="increasing", equal_volume=False)
  np.testing.assert_allclose([first, *rest], [0.0, 0.1, 0.2, 0.3], atol=1e-12)
  for schedule in rates.SCHEDULES:
    first, rest = of(layer_schedule=schedule, equal_volume=True)
    np.testing.assert_allclose(first * 10 + rest.sum() * 20, 0.3 * 70)


def quadratic(rotated, rate, *, seeds=32, steps=2000, d=20):
  """Mean squared distance of SGD with noise on a quadratic, and its theory."""
  rng = np.random.default_rng(0)
  values = np.where(np.arange(d) < d // 2, 0.001, 1.0)
  basis = np.linalg.qr(rng.normal(size=(d, d)))[0] if rotated else np.eye(d)
  h = jnp.asarray(basis @ np.diag(values) @ basis.T, jnp.float32)
  eta = 0.1

  def loss(params, batch, key):
    noise = jax.random.normal(key, (d,))
    return 0.5 * params @ h @ params + params @ noise, {}

  method = dj.wash(loss, optax.sgd(eta), rate=rate, layer_schedule="constant")
  runner = spmd.vmap_runner("population", N)
  specs, each = method.specs, jax.sharding.PartitionSpec("population")
  same = jax.sharding.PartitionSpec()
  step = runner(method.step, (specs, each, same), (specs, same))
  init = runner(method.init, (same, each), specs)

  @jax.jit
  def final(key):
    state = init(key, jnp.zeros((N, d)))
    batch = jnp.zeros((N, 1))

    def one(state, i):
      state, _ = step(state, batch, key)
      x = state.params
      apart = jnp.square(x - x.mean(0, keepdims=True)).sum() / N
      return state, apart

    _, apart = jax.lax.scan(one, state, jnp.arange(steps))
    return apart[steps // 2 :].mean()

  found = jax.vmap(final)(jax.random.split(jax.random.key(1), seeds)).mean()
  diagonal = np.diag(np.asarray(h))
  theory = (1 - 1 / N) * np.sum(eta**2 / (1 - (1 - eta * diagonal) ** 2))
  return float(found), float(theory)


def test_shuffling_lets_flat_directions_drift_only_along_the_axes():
  """At rate 1 each coordinate contracts by the Hessian's own diagonal."""
  shuffled, theory = quadratic(rotated=True, rate=1.0)
  np.testing.assert_allclose(shuffled, theory, rtol=0.05)
  alone, _ = quadratic(rotated=True, rate=0.0)
  assert alone > 5 * shuffled
  # Along the axes there is nothing to gain.
  alone, _ = quadratic(rotated=False, rate=0.0)
  shuffled, _ = quadratic(rotated=False, rate=1.0)
  np.testing.assert_allclose(shuffled, alone, rtol=0.1)


REFUSED = {
  "a rate above 1": (
    {"rate": 5},
    r"in \[0, 1\]; got 5. For 5 per cent pass 0.05",
  ),
  "a negative rate": ({"rate": -0.1}, r"`rate` is the fraction"),
  "no schedule": (
    {"layer_schedule": "up"},
    "one of decreasing, constant, incr",
  ),
  "a period of 0": ({"period": 0}, "`period` is steps between exchanges"),
  "a negative end": ({"stop_after": -1}, "`stop_after` is the number of steps"),
  "tied to nothing": ({"tied": True}, "needs `relative_rate`: a function"),
  "another shuffle": ({"shuffle": "sorted"}, "latin_square, independent; got"),
  "a rate of 0": ({"learning_rates": (1, 0)}, "each finite and above 0; got"),
  "no float32": ({"learning_rates": (1, 1e39)}, "each finite and above 0; got"),
  "no number": ({"leave": (-1,)}, "`leave` are numbers of members"),
  "one number twice": ({"leave": (1, 1)}, r"each once; got \(1, 1\)"),
  "tied to a number": (
    {"tied": True, "relative_rate": 0.5},
    "needs `relative_rate`: a function .*got 0.5. Pass one",
  ),
  "one number": ({"leave": 1}, r"`leave` is a tuple of numbers, such as"),
  "one axis twice": ({"inner": "population"}, "`inner` is a name of its own"),
  "half a batch": ({"accumulate": 0}, "`accumulate` is the number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused(case):
  options, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    dj.wash(still, optax.sgd(0.1), **options)


def test_bad_trees_are_refused_before_anything_compiles():
  tx = optax.sgd(0.1)
  wrong = {
    "another tree": ({"a": 0}, "`depths` is a tree of whole numbers like"),
    "a fraction": ({"a": 0.5, "b": 0, "c": 0}, "is a whole number from 0"),
    "a length": ({"a": np.arange(3), "b": 0, "c": 0}, "one for each index"),
  }
  for depths, message in wrong.values():
    with pytest.raises(ValueError, match=message):
      begin(dj.wash(still, tx, depths=depths))
  with pytest.raises(ValueError, match=r"asks for .* of some layer. Lower the"):
    begin(dj.wash(still, tx, rate=0.9, equal_volume=True))
  with pytest.raises(
    ValueError, match="has 2 factors, but the population has 4"
  ):
    begin(dj.wash(still, tx, learning_rates=(1.0, 2.0)))
  unlike = {**starts(), "b": np.zeros((3, 40), np.float32)}
  with pytest.raises(ValueError, match="its first axis must be the 4 workers"):
    begin(dj.wash(still, tx), unlike)


def test_a_mesh_without_the_axis_and_members_without_a_name(mesh):
  method = dj.wash(still, optax.sgd(0.1))
  with pytest.raises(ValueError, match="wash works on the axis 'population'"):
    dj.distribute(method, mesh(N))
  method = dj.wash(still, optax.sgd(0.1), axis="data")
  with pytest.raises(
    ValueError, match="per_device=2, but wash was made without"
  ):
    dj.distribute(method, mesh(N), per_device=2)
  with pytest.raises(ValueError, match="per_device` is how many workers share"):
    dj.distribute(method, mesh(N), per_device=0)
  with pytest.raises(ValueError, match=r"rows_over=\('fsdp',\) names axes of"):
    dj.distribute(method, mesh(N), rows_over=("fsdp",))
