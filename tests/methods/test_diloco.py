"""DiLoCo: NumPy loops, plain and streaming, and what is in flight."""

import functools

import alone
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd

pytestmark = pytest.mark.core

N, KEY = alone.WORKERS, alone.KEY
STREAM = {"sync_every": 4, "fragments": 2, "delay": 1, "mix": 0.25}


@functools.cache
def make(optimizer, **options):
  options = {"clip_norm": alone.CLIP_NORM, **options}
  return dj.diloco(alone.loss_fn, alone.OPTIMIZERS[optimizer], **options)


@functools.cache
def simulated(optimizer, workers=N, **options):
  return dj.simulate(make(optimizer, **options), workers=workers)


# Of the leaves of `alone.start`, which elements each of two fragments has.
ROWS = np.arange(4)[:, None] % 2
HALVES = [
  {"w": ROWS == 0, "v": np.array(True), "gain": np.array(False)},
  {"w": ROWS == 1, "v": np.array(False), "gain": np.array(True)},
]
WHOLE = [{k: np.array(True) for k in HALVES[0]}]


def oracle(
  optimizer, every, sent_at=None, delay=0, mix=0.0, rate=0.7, momentum=0.9
):
  """Workers, the global model and (STEPS, 3) metrics.

  sent_at: for each fragment, the step of the period after which it is sent.
  """
  sent_at = sent_at or [0]
  masks = WHOLE if len(sent_at) == 1 else HALVES
  workers = [alone.Worker(optimizer) for _ in range(N)]
  outer, speed = alone.start(), alone.average([alone.start()])
  speed = {k: np.zeros_like(x) for k, x in speed.items()}
  mailbox, seen = [], []  # (step of arrival, mask, outer gradient)
  for t in range(1, alone.STEPS + 1):
    seen.append(alone.all_step(workers, t - 1))
    for mask, offset in zip(masks, sent_at):
      if t % every == offset:
        mean = alone.average([w.params for w in workers])
        mailbox.append((t + delay, mask, {k: outer[k] - mean[k] for k in mean}))
    for _, mask, change in [letter for letter in mailbox if letter[0] == t]:
      for k, g in change.items():
        m = momentum * speed[k] + g
        speed[k] = np.where(mask[k], m, speed[k])
        x = outer[k] - rate * (g + momentum * m)
        outer[k] = np.where(mask[k], x, outer[k])
        for w in workers:
          blend = mix * w.params[k] + (1 - mix) * outer[k]
          w.params[k] = np.where(mask[k], blend, w.params[k])
  return workers, outer, np.array(seen)


def own(stacked, w):
  return jax.tree.map(lambda x: np.asarray(x)[w], stacked)


def assert_equals(run, expected):
  state, seen = alone.train(run)
  workers, outer, metrics = expected
  alone.near(run.params(state), outer, 5e-5)
  for w, worker in enumerate(workers):
    alone.near(own(state.params, w), worker.params, 5e-5)
  alone.near(seen, metrics, 5e-5)


@pytest.mark.parametrize(
  ("optimizer", "every"), [("sgd", 1), ("momentum", 3), ("adamw", 6)]
)
def test_plain_diloco_equals_the_oracle(optimizer, every):
  run = simulated(optimizer, sync_every=every)
  assert_equals(run, oracle(optimizer, every))


@pytest.mark.parametrize(
  ("options", "sent_at"),
  [
    ({"sync_every": 4, "fragments": 2}, [2, 0]),
    (STREAM, [2, 0]),
    ({"sync_every": 5, "delay": 3}, [0]),
    # Both fragments are in flight at once, across the end of a period.
    ({"sync_every": 5, "fragments": 2, "delay": 4, "mix": 0.5}, [2, 0]),
  ],
  ids=["fragments", "stream", "delay", "crossing"],
)
def test_streaming_equals_the_oracle(options, sent_at):
  delay, mix = options.get("delay", 0), options.get("mix", 0.0)
  expected = oracle("adamw", options["sync_every"], sent_at, delay, mix)
  assert_equals(simulated("adamw", **options), expected)


def test_distributed_with_microbatches_equals_the_oracle(mesh):
  method = make("adamw", accumulate=2, **STREAM)
  run = dj.distribute(method, mesh(N))
  assert_equals(run, oracle("adamw", 4, [2, 0], delay=1, mix=0.25))


