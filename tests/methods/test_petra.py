"""PETRA against a slow oracle that keeps every version of every parameter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import petra_networks as nets
import pytest

import distrain_jax as dj
from distrain_jax import spmd, stages
from distrain_jax.method import Variables
from distrain_jax.pipelining.engine import Engine
from distrain_jax.pipelining.optimizer import Optimizer
from distrain_jax.pipelining.plan import BUFFERS, make_plan

KEY = jax.random.key(3)
SGD = optax.sgd(0.3, momentum=0.9)
pytestmark = pytest.mark.core


def close(got, expected, tolerance=2e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
    ),
    got,
    expected,
  )


def equal(got, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
    got,
    expected,
  )


def recorder():
  """An optimizer that changes nothing, and adds up the gradients it is given."""
  zeros = lambda params: jax.tree.map(jnp.zeros_like, params)

  def update(grads, state, params=None):
    return zeros(grads), jax.tree.map(jnp.add, state, grads)

  return optax.GradientTransformation(zeros, update)


RECORDER = recorder()


def a_run(
  tx=SGD,
  *,
  accumulate=1,
  buffer="none",
  wire_dtype=None,
  delay_exponent=0.0,
  predict=0.0,
  on_mesh=False,
  one_stage=False,
  drops=False,
):
  """(run, model, blocks) of a small network, one block a stage."""
  options = (
    ("accumulate", accumulate),
    ("buffer", buffer),
    ("wire_dtype", wire_dtype),
    ("delay_exponent", delay_exponent),
    ("predict", predict),
  )
  return _made(tx, options, on_mesh, one_stage, drops)


@functools.cache  # compiled once for all tests that ask for the same
def _made(tx, options, on_mesh, one_stage, drops):
  fn = nets.dropping if drops else nets.branch
  blocks, params, state = nets.make("rrn", stats=True, fn=fn)
  model = Variables(params, state)
  network = [blocks] if one_stage else blocks
  example = nets.batches(1)
  method = dj.petra(network, tx, shapes=model, example=example, **dict(options))
  if on_mesh:
    run = dj.distribute(method, stage_mesh(len(network)))
  else:
    run = dj.simulate(method, workers=len(network))
  return run, model, blocks


def steps(run, state, x, y, rows, key=KEY):
  """All of the rows, so many a step; and the steps' metrics."""
  found = []
  for start in range(0, len(x), rows):
    batch = run.put((x[start : start + rows], y[start : start + rows]))
    state, metrics = run.step(state, batch, key)
    found.append(jax.device_get(metrics))
  return state, found


def stage_mesh(count, **more):
  sizes = {"stage": count, **more}
  return spmd.make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])


# The modes that other tests use as they are used there: compiled once.
CASES = [
  ("none", 1, False),
  ("none", 3, True),
  ("input", 1, False),
  ("input_params", 1, False),
  ("params", 1, False),
  ("params_gradient", 2, True),
  ("graph", 2, False),
]


@pytest.mark.parametrize(("buffer", "k", "drops"), CASES)
def test_equals_the_oracle(buffer, k, drops):
  count = 12
  run, model, blocks = a_run(accumulate=k, buffer=buffer, drops=drops)
  x, y = nets.batches(count)
  state, found = steps(run, run.init(KEY, model), x, y, k * nets.ROWS)
  state = run.drain(state, KEY)
  got = run.params(state)
  oracle = nets.Oracle(blocks, *model, SGD, k=k, mode=buffer, key=KEY)
  oracle.run(x.reshape(count, nets.ROWS, -1), y.reshape(count, -1))
  close(got.params, oracle.params())
  close(got.model_state, oracle.model_state())
  # The last stage sees micro-batch b at tick b + J - 1.
  late = len(blocks) - 1
  if k == 1:
    losses = [m["loss"] for m in found]
    assert losses[:late] == [0] * late
    close(np.array(losses[late:]), np.array(oracle.losses[: count - late]))


