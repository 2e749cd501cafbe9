"""Bytes sent and held, against arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import inspect, methods
from distrain_jax.method import Method

pytestmark = pytest.mark.core
P = jax.sharding.PartitionSpec
N, SIZE = 4, 4096  # workers, parameters


def loss_fn(params, batch, key):
  return jnp.mean((batch @ params) ** 2), {}


def made_of(step):
  """A method around a step, with a vector for its state."""
  init = lambda key, params: params
  return Method("test", "data", init, step, lambda s: s, P())


def sent(method, mesh, params=None, rows=N):
  params = np.zeros(SIZE, np.float32) if params is None else params
  run, key = dj.distribute(method, mesh), jax.random.key(0)
  batch = np.ones((rows, SIZE), np.float32)
  return inspect.bytes_sent(run, run.abstract(key, params), batch, key)


@pytest.mark.parametrize(
  ("collective", "kind", "expected"),
  [
    (lambda x: jax.lax.psum(x, "data"), "psum", 2 * 4 * SIZE * 3 / 4),
    (
      lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
      "reduce_scatter",
      4 * SIZE * 3 / 4,
    ),
    (lambda x: jax.lax.all_gather(x[:8], "data"), "all_gather", 4 * 8 * 3),
    (
      lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
      "ppermute",
      4 * SIZE,
    ),
    (
      lambda x: jax.lax.all_to_all(x.reshape(N, -1), "data", 0, 0),
      "all_to_all",
      4 * SIZE * 3 / 4,
    ),
  ],
)
def test_each_collective_sends_what_its_ring_does(
  mesh, collective, kind, expected
):
  step = lambda s, b, k: (s + 0 * collective(s).sum(), {"loss": s[0]})
  assert sent(made_of(step), mesh(N)) == {kind: expected}


def test_a_collective_in_a_scan_counts_once_a_trip(mesh):
  def step(s, b, k):
    body = lambda c, _: (jax.lax.psum(c, "data") / N, None)
    return jax.lax.scan(body, s, length=5)[0], {"loss": s[0]}

  assert sent(made_of(step), mesh(N)) == {"psum": 5 * 2 * 4 * SIZE * 3 / 4}


def test_of_a_conditional_the_dearest_branch_counts(mesh):
  def step(s, b, k):
    big, small = (lambda x: jax.lax.psum(x, "data")), (lambda x: x)
    return jax.lax.cond(s[0] > 0, big, small, s), {"loss": s[0]}

  assert sent(made_of(step), mesh(N)) == {"psum": 2 * 4 * SIZE * 3 / 4}


def counting():
  """A method whose state is a counter and a vector, sent at every third."""

  def step(state, batch, key):
    done = state[0] + 1
    due = jnp.asarray([1, 0, 0])[done % 3]
    big, small = (lambda x: jax.lax.psum(x, "data")), (lambda x: x)
    x = jax.lax.switch(due, [small, big], state[1])
    return (done, x), {"loss": x[0]}

  init = lambda key, params: (jnp.zeros((), jnp.int32), params)
  return Method("test", "data", init, step, lambda s: s[1], P())


def test_of_forms_by_platform_the_one_for_all_others_counts(mesh):
  def step(s, b, k):
    once = lambda x: jax.lax.psum(x, "data")
    loop = lambda x: jax.lax.while_loop(lambda x: x[0] > 0, once, x)
    s = jax.lax.platform_dependent(s, tpu=loop, default=once)
    return s, {"loss": s[0]}

  assert sent(made_of(step), mesh(N)) == {"psum": 2 * 4 * SIZE * 3 / 4}


def test_the_branch_counts_that_the_state_leads_to(mesh):
  run, key = dj.distribute(counting(), mesh(N)), jax.random.key(0)
  batch, whole = np.ones((N, 1), np.float32), 2 * 4 * SIZE * 3 / 4
  params = np.ones(SIZE, np.float32)
  state = run.init(key, params)
  for expected in (0, 0, whole, 0, 0, whole):
    sent = inspect.bytes_sent(run, state, batch, key)
    assert sum(sent.values()) == expected
    state, _ = run.step(state, batch, key)
  for steps, due in ((2, 0), (3, 1), (5, 1), (6, 2)):
    sent = inspect.bytes_sent(run, state, batch, key, steps=steps)
    assert sum(sent.values()) == due * whole / steps
  shapes = run.abstract(key, params)
  assert inspect.bytes_sent(run, shapes, batch, key) == {"psum": whole}


@pytest.mark.parametrize(
  ("name", "options", "exchanges"),
  [
    ("ddp", {}, 1),
    ("local_sgd", {"sync_every": 5}, 1 / 5),
    ("diloco", {"sync_every": 10}, 1 / 10),
    ("diloco", {"sync_every": 10, "fragments": 4, "delay": 3}, 1 / 10),
    ("acco", {"wire_dtype": None}, 2),
    ("acco", {"wire_dtype": None, "warmup": 5}, 2.5),
  ],
)
def test_on_average_a_method_sends_what_its_exchanges_say(
  name, options, exchanges, mesh
):
  method = methods.FACTORIES[name](loss_fn, optax.adam(0.1), **options)
  run, key = dj.distribute(method, mesh(N)), jax.random.key(0)
  batch = np.ones((2 * N, SIZE), np.float32)
  state = run.init(key, np.zeros(SIZE, np.float32))
  sent = inspect.bytes_sent(run, state, batch, key, steps=10)
  scalars = 64  # loss and norms
  whole = exchanges * 2 * 4 * SIZE * 3 / 4
  assert 0 <= sum(sent.values()) - whole <= scalars


def test_an_average_needs_a_state_and_a_step(mesh):
  run, key = dj.distribute(counting(), mesh(N)), jax.random.key(0)
  batch, params = np.ones((N, 1), np.float32), np.ones(SIZE, np.float32)
  shapes = run.abstract(key, params)
  for steps, given in ((0, "one"), (2, "shapes")):
    with pytest.raises(ValueError, match=f"steps={steps} is.*got {given}"):
      inspect.bytes_sent(run, shapes, batch, key, steps=steps)


def test_an_unbounded_loop_is_refused_rather_than_counted_as_one(mesh):
  def step(s, b, k):
    body = lambda x: jax.lax.psum(x, "data")
    return jax.lax.while_loop(lambda x: x[0] > 0, body, s), {"loss": s[0]}

  with pytest.raises(ValueError, match="while loop"):
    sent(made_of(step), mesh(N))


def test_zero1_sends_what_ddp_sends(mesh):
  scalars = 64  # loss and norm
  for method in (dj.ddp, dj.zero1):
    total = sum(sent(method(loss_fn, optax.adam(0.1)), mesh(N)).values())
    assert 0 <= total - 2 * 4 * SIZE * 3 / 4 <= scalars


def test_accumulating_sends_no_more(mesh):
  once = sent(dj.ddp(loss_fn, optax.adam(0.1)), mesh(N), rows=4 * N)
  four = dj.ddp(loss_fn, optax.adam(0.1), accumulate=4)
  assert sent(four, mesh(N), rows=4 * N) == once


def test_a_simulated_run_is_refused():
  run = dj.simulate(dj.ddp(loss_fn, optax.sgd(0.1)), workers=2)
  with pytest.raises(ValueError, match="simulated"):
    inspect.bytes_sent(run, None, None, None)


def test_state_held_is_that_of_one_worker(mesh):
  params, key = np.zeros(SIZE, np.float32), jax.random.key(0)
  tx = optax.adam(0.1)
  counts = 8  # step and the optimizer's
  ddp = dj.distribute(dj.ddp(loss_fn, tx), mesh(N))
  zero1 = dj.distribute(dj.zero1(loss_fn, tx), mesh(N))
  for run, expected in ((ddp, 12 * SIZE), (zero1, (4 + 8 / N) * SIZE)):
    state = run.init(key, params)
    assert inspect.bytes_held(state) == expected + counts
    assert inspect.bytes_held(run.abstract(key, params)) == expected + counts


def test_a_branch_counts_that_the_key_decides(mesh):
  chance = lambda key, step: jax.random.uniform(jax.random.fold_in(key, step))

  def step(state, batch, key):
    big, small = (lambda x: jax.lax.psum(x, "data")), (lambda x: x)
    due = chance(key, state[0]) < 0.1 * jnp.sqrt(state[0] + 1.0)
    x = jax.lax.cond(due, big, small, state[1])
    return (state[0] + 1, x), {"loss": x[0]}

  init = lambda key, params: (jnp.zeros((), jnp.int32), params)
  method = Method("test", "data", init, step, lambda s: s[1], P())
  run, key = dj.distribute(method, mesh(N)), jax.random.key(3)
  state = run.init(key, np.ones(SIZE, np.float32))
  batch = np.ones((N, 1), np.float32)
  due = [float(chance(key, i)) < 0.1 * np.sqrt(i + 1) for i in range(30)]
  assert 0 < sum(due) < 30
  sent = inspect.bytes_sent(run, state, batch, key, steps=30)
  assert sent == {"psum": sum(due) / 30 * 2 * 4 * SIZE * 3 / 4}


def test_a_tied_shuffle_is_sent_as_often_as_it_is_due(mesh):
  def average(**options):
    method = dj.wash(
      loss_fn, optax.sgd(0.1), rate=0.5, layer_schedule="constant", **options
    )
    made = dj.spmd.make_mesh({"population": N}, jax.devices()[:N])
    run, key = dj.distribute(method, made), jax.random.key(0)
    state = run.init(key, np.ones(SIZE, np.float32))
    batch = np.ones((N, SIZE), np.float32)
    found = inspect.bytes_sent(run, state, batch, key, steps=400)
    return found["all_to_all"]

  always = average()
  assert always == 0.5 * 4 * SIZE * 3 / 4
  share = average(tied=True, relative_rate=lambda step: 0.25) / always
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)
  quarter = average(stop_after=100) / always
  assert quarter == 0.25