def test_an_outer_step_of_one_without_momentum_is_local_sgd():
  options = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
  run = simulated("adamw", sync_every=3, **options)
  other = dj.local_sgd(
    alone.loss_fn,
    alone.OPTIMIZERS["adamw"],
    sync_every=3,
    clip_norm=alone.CLIP_NORM,
  )
  other = dj.simulate(other, workers=N)
  (got, seen), (expected, same) = alone.train(run), alone.train(other)
  alone.near(got.params, expected.params, 2e-6)
  alone.near(seen, same, 2e-6)


def test_the_global_model_waits_for_an_exchange_and_workers_go_on_from_it():
  run, start = simulated("adamw", sync_every=6), alone.float32(alone.start())
  state, _ = alone.train(run, 5)
  jax.tree.map(np.testing.assert_array_equal, run.params(state), start)
  assert np.ptp(np.asarray(state.params["w"]), axis=0).all()
  moments = np.asarray(state.opt_state[0].mu["w"])
  state, _ = alone.train(run, 1, state, first=5)
  outer = run.params(state)
  assert (np.asarray(outer["w"]) != np.asarray(start["w"])).all()
  assert not np.ptp(np.asarray(state.params["w"]), axis=0).any()
  # XLA may compute it twice, rounded differently in the last bit.
  alone.near(own(state.params, 0), outer, 2e-7)
  assert np.ptp(moments, axis=0).all()
  assert np.ptp(np.asarray(state.opt_state[0].mu["w"]), axis=0).all()


@pytest.mark.parametrize("done", [2, 3, 4])  # sent, applied, the other sent
def test_resumed_equals_uninterrupted_with_a_message_in_flight(done):
  run = simulated("adamw", **STREAM)
  state, _ = alone.train(run, done)
  saved = jax.tree.map(np.asarray, state)
  assert (saved.outer.arrived["w"][::2] != 0).all()
  assert (saved.outer.arrived["w"][1::2] != 0).all() == (done == 4)
  assert (saved.outer.momentum["w"][::2] != 0).all() == (done > 2)
  uninterrupted, _ = alone.train(run, 5, state, first=done)
  resumed, _ = alone.train(run, 5, saved, first=done)
  jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


def test_a_bfloat16_wire_rounds_the_outer_gradient_by_little():
  exact = simulated("adamw", **STREAM)
  rough = simulated("adamw", wire_dtype="bfloat16", **STREAM)
  (a, _), (b, _) = alone.train(exact, 3), alone.train(rough, 3)
  dtypes = lambda tree: {x.dtype for x in jax.tree.leaves(tree)}
  assert dtypes(b.outer.arrived) == {jnp.dtype("bfloat16")}
  assert dtypes(b.outer[:2]) == {jnp.dtype("float32")}
  sent = np.asarray(a.outer.arrived["w"])[::2]
  error = np.abs(np.float32(b.outer.arrived["w"])[::2] - sent)
  assert 0 < error.max() < 2**-6 * np.abs(sent).max()
  errors = np.abs(np.asarray(a.outer.params["w"] - b.outer.params["w"]))
  assert 0 < errors.max() < 2**-4 * np.abs(sent).max()


@pytest.mark.parametrize(("wire_dtype", "size"), [(None, 4), ("bfloat16", 2)])
def test_no_step_sends_more_than_one_fragment(wire_dtype, size, mesh):
  method = make("adamw", wire_dtype=wire_dtype, **STREAM)
  run = dj.distribute(method, mesh(N))
  params, rows = alone.float32(alone.start()), alone.float32(alone.batch(0))
  sent = dj.inspect.bytes_sent(run, run.abstract(KEY, params), rows, KEY)
  largest = (6 + 3) * size  # half of w, and v
  metrics = 3 * 4
  assert sent == {"psum": 2 * (N - 1) / N * (largest + metrics)}


def test_bfloat16_workers_have_a_float32_global_model():
  loss = lambda p, batch, key: (jnp.mean(batch) * jnp.sum(p), {})
  method = dj.diloco(loss, optax.sgd(1.0), sync_every=1)
  run = dj.simulate(method, workers=2)
  state = run.init(KEY, jnp.ones(3, jnp.bfloat16))
  third = np.full(3, 1 / 3, np.float32)
  state = state._replace(outer=state.outer._replace(params=third))
  state = state._replace(params=jnp.full((2, 3), 1 / 3, jnp.bfloat16))
  # Workers that stood still have nothing to say, in spite of the rounding.
  state, _ = run.step(state, jnp.zeros(2), KEY)
  np.testing.assert_array_equal(state.outer.params, third)
  np.testing.assert_array_equal(state.outer.momentum, 0.0)
  # A difference that is lost in bfloat16 remains in the global model.
  state = state._replace(outer=state.outer._replace(params=third * 1.0001))
  state, _ = run.step(state, jnp.full(2, 2.0**-9), KEY)
  assert state.params.dtype == run.params(state).dtype == jnp.bfloat16
  moved = np.float32(1 / 3) * np.float32(1.0001) - 0.7 * 1.9 * 2.0**-9
  np.testing.assert_allclose(state.outer.params, moved, rtol=1e-6)