@pytest.mark.parametrize("buffer", ["none", "graph"])
def test_on_a_mesh_equals_simulated(buffer):
  x, y = nets.batches(8)
  results = []
  for on_mesh in (False, True):
    run, model, _ = a_run(accumulate=2, buffer=buffer, on_mesh=on_mesh)
    state, found = steps(run, run.init(KEY, model), x, y, 2 * nets.ROWS)
    results.append(
      (run.params(state), run.params(run.drain(state, KEY)), found)
    )
    assert run.step.compilations() == 1
  close(results[0], results[1])


@pytest.mark.parametrize("k", [1, 2])
def test_one_stage_is_sgd_to_the_bit(k):
  run, model, blocks = a_run(one_stage=True, accumulate=k)
  loss = dj.stateful(stages.loss_fn(blocks))
  plain = dj.simulate(dj.ddp(loss, SGD, accumulate=k), workers=1)
  x, y = nets.batches(6)
  state, found = steps(run, run.init(KEY, model), x, y, k * nets.ROWS)
  other, expected = steps(plain, plain.init(KEY, model), x, y, k * nets.ROWS)
  # Where gradients are summed, XLA fuses the two programs differently.
  same = equal if k == 1 else functools.partial(close, tolerance=3e-7)
  same(run.params(state), plain.params(other))
  same([m["loss"] for m in found], [m["loss"] for m in expected])


@functools.cache
def bp_gradient(batch=0):
  blocks, params, state = nets.make("rrn", stats=True)
  loss = stages.loss_fn(blocks)
  x, y = nets.batches(batch + 1)
  rows = slice(batch * nets.ROWS, None)
  fn = lambda params: loss(params, state, (x[rows], y[rows]), KEY)[0]
  return jax.grad(fn)(params)


# The others are the oracle's at any rate, by the same formula.
@pytest.mark.parametrize("buffer", ["none", "graph"])
def test_without_learning_the_gradient_is_back_propagations(buffer):
  run, model, _ = a_run(RECORDER, buffer=buffer)
  x, y = nets.batches(1)
  state, _ = steps(run, run.init(KEY, model), x, y, nets.ROWS)
  state = run.drain(state, KEY)
  close(recorded(run, state), bp_gradient(), 1e-5)


def recorded(run, state):
  """What a `recorder` was given, as the network's params."""
  as_params = state._replace(params=state.opt_state)
  return run.params(as_params).params


def test_gradients_come_2_j_minus_1_minus_s_ticks_after_the_batch():
  run, model, blocks = a_run(accumulate=1)
  last = len(blocks) - 1
  x, y = nets.batches(14)
  state = run.init(KEY, model)
  for tick in range(14):
    rows = slice(tick * nets.ROWS, (tick + 1) * nets.ROWS)
    state, _ = run.step(state, (x[rows], y[rows]), KEY)
    seen = [max(0, tick + 1 - (2 * last - s)) for s in range(last + 1)]
    assert state.counted.tolist() == seen
    # The micro-batch that came back on stage s is the one of tick - delay.
    entered = np.asarray(state.flight.entered)
    for s in range(last + 1):
      number = tick - 2 * last + s
      assert entered[2 * last - s] == (number if number >= 0 else -1)


def test_ticks_without_a_gradient_change_nothing_and_updates_are_counted():
  run, model, blocks = a_run(accumulate=2)
  x, y = nets.batches(8)
  state = run.init(KEY, model)
  empty = run.drain(jax.tree.map(jnp.copy, state), KEY)
  equal(
    state._replace(flight=(), metrics=()), empty._replace(flight=(), metrics=())
  )
  state, _ = steps(run, state, x, y, 2 * nets.ROWS)
  state = run.drain(state, KEY)
  assert state.counted.tolist() == [8] * len(blocks)
  # Nothing is left: a second time changes nothing but the messages' contents.
  again = run.drain(jax.tree.map(jnp.copy, state), KEY)
  equal(
    state._replace(flight=(), metrics=()), again._replace(flight=(), metrics=())
  )
  # Optimizer steps are N / k on each stage: momentum knows.
  oracle = nets.Oracle(blocks, *model, SGD, k=2, key=KEY)
  oracle.run(x.reshape(8, nets.ROWS, -1), y.reshape(8, -1))
  assert [len(h) - 1 for h in oracle.history] == [4] * len(blocks)
  close(run.params(state).params, oracle.params())


