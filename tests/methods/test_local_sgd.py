"""Local SGD: a NumPy loop, DDP where they meet, and what averaging keeps."""

import functools

import alone
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj

pytestmark = pytest.mark.core

N, KEY = alone.WORKERS, alone.KEY


@functools.cache
def simulated(optimizer, workers=N, **options):
  options = {"clip_norm": alone.CLIP_NORM, **options}
  method = dj.local_sgd(alone.loss_fn, alone.OPTIMIZERS[optimizer], **options)
  return dj.simulate(method, workers=workers)


def oracle(optimizer, sync_every, opt_state="local", steps=alone.STEPS):
  """Workers and (STEPS, 3) metrics."""
  workers = [alone.Worker(optimizer) for _ in range(N)]
  seen = []
  for i in range(steps):
    seen.append(alone.all_step(workers, i))
    if (i + 1) % sync_every == 0:
      fields = ["params"] + (["m", "v"] if opt_state == "averaged" else [])
      for field in fields:
        mean = alone.average([getattr(w, field) for w in workers])
        for w in workers:
          setattr(w, field, dict(mean))
  return workers, np.array(seen)


def own(stacked, w):
  return jax.tree.map(lambda x: np.asarray(x)[w], stacked)


CASES = [
  ("sgd", 3, "local"),
  ("momentum", 5, "averaged"),
  ("adamw", 4, "local"),
  ("adamw", 4, "averaged"),
]


@pytest.mark.parametrize(("optimizer", "every", "opt_state"), CASES)
def test_every_worker_equals_the_oracles(optimizer, every, opt_state):
  run = simulated(optimizer, sync_every=every, opt_state=opt_state)
  state, seen = alone.train(run)
  workers, expected = oracle(optimizer, every, opt_state)
  assert 0 < np.mean(expected[:, 2] > alone.CLIP_NORM) <= 1
  for w, worker in enumerate(workers):
    alone.near(own(state.params, w), worker.params)
  alone.near(seen, expected)
  mean = alone.average([worker.params for worker in workers])
  alone.near(run.params(state), mean)


def test_distributed_with_microbatches_equals_the_oracle(mesh):
  method = dj.local_sgd(
    alone.loss_fn,
    alone.OPTIMIZERS["adamw"],
    sync_every=4,
    accumulate=2,
    clip_norm=alone.CLIP_NORM,
    opt_state="averaged",
  )
  run = dj.distribute(method, mesh(N))
  state, seen = alone.train(run)
  workers, expected = oracle("adamw", 4, "averaged")
  alone.near(own(state.params, 2), workers[2].params)
  alone.near(seen, expected)


@pytest.mark.parametrize("opt_state", ["local", "averaged"])
def test_workers_are_equal_just_after_an_exchange_and_else_not(opt_state):
  run = simulated("adamw", sync_every=4, opt_state=opt_state)
  state = None
  for i in range(9):
    state, _ = alone.train(run, 1, state, first=i)
    mean = np.asarray(run.params(state)["w"])
    moments = np.asarray(state.opt_state[0].mu["w"])
    same = (np.asarray(state.params["w"]) == mean).all()
    assert same == (i in (3, 7))
    assert np.ptp(moments, axis=0).any() == (not same or opt_state == "local")


@pytest.mark.parametrize(
  ("optimizer", "opt_state"), [("sgd", "local"), ("momentum", "averaged")]
)
def test_an_average_every_step_is_ddp(optimizer, opt_state):
  options = {"sync_every": 1, "opt_state": opt_state, "clip_norm": None}
  run = simulated(optimizer, **options)
  ddp = dj.ddp(alone.loss_fn, alone.OPTIMIZERS[optimizer])
  ddp = dj.simulate(ddp, workers=N)
  got, expected = alone.train(run)[0], alone.train(ddp)[0]
  alone.near(run.params(got), ddp.params(expected), 2e-6)


