"""What is kept, what comes back, and on how many workers."""

import functools
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax.train import Checkpoints

KEY = functools.partial(jax.random.key, 0)
TX = optax.adam(0.03)


def loss_fn(params, batch, key):
  """Sizes 15, 5 and 1: nothing divides by the workers."""
  del key
  w = params["w"].astype(jnp.float32)
  hidden = jnp.tanh(batch["x"] @ w + params["b"].astype(jnp.float32)[None])
  error = hidden.sum(1) * params["gain"].astype(jnp.float32) - batch["y"]
  return jnp.mean(error**2), {}


def with_statistics(params, model_state, batch, key):
  """The running mean of the inputs: of all rows, if workers are averaged."""
  mean = 0.9 * model_state["mean"] + 0.1 * batch["x"].mean(0)
  new = {"mean": mean, "batches": model_state["batches"] + 1}
  loss, aux = loss_fn(params, batch, key)
  return loss, (aux, new)


METHODS = {
  "ddp": lambda: dj.ddp(loss_fn, TX),
  "ddp_local": lambda: dj.ddp(dj.stateful(with_statistics, stats="local"), TX),
  "zero1": lambda: dj.zero1(loss_fn, TX),
  "zero1_low": lambda: dj.zero1(loss_fn, TX, param_dtype="bfloat16"),
  "guarded": lambda: dj.guard(dj.zero1(loss_fn, TX), spike=9.0),
}
TOLERANCE = {"zero1_low": 2e-2}


def make_params(method="ddp"):
  params = {
    "w": jax.random.normal(KEY(), (3, 5)),
    "b": jnp.zeros(5),
    "gain": jnp.ones(()),
  }
  if method != "ddp_local":
    return params
  statistics = {"mean": jnp.zeros(3), "batches": jnp.zeros((), jnp.int32)}
  return dj.Variables(params, statistics)


class Batches:
  """A plain iterator, which knows nothing of Orbax."""

  def __init__(self):
    self.taken = 0

  def __next__(self):
    rng = np.random.default_rng(self.taken)
    self.taken += 1
    x = rng.normal(size=(16, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(1))}

  def get_state(self):
    return {"taken": self.taken}

  def set_state(self, state):
    self.taken = state["taken"]


@pytest.fixture(scope="module")
def run_of(mesh):
  make = lambda method, n: dj.distribute(METHODS[method](), mesh(n))
  return functools.cache(make)


def steps(run, state, batches, count=3):
  for _ in range(count):
    state, _ = run.step(state, run.put(next(batches)), KEY())
  return state


def start(run, method="ddp"):
  return run.init(KEY(), make_params(method))


def host(tree):
  return jax.tree.map(np.array, tree)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def save(folder, run, state, batches, step=1, loss=None):
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(step, run, state, batches, loss)


def restore(folder, run, method="ddp", step=1, batches=None):
  like, batches = make_params(method), batches or Batches()
  with Checkpoints(folder) as checkpoints:
    return checkpoints.restore(step, run, KEY(), like, batches)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_comes_back_to_the_bit(method, run_of, tmp_path):
  run, batches = run_of(method, 4), Batches()
  state = steps(run, start(run, method), batches)
  save(tmp_path, run, state, batches)
  fresh = Batches()
  got = restore(tmp_path, run, method, batches=fresh)
  assert_same(host(got), host(state))
  assert fresh.taken == 3
  where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
  assert where(got) == where(run.abstract(KEY(), make_params(method)))


def unstacked(x, workers):
  """A leaf without its division among workers: numbers in order, no padding.

  No worker axis: as it is. One number a worker: that number. Else pieces.
  """
  x = np.asarray(x)
  if x.shape[:1] != (workers,):
    return x
  if x.ndim == 1:
    assert (x == x[0]).all()
    return x[0]
  return np.trim_zeros(x.ravel(), "b")