def test_parameters_change_only_with_every_kth_own_gradient():
  run, model, blocks = a_run(accumulate=3, tx=optax.sgd(0.1))
  x, y = nets.batches(12)
  state, last = run.init(KEY, model), len(blocks) - 1
  for step in range(4):
    rows = slice(step * 3 * nets.ROWS, (step + 1) * 3 * nets.ROWS)
    state, _ = run.step(state, (x[rows], y[rows]), KEY)
    ticks = 3 * (step + 1)
    seen = [max(0, ticks - (2 * last - s)) for s in range(last + 1)]
    params = run.params(state).params
    for s, block in enumerate(blocks):
      before = model.params[block.name]
      same = all(
        np.array_equal(a, b)
        for a, b in zip(
          jax.tree.leaves(before), jax.tree.leaves(params[block.name])
        )
      )
      assert same == (seen[s] < 3)


def test_k_equal_batches_give_the_gradient_of_one():
  k = 3
  run, model, _ = a_run(RECORDER, accumulate=k)
  x, y = nets.batches(1)
  x, y = np.tile(x, (k, 1)), np.tile(y, k)
  state, _ = steps(run, run.init(KEY, model), x, y, k * nets.ROWS)
  close(recorded(run, run.drain(state, KEY)), bp_gradient(), 1e-5)


def test_one_update_for_the_whole_run_is_one_of_back_propagation():
  k = 5
  run, model, blocks = a_run(accumulate=k)
  loss = dj.stateful(stages.loss_fn(blocks))
  plain = dj.simulate(dj.ddp(loss, SGD, accumulate=k), workers=1)
  x, y = nets.batches(k)
  state, _ = steps(run, run.init(KEY, model), x, y, k * nets.ROWS)
  state = run.drain(state, KEY)
  other, _ = steps(plain, plain.init(KEY, model), x, y, k * nets.ROWS)
  close(run.params(state), plain.params(other), 5e-6)


def after(buffer, tx=SGD, count=8):
  run, model, _ = a_run(tx, buffer=buffer)
  x, y = nets.batches(count)
  state, _ = steps(run, run.init(KEY, model), x, y, nets.ROWS)
  return run.params(run.drain(state, KEY)).params


def distance(a, b):
  return max(
    float(np.abs(np.asarray(x) - np.asarray(y)).max())
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )


def test_inverting_with_the_stashed_parameters_is_keeping_the_input():
  assert distance(after("params"), after("input_params")) < 1e-5


def test_petra_nears_the_kept_input_as_the_rate_falls():
  slower = optax.sgd(0.03, momentum=0.9)  # a tenth of SGD's rate
  gaps = [
    distance(after("none", tx), after("input", tx)) for tx in (SGD, slower)
  ]
  # The input is off by what the weights moved, and so is the gradient, which
  # the rate multiplies once more: quadratic in the parameters.
  assert gaps[0] > 1e-5
  assert gaps[1] < gaps[0] / 30