def test_averaging_leaves_the_workers_mean_where_it_was():
  still = dj.local_sgd(alone.loss_fn, optax.sgd(0.0), sync_every=1)
  run, other = dj.simulate(still, workers=N), simulated("adamw", sync_every=99)
  apart, _ = alone.train(other, 3)
  before = alone.average([own(apart.params, w) for w in range(N)])
  state = run.init(KEY, alone.float32(alone.start()))
  state = state._replace(params=apart.params)
  state, _ = run.step(state, alone.float32(alone.batch(0)), KEY)
  for w in range(N):
    alone.near(own(state.params, w), before, 1e-6)


@pytest.mark.parametrize("done", [2, 4, 5])
def test_resumed_equals_uninterrupted_around_an_exchange(done):
  run = simulated("adamw", sync_every=4)
  state, _ = alone.train(run, done)
  saved = jax.tree.map(np.asarray, state)
  uninterrupted, _ = alone.train(run, 5, state, first=done)
  resumed, _ = alone.train(run, 5, saved, first=done)
  jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


def test_bfloat16_models_are_averaged_in_float32():
  method = dj.local_sgd(
    lambda p, batch, key: (0.0 * jnp.sum(p), {}), optax.sgd(0.0), sync_every=1
  )
  run = dj.simulate(method, workers=4)
  state = run.init(KEY, jnp.zeros(1, jnp.bfloat16))
  apart = jnp.asarray([[256.0], [1.0], [1.0], [1.0]], jnp.bfloat16)
  state, _ = run.step(state._replace(params=apart), jnp.zeros((4, 1)), KEY)
  # 259 / 4 is 64.75, to the nearest 65; 256 + 1 + 1 + 1 is 256 in bfloat16.
  assert state.params.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(state.params), 65.0)


@pytest.mark.parametrize("workers", [2, 8])
def test_other_workers_go_on_from_the_mean(workers):
  run, other = simulated("adamw"), simulated("adamw", workers=workers)
  state, _ = alone.train(run, 3)
  there = other.adopt(jax.tree.map(np.asarray, state))
  like = other.abstract(KEY, alone.float32(alone.start()))
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(like)
  alone.near(own(there.params, workers - 1), run.params(state), 1e-6)
  moments = alone.average([own(state.opt_state[0].nu, w) for w in range(N)])
  alone.near(own(there.opt_state[0].nu, 0), moments, 1e-6)
  assert there.opt_state[0].count.tolist() == [3] * workers
  alone.train(other, 1, there, first=3)


@pytest.mark.parametrize("stats", ["averaged", "local"])
def test_models_with_statistics_train(stats):
  def fn(params, seen, batch, key):
    loss, aux = alone.loss_fn(params, batch, key)
    return loss, (aux, 0.5 * seen + 0.5 * batch["x"].mean())

  method = dj.local_sgd(
    dj.stateful(fn, stats=stats), optax.sgd(0.1), sync_every=2
  )
  run = dj.simulate(method, workers=N)
  model = dj.Variables(alone.float32(alone.start()), jnp.zeros(()))
  state = run.init(KEY, model)
  rows = alone.float32(alone.batch(0))
  for _ in range(3):
    state, _ = run.step(state, rows, KEY)
  expected = np.asarray(rows["x"]).reshape(N, -1).mean(1) * (1 - 0.5**3)
  if stats == "local":
    alone.near(state.model_state, expected)
  alone.near(run.params(state).model_state, expected.mean())


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"sync_every": 0}, "local_sgd: `sync_every`.*at least 1; got 0"),
    ({"sync_every": 2.5}, r"local_sgd: `sync_every`.*got 2\.5"),
    ({"sync_every": True}, "local_sgd: `sync_every`.*got True"),
    ({"opt_state": "mean"}, "`opt_state` is one of local, averaged; got 'me"),
    ({"accumulate": 0}, "local_sgd: `accumulate`.*got 0"),
    ({"clip_norm": -1.0}, r"local_sgd: `clip_norm`.*got -1\.0"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    dj.local_sgd(alone.loss_fn, optax.sgd(0.1), **options)
