"""What ACCO holds and sends, and what may be done to a state between steps."""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import inspect, layout

spec = importlib.util.spec_from_file_location(
  "halves", Path(__file__).parent / "halves.py"
)
halves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(halves)

pytestmark = pytest.mark.core

KEY, N = halves.KEY, 4
LOW = {"wire_dtype": "bfloat16", "param_dtype": "bfloat16"}


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
  """Buffers of a few elements have rows; `w` travels alone."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layout, "TILES", (2, 1))
    patch.setattr(layout, "LANES", 1)
    patch.setattr(layout, "ALONE", 12)
    yield


def make(accumulate=2, **options):
  rule = halves.RULES["adamw"]
  options = {"clip_norm": rule.clip_norm, "wire_dtype": None, **options}
  return dj.acco(halves.loss_fn, rule.tx, accumulate=accumulate, **options)


@functools.cache
def simulated(workers=N, **options):
  return dj.simulate(make(**options), workers=workers)


def begin(run):
  return run.init(KEY, halves.float32(halves.start()))


def steps(run, state, count, first=0):
  for i in range(first, first + count):
    rows = jax.tree.map(np.float32, halves.batch(i))
    state, metrics = run.step(state, rows, KEY)
  return state, metrics


def saved(state):
  """What a checkpoint holds."""
  return jax.tree.map(np.array, state)


def test_resumed_equals_uninterrupted_wherever_it_was_saved():
  run = simulated(warmup=1, estimate_dtype="int8", **LOW)
  state = begin(run)
  kept = []
  for i in range(4):
    kept.append(saved(state))
    state, metrics = steps(run, state, 1, first=i)
  end = (saved(state), metrics, run.params(state))
  for i, state in enumerate(kept):
    state, metrics = steps(run, state, 4 - i, first=i)
    halves.equal((state, metrics, run.params(state)), end)


def test_other_numbers_of_workers_go_on_from_a_state():
  eight, four = simulated(8), simulated(4)
  state = saved(steps(eight, begin(eight), 3)[0])
  there = four.adopt(state)
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(begin(four))
  back = eight.adopt(there)
  halves.equal((back.shard, back.reduced), (state.shard, state.reduced))
  # Gradients that wait are added up on the way, in another order.
  total = lambda grads: jax.tree.map(lambda x: np.sum(x, 0), grads)
  halves.near(total(back.grads), total(state.grads), 1e-6)
  ends = []
  for run, begun in ((eight, state), (eight, back), (four, there)):
    state = begun
    model = saved(run.params(state))
    for i in range(3):
      # Four workers take other rows in the first half: let all be the same.
      micro = jax.tree.map(np.float32, halves.batch(7 + i, 3))
      rows = halves.repeated(micro, 32)
      state, metrics = run.step(state, rows, KEY)
    ends.append((model, run.params(state), metrics))
  halves.near(ends[1], ends[0], 2e-6)
  halves.near(ends[2], ends[0], 5e-6)


@pytest.mark.parametrize("workers", [2, 8])
def test_it_holds_4_and_14_over_n_bytes_a_parameter(workers, mesh):
  loss_fn, adamw = lambda params, rows, key: (0.0, {}), optax.adamw(1e-3)
  # All workers divide it.
  params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}

  def is_held(method, bytes_each):
    run = dj.distribute(method, mesh(workers))
    held = inspect.bytes_held(run.abstract(KEY, params))
    return 0 < held - bytes_each * 64 * 32 <= 4 * 4  # step, counts

  n = workers
  assert is_held(dj.acco(loss_fn, adamw, param_dtype="bfloat16"), 4 + 14 / n)
  assert 4 + 14 / n <= 6 + 12 / n
  assert is_held(dj.zero1(loss_fn, adamw, param_dtype="bfloat16"), 2 + 12 / n)
  assert is_held(dj.acco(loss_fn, adamw, wire_dtype=None), 8 + 16 / n)


def divided_loss(params, rows, key):
  return jnp.mean((rows["x"] @ params["w"]) ** 2), {}


def sent(method, mesh):
  run = dj.distribute(method, mesh(8))
  params = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
  rows = {"x": jax.ShapeDtypeStruct((64, 16), jnp.float32)}
  return inspect.bytes_sent(run, run.abstract(KEY, params), rows, KEY)


@pytest.fixture(scope="module")
def of_zero1(mesh):
  sgd, low = optax.sgd(0.1), LOW
  return sent(dj.zero1(divided_loss, sgd, **low), mesh)


@pytest.mark.parametrize(
  ("slices", "reduction"),
  [(0, "reduce_scatter"), (2, "reduce_scatter"), (1, "all_to_all")],
)
def test_a_round_sends_two_of_zero1s_updates(slices, reduction, mesh, of_zero1):
  options = {"slices": slices, "reduction": reduction, **LOW}
  method = dj.acco(divided_loss, optax.sgd(0.1), accumulate=4, **options)
  bytes_sent = sent(method, mesh)
  one_way = 2 * 512 * 7 / 8  # bfloat16, of eight workers
  assert of_zero1["reduce_scatter"] == of_zero1["all_gather"] == one_way
  assert bytes_sent[reduction] == bytes_sent["all_gather"] == 2 * one_way
  assert set(bytes_sent) == {reduction, "all_gather", "psum"}
  assert bytes_sent["psum"] <= 2 * of_zero1["psum"] + 16  # scalars


def test_an_estimate_in_eight_bits_sends_a_quarter_of_its_float32(mesh):
  both = {}
  for dtype in (None, "bfloat16", "int8"):
    method = dj.acco(
      divided_loss, optax.sgd(0.1), accumulate=4, estimate_dtype=dtype
    )
    both[dtype] = sent(method, mesh)["all_gather"]
  one_way = 4 * 512 * 7 / 8
  assert both[None] == 2 * one_way
  assert both["bfloat16"] == 1.5 * one_way
  scales = 4 * 4 * 7  # of four rows on each of the workers
  assert both["int8"] == 1.25 * one_way + scales


def test_the_compiled_round_has_one_exchange_in_its_loop_over_halves(mesh):
  run = dj.distribute(make(), mesh(8))
  rows = jax.tree.map(np.float32, halves.batch(0))
  text = run.step.lower(begin(run), rows, KEY).compile().as_text()
  # XLA for CPU may combine the two buffers' collectives: `w`, and the others.
  found = lambda kind: len(re.findall(rf" {kind}(-start)?\(", text))
  assert 1 <= found("reduce-scatter") <= 2
  assert 1 <= found("all-gather") <= 2
  assert found("all-to-all") == found("collective-permute") == 0


def test_only_the_point_depends_on_the_wire_of_the_estimate():
  exact = simulated(estimate_dtype="float32")
  state = saved(steps(exact, begin(exact), 3)[0])
  expected, metrics = steps(exact, state, 1, first=3)
  model = exact.params(expected)
  for dtype in (None, "bfloat16", "int8"):
    run = simulated(estimate_dtype=dtype)
    got, same = steps(run, state, 1, first=3)
    if dtype is None:  # another program
      halves.near(got, expected)
      continue
    halves.equal((run.params(got), same), (model, metrics))
    halves.equal(got._replace(estimate=()), expected._replace(estimate=()))
    unequal = lambda a, b: (a != b).any()
    points = got.estimate, expected.estimate
    assert any(jax.tree.leaves(jax.tree.map(unequal, *points)))
    if dtype == "bfloat16":
      low = jax.tree.map(lambda x: x.astype("bfloat16"), expected.estimate)
      halves.equal(got.estimate, halves.float32(low))


def test_an_estimate_in_eight_bits_is_off_by_a_part_of_its_step():
  rough, exact = (simulated(estimate_dtype=x) for x in ("int8", "float32"))
  state = saved(steps(exact, begin(exact), 3)[0])
  got, expected = (steps(run, state, 1, first=3)[0] for run in (rough, exact))
  theta = halves.whole(expected.shard.masters)
  largest = lambda a, b: max(
    jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b))
  )
  moved = largest(expected.estimate, theta)
  error = largest(got.estimate, expected.estimate)
  assert 0 < error <= moved / 254 + 1e-6


def test_masters_stay_exact_and_points_are_their_roundings():
  run = simulated(**LOW)
  params = halves.float32(halves.start())
  state = run.init(KEY, params)
  halves.equal(halves.whole(state.shard.masters), params)
  state, _ = steps(run, state, 4)
  fields = {"estimate": "bfloat16", "grads": "bfloat16", "reduced": "bfloat16"}
  for name, dtype in fields.items():
    found = {str(x.dtype) for x in jax.tree.leaves(getattr(state, name))}
    assert found == {dtype}
  wide = {x.dtype.name for x in jax.tree.leaves(state.shard)}
  assert wide == {"float32", "int32"}
  # With nothing pending the next commit is of the point where it is.
  nothing = state._replace(count=jnp.zeros(()), reduced_count=jnp.zeros(()))
  pieces = state.shard.masters
  masters = halves.whole(pieces)
  rounded = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), masters)
  halves.equal(run.params(nothing), rounded)
  assert not any(x.any() for x in jax.tree.leaves(halves.padding(pieces)))
