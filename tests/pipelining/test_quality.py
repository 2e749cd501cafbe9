"""PETRA's gradients measured: against the engine, and a slow oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import petra_networks as nets
import pytest

import distrain_jax as dj
from distrain_jax import stages
from distrain_jax.method import Variables
from distrain_jax.pipelining import quality
from distrain_jax.pipelining.emulation import Emulation

KEY = jax.random.key(3)
SGD = optax.sgd(0.3, momentum=0.9)


def close(got, expected, tolerance=2e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
    ),
    got,
    expected,
  )


COUNT = 14  # micro-batches


def micro_batches(count=COUNT):
  x, y = nets.batches(count)
  return x.reshape(count, nets.ROWS, -1), y.reshape(count, nets.ROWS)


def emulate(network, model, tx, count, probes=(), **options):
  """(the emulation after so many ticks, {number: Probe}, losses)."""
  emulation = Emulation(network, tx, model, KEY, **options)
  found, losses = {}, []
  for i, (x, y) in enumerate(zip(*micro_batches(count))):
    loss, left = emulation.tick(x, y, watch=i in probes)
    losses.append(loss)
    if left is not None and left.watched:
      found[left.number] = quality.probe(emulation, left)
  return emulation, found, losses


CUTS = {
  "a block a stage": lambda blocks: blocks,
  "several": lambda b: [b[:2], b[2], b[3:]],
  "reversible beside the loss": lambda b: [b[0], b[1], b[2:]],
  "one stage": lambda blocks: [blocks],
}
CASES = [
  ("a block a stage", 1, {"clip_norm": 0.5}),
  ("several", 3, {}),
]


@pytest.mark.parametrize(("cut", "k", "options"), CASES)
def test_ticks_are_those_of_petra(cut, k, options):
  blocks, params, state = nets.make("rrn", stats=True, fn=nets.dropping)
  network, model = CUTS[cut](blocks), Variables(params, state)
  x, y = nets.batches(12)
  method = dj.petra(
    network,
    SGD,
    shapes=model,
    example=nets.batches(1),
    accumulate=k,
    **options,
  )
  run = dj.simulate(method, workers=len(network))
  engine = run.init(KEY, model)
  rows = k * nets.ROWS
  for i in range(0, len(x), rows):
    batch = run.put((x[i : i + rows], y[i : i + rows]))
    engine, metrics = run.step(engine, batch, KEY)
  got, _, losses = emulate(network, model, SGD, 12, accumulate=k, **options)
  close(got.model(), tuple(run.params(engine)))
  close(np.mean(losses[-k:]), metrics["loss"])


@functools.cache
def oracle_and_probes(k=2):
  blocks, params, state = nets.make("rrn", fn=nets.dropping)
  oracle = nets.Oracle(blocks, params, state, SGD, k=k, key=KEY)
  oracle.run(*micro_batches())
  _, probes, _ = emulate(blocks, params, SGD, COUNT, {0, 5}, accumulate=k)
  return blocks, oracle, probes


def vector(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def back_propagation(blocks):
  loss = stages.loss_fn(blocks)
  fn = lambda params, batch, key: loss(params, {}, batch, key)[0]
  return jax.jit(jax.grad(fn))


def back_propagated(blocks, params, number):
  batch = tuple(a[number] for a in micro_batches())
  key = jax.random.fold_in(KEY, number)
  return back_propagation(tuple(blocks))(params, batch, key)


@pytest.mark.parametrize("number", [0, 5])
def test_a_probe_is_what_the_oracle_s_history_gives(number):
  blocks, oracle, probes = oracle_and_probes()
  probe, last = probes[number], len(blocks) - 1
  at = lambda tick_of: {
    b.name: oracle.at(i, tick_of(i)) for i, b in enumerate(blocks)
  }
  delayed = back_propagated(blocks, at(lambda i: number + i), number)
  for j, block in enumerate(blocks):
    tick = number + 2 * last - j
    params = at(lambda i, tick=tick: tick)
    true = vector(back_propagated(blocks, params, number)[block.name])
    petra = vector(oracle.grads[j][number])
    late = vector(delayed[block.name])
    norm = np.linalg.norm
    got = [field[j] for field in probe[:-1]]
    expected = []
    for a in (petra, late):
      expected += [a @ true / norm(a) / norm(true), norm(a) / norm(true)]
    close(got, expected, 1e-5)


def test_reconstruction_errors_are_the_oracle_s():
  blocks, oracle, probes = oracle_and_probes()
  for number, probe in probes.items():
    assert list(probe.reconstruction) == ["block_0", "block_1"]
    for j in (1, 2):
      error = stages.relative_error(*oracle.reconstructed[j][number])
      np.testing.assert_allclose(
        probe.reconstruction[blocks[j].name], error, rtol=1e-4, atol=1e-6
      )
  assert probes[5].reconstruction["block_0"] > 1e-3
  assert probes[5].cosine.min() < 0.999


@pytest.mark.parametrize("cut", CUTS)
def test_without_learning_all_gradients_agree(cut):
  blocks, params, _ = nets.make("rrn")
  network = CUTS[cut](blocks)
  _, probes, _ = emulate(network, params, optax.sgd(0.0), 12, {1})
  probe = probes[1]
  for field in probe[:-1]:
    np.testing.assert_allclose(field, np.ones(len(network)), atol=1e-5)
  assert all(x < 1e-6 for x in probe.reconstruction.values())
  # What goes forth and back in one tick is not reconstructed.
  expected = {"one stage": [], "reversible beside the loss": ["block_0"]}
  names = expected.get(cut, ["block_0", "block_1"])
  assert list(probe.reconstruction) == names


def test_zero_gradients_have_no_direction():
  zero, one = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
  assert np.isnan(quality.compare(one, zero)).all()
  assert np.isnan(quality.compare(zero, zero)).all()
  assert [float(x) for x in quality.compare(zero, one)] == [0, 0]
  tiny = {"w": jnp.full(3, 1e-18)}  # squares of squares would be 0
  np.testing.assert_allclose(quality.compare(tiny, tiny), [1, 1], rtol=1e-6)
  two = np.array([0.5, np.nan]), np.array([0.7, np.nan])
  probes = [quality.Probe(x, x, x, x, {"b": float(x[0])}) for x in two]
  found = quality.average(probes)
  assert found["cosine"]["mean"] == [pytest.approx(0.6), None]
  assert found["cosine"]["count"] == [2, 0]
  assert found["reconstruction"]["b"]["std"] == pytest.approx(0.1)


def chain(grid=None, count=3):
  """Of couplings alike, on streams that start on the grid if there is one."""
  one = lambda x: x if grid is None else stages.on_grid(x, grid)

  def stem(*given):
    streams, state = nets.stem(*given)
    return tuple(map(one, streams)), state

  _, params, _ = nets.make("r" * count)
  middle = [
    stages.coupling(f"block_{i}", nets.branch, grid=grid, kind="f")
    for i in range(count)
  ]
  blocks = stages.plain("stem", stem), *middle, stages.last("head", nets.head)
  return blocks, params


def test_rounding_by_depth_and_precision():
  x, _ = nets.batches(1)
  depths = [1, 8, 32]
  errors = lambda grid, dtype=None: quality.rounding(
    *chain(grid), x, KEY, depths, dtype=dtype
  )
  exact, rough, grid = errors(None), errors(None, "bfloat16"), errors(2**-12)
  assert 0 < exact[0] < exact[2] < 1e-4
  assert 1e-4 < rough[0] < rough[2]
  assert rough[2] > 1e3 * exact[2]
  assert grid == [0, 0, 0]


def test_rounding_needs_blocks_to_go_through():
  x, _ = nets.batches(1)
  blocks, params, _ = nets.make("n")
  with pytest.raises(ValueError, match="no block is reversible"):
    quality.rounding(blocks, params, x, KEY, [1])