def assert_same_but_for_the_division(a, b):
  """(state, its workers) twice."""
  (a, n), (b, m) = a, b
  assert_same(
    jax.tree.map(lambda x: unstacked(x, n), a),
    jax.tree.map(lambda x: unstacked(x, m), b),
  )


@pytest.mark.parametrize("method", METHODS)
def test_eight_workers_then_four_then_eight(method, run_of, tmp_path):
  eight, four = run_of(method, 8), run_of(method, 4)
  batches = Batches()
  state = steps(eight, start(eight, method), batches)
  for step, (before, run) in enumerate([(eight, four), (four, eight)]):
    saved = host(state)
    save(tmp_path, before, state, batches, step)
    batches = Batches()
    state = restore(tmp_path, run, method, step, batches)
    got = host(state)
    if method == "ddp_local":  # each starts from the mean of all
      mean = saved.model_state["mean"].mean(0)
      want = np.broadcast_to(mean, (run.workers, 3))
      np.testing.assert_allclose(got.model_state["mean"], want, rtol=1e-6)
      got, saved = (x._replace(model_state=()) for x in (got, saved))
    assert_same_but_for_the_division(
      (got, run.workers), (saved, before.workers)
    )
    state = steps(run, state, batches)
  stayed = steps(eight, start(eight, method), Batches(), 9)
  tolerance = TOLERANCE.get(method, 1e-5)
  near = functools.partial(
    np.testing.assert_allclose, rtol=tolerance, atol=tolerance
  )
  jax.tree.map(near, host(eight.params(state)), host(eight.params(stayed)))


def test_a_method_that_cannot_change_its_workers_says_so(
  run_of, mesh, tmp_path
):
  run = run_of("ddp", 4)
  save(tmp_path, run, start(run), Batches())
  fixed = METHODS["ddp"]()._replace(reshard=None)
  with pytest.raises(ValueError, match="ddp cannot change its number of work"):
    restore(tmp_path, dj.distribute(fixed, mesh(2)))


@pytest.mark.parametrize("workers", [2, 4])
def test_restored_state_lies_where_the_params_do(workers, mesh, tmp_path):
  """On the axes beside the workers' too, by the sharding of params."""
  first = dj.distribute(METHODS["ddp"](), mesh(4))
  params = {"w": jnp.ones((3, 6)), "b": jnp.ones(6)}
  save(tmp_path, first, first.init(KEY(), params), Batches())
  run = dj.distribute(METHODS["ddp"](), mesh(workers, tensor=2))
  columns = NamedSharding(run.mesh, P(None, "tensor"))
  params["w"] = jax.device_put(params["w"], columns)
  with Checkpoints(tmp_path) as checkpoints:
    state = checkpoints.restore(1, run, KEY(), params, Batches())
  assert state.params["w"].sharding.is_equivalent_to(columns, 2)
  assert state.opt_state[0].mu["w"].sharding.is_equivalent_to(columns, 2)
  assert state.params["b"].sharding.is_fully_replicated


def test_the_latest_and_the_best_are_kept(run_of, tmp_path):
  run, nan = run_of("ddp", 1), float("nan")
  losses = {1: nan, 2: None, 3: 0.2, 4: 0.9, 5: nan, 6: None, 7: 0.7}
  with Checkpoints(tmp_path, keep=2, keep_best=1) as checkpoints:
    assert checkpoints.latest is None
    assert checkpoints.best() is None
    for step, loss in losses.items():
      checkpoints.save(step, run, start(run), Batches(), loss)
    checkpoints.wait()
    assert checkpoints.steps == [3, 6, 7]
  with Checkpoints(tmp_path) as checkpoints:  # as found on disk
    assert (checkpoints.latest, checkpoints.best()) == (7, 3)


def test_a_save_that_was_cut_short_leaves_no_trace(run_of, tmp_path):
  run = run_of("ddp", 1)
  save(tmp_path, run, start(run), Batches())
  shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [1]
    checkpoints.save(2, run, start(run), Batches(), None)
  assert sorted(x.name for x in tmp_path.iterdir()) == ["1", "2"]