@pytest.mark.parametrize("workers", [2, 8])
def test_other_workers_take_over_what_is_in_flight(workers):
  run = simulated("adamw", **STREAM)
  other = simulated("adamw", workers=workers, **STREAM)
  state, _ = alone.train(run, 4)
  saved = jax.tree.map(np.asarray, state)
  there = other.adopt(saved)
  jax.tree.map(np.testing.assert_array_equal, there.outer, saved.outer)
  mean = alone.average([own(saved.params, w) for w in range(N)])
  alone.near(own(there.params, workers - 1), mean, 1e-6)
  # The next step applies what was sent, whoever takes it.
  on, _ = alone.train(run, 1, state, first=4)
  there, _ = alone.train(other, 1, there, first=4)
  alone.near(other.params(there), run.params(on), 1e-6)
  assert (np.asarray(on.outer.params["w"]) != saved.outer.params["w"]).any()


def test_another_axis_of_the_mesh_stays_automatic():
  mesh = spmd.make_mesh({"data": 4, "tensor": 2})
  run = dj.distribute(make("adamw", **STREAM), mesh)
  specs = {"w": P("tensor"), "v": P(), "gain": P()}
  params = alone.float32(alone.start())
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  state = run.init(KEY, jax.tree.map(place, params, specs))
  state, seen = alone.train(run, state=state)
  assert run.step.compilations() == 1
  for tree in (state.outer.params, state.outer.momentum, state.outer.arrived):
    assert tree["w"].sharding.spec == P("tensor")
  assert state.params["w"].sharding.spec == P("data", "tensor")
  _, outer, metrics = oracle("adamw", 4, [2, 0], delay=1, mix=0.25)
  alone.near(run.params(state), outer, 5e-5)
  alone.near(seen, metrics, 5e-5)


def test_local_statistics_stay_at_home():
  def fn(params, seen, batch, key):
    loss, aux = alone.loss_fn(params, batch, key)
    return loss, (aux, 0.5 * seen + 0.5 * batch["x"].mean())

  loss = dj.stateful(fn, stats="local")
  run = dj.simulate(dj.diloco(loss, optax.sgd(0.1), sync_every=2), workers=N)
  model = dj.Variables(alone.float32(alone.start()), jnp.zeros(()))
  state, rows = run.init(KEY, model), alone.float32(alone.batch(0))
  for _ in range(3):
    state, _ = run.step(state, rows, KEY)
  expected = np.asarray(rows["x"]).reshape(N, -1).mean(1) * (1 - 0.5**3)
  alone.near(state.model_state, expected)
  alone.near(run.params(state).model_state, expected.mean())


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"sync_every": 0}, "diloco: `sync_every`.*got 0"),
    ({"outer_learning_rate": 0}, "diloco: `outer_learning_rate`.*got 0"),
    ({"outer_momentum": 1.0}, r"diloco: `outer_momentum`.*got 1\.0"),
    ({"mix": 1.0}, r"diloco: `mix`.*got 1\.0.*never meet"),
    ({"mix": "half"}, "diloco: `mix`.*got 'half'"),
    (
      {"sync_every": 4, "fragments": 5},
      "diloco: `fragments`.*from 1 to sync_every=4; got 5",
    ),
    ({"fragments": 1.5}, r"diloco: `fragments`.*got 1\.5"),
    (
      {"sync_every": 4, "delay": 4},
      "diloco: `delay`.*from 0 to sync_every - 1 = 3.*got 4",
    ),
    ({"delay": True}, "diloco: `delay`.*got True"),
    ({"accumulate": 0}, "diloco: `accumulate`.*got 0"),
    ({"clip_norm": 0.0}, r"diloco: `clip_norm`.*got 0\.0"),
    ({"wire_dtype": "int8"}, "diloco: `wire_dtype`.*got 'int8'"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    dj.diloco(alone.loss_fn, optax.sgd(0.1), **options)