def test_where_only_the_head_trains_reconstructions_are_exact():
  blocks, params, state = nets.make("rrn", stats=True)
  model = Variables(params, state)
  tx = {b.name: recorder() for b in blocks} | {"head": SGD}
  x, y = nets.batches(6)
  method = dj.petra(
    blocks, tx, shapes=model, example=(x[: nets.ROWS], y[: nets.ROWS])
  )
  run = dj.simulate(method, workers=len(blocks))
  state_, _ = steps(run, run.init(KEY, model), x, y, nets.ROWS)
  state_ = run.drain(state_, KEY)
  # The oracle with true inputs: its head's version is that of the tick.
  frozen = nets.Oracle(
    blocks,
    params,
    state,
    SGD,
    mode="input",
    key=KEY,
    frozen=[b.name for b in blocks[:-1]],
  )
  frozen.run(x.reshape(6, nets.ROWS, -1), y.reshape(6, -1))
  got = run.params(state_).params
  close(got["head"], frozen.params()["head"])
  sums = {
    b.name: jax.tree.map(lambda *g: sum(g), *frozen.grads[j])
    for j, b in enumerate(blocks[:-1])
  }
  plan = make_plan(
    blocks,
    shapes=model,
    example=(x[: nets.ROWS], y[: nets.ROWS]),
    inputs=None,
    mode=BUFFERS["none"],
  )
  optimizer = Optimizer("petra", Engine(plan, "stage"), tx)
  for s, block in enumerate(blocks[:-1]):
    mine = jax.tree.map(lambda x, s=s: x[s], state_.opt_state)
    (found,) = optimizer.packing.unpack(mine, s)
    close(found, sums[block.name], 1e-5)


def test_a_stage_that_is_not_reversible_sends_its_true_input():
  blocks, params, state = nets.make("rrn", stats=False)
  x, y = nets.batches(12)
  method = dj.petra(
    blocks,
    optax.sgd(0.5),
    shapes=params,
    example=(x[: nets.ROWS], y[: nets.ROWS]),
  )
  run = dj.simulate(method, workers=len(blocks))
  got, _ = steps(run, run.init(KEY, params), x, y, nets.ROWS)
  plan = make_plan(
    blocks,
    shapes=params,
    example=(x[: nets.ROWS], y[: nets.ROWS]),
    inputs=None,
    mode=BUFFERS["none"],
  )
  oracle = nets.Oracle(blocks, params, state, optax.sgd(0.5), key=KEY)
  oracle.run(x.reshape(12, nets.ROWS, -1), y.reshape(12, -1))
  entered = np.asarray(got.flight.entered)
  for s in range(1, len(blocks) - 1):
    mine = jax.tree.map(lambda a, s=s: a[s], got.flight.down)
    ((sent, _),) = plan.returns.unpack(mine, s - 1)
    estimate, true = oracle.reconstructed[s][entered[2 * (len(blocks) - 1) - s]]
    close(sent, estimate)
    error = float(stages.relative_error(sent, true))
    if blocks[s].inverse is None:
      assert error < 1e-6
    else:
      assert error > 1e-4  # the weights moved meanwhile


def test_pipelines_side_by_side_average_their_gradients():
  x, y = nets.batches(8)
  double = 2 * nets.ROWS
  cut = lambda blocks: [blocks[:2], blocks[2:4], blocks[4:]]
  run, model, blocks = _side_by_side(cut)
  state, found = steps(run, run.init(KEY, model), x, y, 2 * double)
  got = run.params(run.drain(state, KEY))
  # One pipeline whose micro-batches have the rows of both.
  network = cut(blocks)
  order = (
    np.arange(len(x)).reshape(-1, 2, 2, nets.ROWS).transpose(0, 2, 1, 3).ravel()
  )
  method = dj.petra(
    network, SGD, shapes=model, example=(x[:double], y[:double]), accumulate=2
  )
  one = dj.simulate(method, workers=3)
  other, expected = steps(
    one, one.init(KEY, model), x[order], y[order], 2 * double
  )
  close(got, one.params(one.drain(other, KEY)))
  close([m["loss"] for m in found], [m["loss"] for m in expected])


def _side_by_side(cut):
  blocks, params, _ = nets.make("rrnr")
  x, y = nets.batches(1)
  method = dj.petra(
    cut(blocks),
    SGD,
    shapes=params,
    example=(x, y),
    accumulate=2,
    replicas="data",
  )
  return dj.distribute(method, stage_mesh(3, data=2)), params, blocks