def test_what_is_saved_does_not_see_the_steps_that_follow(run_of, tmp_path):
  """A step reuses the memory of the state that is still being written."""
  run, batches = run_of("ddp", 8), Batches()
  state, copies = start(run), {}
  with Checkpoints(tmp_path, keep=9) as checkpoints:
    for step in range(1, 10):
      state = steps(run, state, batches, 1)
      copies[step] = host(state)
      checkpoints.save(step, run, state, batches, None)
      state = steps(run, state, batches, 2)
  for step, copy in copies.items():
    fresh = Batches()
    assert_same(host(restore(tmp_path, run, step=step, batches=fresh)), copy)
    assert fresh.taken == 3 * step - 2


@pytest.mark.parametrize("guarded", [False, True])
def test_a_field_that_a_state_has_got_since_may_be_empty(tmp_path, guarded):
  class Before(NamedTuple):
    x: jax.Array

  class Since(NamedTuple):
    x: jax.Array
    more: tuple[()]

  def run_with(make):
    init = lambda key, params: make(params["w"])
    method = METHODS["ddp"]()._replace(init=init, specs=P())
    return dj.simulate(dj.guard(method) if guarded else method, workers=2)

  run, fresh = run_with(Before), run_with(lambda x: Since(x, ()))
  state = run.init(KEY(), make_params())
  save(tmp_path, run, state, Batches())
  assert_same(
    host(jax.tree.leaves(restore(tmp_path, fresh))),
    host(jax.tree.leaves(state)),
  )
  other = run_with(lambda x: Since(x, x))
  with pytest.raises(ValueError, match="more is missing there"):
    restore(tmp_path, other)


def test_random_keys_in_a_state_come_back(tmp_path):
  method = METHODS["ddp"]()._replace(
    init=lambda key, params: {"key": key, "params": params},
    specs=P(),
  )
  run = dj.simulate(method, workers=1)
  save(tmp_path, run, start(run), Batches())
  got = restore(tmp_path, run)
  assert got["key"].dtype == KEY().dtype
  assert_same(jax.random.key_data(got["key"]), jax.random.key_data(KEY()))


@pytest.mark.parametrize(
  "name, shape, dtype, message",
  [
    ("b", (4,), "float32", r"mu\.b is \(5,\) float32 there, \(4,\) float32 he"),
    ("b", (5,), "bfloat16", r"mu\.b is \(5,\) float32 there, \(5,\) bfloat16"),
    (
      "c",
      (2,),
      "float32",
      r"mu\.c is missing there, \(2,\) float32 here.*json",
    ),
  ],
)
def test_a_checkpoint_of_another_model_is_refused(
  name, shape, dtype, message, run_of, tmp_path
):
  run = run_of("ddp", 4)
  save(tmp_path, run, start(run), Batches())
  params = make_params() | {name: jax.ShapeDtypeStruct(shape, dtype)}
  with (
    Checkpoints(tmp_path) as checkpoints,
    pytest.raises(ValueError, match=message),
  ):
    checkpoints.restore(1, run, KEY(), params, Batches())


class Different(Batches):
  def set_state(self, state):
    raise ValueError("another batch size")


class Forgetful:
  def __next__(self):
    return next(Batches())


def test_what_is_wrong_with_method_or_data_is_said_as_it_is(run_of, tmp_path):
  run = run_of("ddp", 4)
  with pytest.raises(TypeError, match="a Forgetful without get_state"):
    save(tmp_path, run, start(run), Forgetful())
  save(tmp_path, run, start(run), Batches())
  with pytest.raises(ValueError, match=r"is of ddp, not of zero1.*name=ddp"):
    restore(tmp_path, run_of("zero1", 4))
  with pytest.raises(ValueError, match=r"^another batch size$"):
    restore(tmp_path, run, batches=Different())