def test_a_restored_state_goes_on_to_the_same_bits():
  run, model, _ = a_run(accumulate=2, on_mesh=True)
  x, y = nets.batches(12)
  half = 6 * nets.ROWS
  state, _ = steps(run, run.init(KEY, model), x[:half], y[:half], 2 * nets.ROWS)
  saved = jax.device_get(state)  # mid-flight
  state, _ = steps(run, state, x[half:], y[half:], 2 * nets.ROWS)
  shardings = jax.tree.map(lambda x: x.sharding, run.abstract(KEY, model))
  restored = jax.device_put(saved, shardings)
  other, _ = steps(run, restored, x[half:], y[half:], 2 * nets.ROWS)
  equal(jax.device_get(state), jax.device_get(other))


def test_messages_in_fewer_bits_cost_some_accuracy():
  x, y = nets.batches(4)
  results = []
  for wire in (None, "bfloat16"):
    run, model, _ = a_run(wire_dtype=wire)
    state, _ = steps(run, run.init(KEY, model), x, y, nets.ROWS)
    results.append(run.params(run.drain(state, KEY)).params)
  assert 1e-5 < distance(*results) < 0.1


def test_updates_are_divided_by_a_power_of_the_delay():
  x, y = nets.batches(1)
  moved = []
  for exponent in (0.0, 0.5):
    run, model, blocks = a_run(optax.sgd(0.1), delay_exponent=exponent)
    state, _ = steps(run, run.init(KEY, model), x, y, nets.ROWS)
    params = run.params(run.drain(state, KEY)).params
    moved.append(jax.tree.map(jnp.subtract, params, model.params))
  for s, block in enumerate(blocks):
    factor = (1 + 2 * (len(blocks) - 1 - s)) ** -0.5
    expected = jax.tree.map(lambda a, f=factor: f * a, moved[0][block.name])
    close(moved[1][block.name], expected, 1e-5)


def test_the_same_functions_run_under_pmap():
  run, model, blocks = a_run(accumulate=2)
  method, count = run.method, len(blocks)
  x, y = nets.batches(6)
  state = run.init(KEY, model)
  spread = lambda spec, tree: jax.tree.map(
    lambda a: a if spec else jnp.broadcast_to(a, (count, *a.shape)), tree
  )
  each = jax.device_get(spmd.map_specs(spread, method.specs, state))
  step = jax.pmap(
    method.step,
    axis_name="stage",
    in_axes=(0, None, None),
    devices=jax.devices()[:count],
  )
  for start in range(0, len(x), 2 * nets.ROWS):
    rows = slice(start, start + 2 * nets.ROWS)
    each, metrics = step(each, (x[rows], y[rows]), KEY)
    state, expected = run.step(state, (x[rows], y[rows]), KEY)
  close({k: v[0] for k, v in metrics.items()}, expected)
  close(each.params, state.params)
  close(
    each.flight,
    state.flight._replace(
      entered=np.broadcast_to(state.flight.entered, each.flight.entered.shape)
    ),
  )


def test_another_axis_of_the_mesh_stays_automatic():
  blocks, params, state = nets.make("rr", stats=True)
  model = Variables(params, state)
  method = dj.petra(
    blocks, SGD, shapes=model, example=nets.batches(1), accumulate=2
  )
  x, y = nets.batches(6)
  results = []
  for run in (
    dj.simulate(method, workers=4),
    dj.distribute(method, stage_mesh(4, tensor=2)),
  ):
    state, _ = steps(run, run.init(KEY, model), x, y, 2 * nets.ROWS)
    results.append(jax.device_get(run.params(state)))
  close(*results)


def test_blocks_of_one_kind_may_have_transforms_of_their_own():
  blocks, params, _ = nets.make("rr")
  tx = {b.name: optax.sgd(0.1) for b in blocks}
  tx["block_1"] = optax.set_to_zero()  # block_0 is of its kind, and trains
  x, y = nets.batches(1)
  method = dj.petra(blocks, tx, shapes=params, example=(x, y))
  run = dj.simulate(method, workers=len(blocks))
  state, _ = steps(run, run.init(KEY, params), x, y, nets.ROWS)
  got = run.params(run.drain(state, KEY))
  equal(got["block_1"], params["block_1"])
  assert distance(got["block_0"], params["block_0"]) > 1e-3
