"""Synchronous pipelines equal back-propagation; what both methods refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import petra_networks as nets
import pytest

import distrain_jax as dj
from distrain_jax import spmd, stages
from distrain_jax.method import Variables

KEY = jax.random.key(3)
TX = optax.sgd(0.3, momentum=0.9)
M = 3
pytestmark = pytest.mark.core


def network():
  blocks, params, state = nets.make("rrn", stats=True)
  return blocks, Variables(params, state)


def train(run, model, steps=2, rows=M * nets.ROWS):
  x, y = nets.batches(steps * M)
  state = run.init(KEY, model)
  for start in range(0, len(x), rows):
    batch = run.put((x[start : start + rows], y[start : start + rows]))
    state, metrics = run.step(state, batch, KEY)
  return jax.device_get((run.params(state), metrics))


@pytest.fixture(scope="module")
def back_propagation():
  """(model, metrics) of plain loss, one device, as many micro-batches."""
  blocks, model = network()
  loss = dj.stateful(stages.loss_fn(blocks))
  method = dj.ddp(loss, TX, accumulate=M, clip_norm=0.5)
  return train(dj.simulate(method, workers=1), model)


def close(got, expected, tolerance=3e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
    ),
    got,
    expected,
  )


CASES = [
  ("1f1b", "input", "mesh"),
  ("1f1b", "none", None),
  ("1f1b", "graph", "mesh"),
  ("gpipe", "input", None),
  ("gpipe", "none", "mesh"),
  ("gpipe", "graph", "mesh"),
]


@pytest.mark.parametrize(("schedule", "buffer", "mesh"), CASES)
def test_a_step_is_one_of_back_propagation(
  schedule, buffer, mesh, back_propagation
):
  blocks, model = network()
  x, y = nets.batches(1)
  method = dj.pipeline(
    blocks,
    TX,
    shapes=model,
    example=(x, y),
    accumulate=M,
    schedule=schedule,
    buffer=buffer,
    clip_norm=0.5,
  )
  if mesh is None:
    run = dj.simulate(method, workers=len(blocks))
  else:
    devices = jax.devices()[: len(blocks)]
    run = dj.distribute(method, spmd.make_mesh({"stage": -1}, devices))
  params, metrics = train(run, model)
  assert run.step.compilations() == 1
  expected, other = back_propagation
  close(params, expected)
  assert metrics.pop("busy") <= 1
  close(metrics, other)


def test_pipelines_side_by_side_are_data_parallel():
  blocks, params, _ = nets.make("r")
  x, y = nets.batches(1)
  method = dj.pipeline(
    [blocks[:2], blocks[2:]],
    TX,
    shapes=params,
    example=(x, y),
    accumulate=2,
    replicas="data",
    clip_norm=0.5,
  )
  mesh = spmd.make_mesh({"stage": 2, "data": 2}, jax.devices()[:4])
  runs = [
    dj.simulate(method, workers=2, replicas=2),
    dj.distribute(method, mesh),
    dj.simulate(
      dj.ddp(
        dj.stateful(stages.loss_fn(blocks)), TX, accumulate=2, clip_norm=0.5
      ),
      workers=2,
    ),
  ]
  rows = 4 * nets.ROWS
  x, y = nets.batches(8)
  results = []
  for run in runs:
    stateful = run.method.name == "ddp"
    state = run.init(KEY, Variables(params, {}) if stateful else params)
    for start in (0, rows):
      batch = (x[start : start + rows], y[start : start + rows])
      state, metrics = run.step(state, batch, KEY)
    model = run.params(state)
    model = model.params if stateful else model
    results.append(jax.device_get((model, metrics["loss"])))
  close(results[0], results[2])
  close(results[1], results[2])


def refused(match, factory=dj.petra, kinds="r", workers=None, **options):
  """Before anything compiles: by the factory, or as soon as init is traced."""
  blocks, params, _ = nets.make(kinds)
  x, y = nets.batches(1)
  given = {"shapes": params, "example": (x, y), **options}
  with pytest.raises((ValueError, TypeError), match=match):
    method = factory(given.pop("network", blocks), TX, **given)
    dj.simulate(method, workers=workers or len(blocks)).abstract(KEY, params)


@pytest.mark.parametrize("factory", [dj.petra, dj.pipeline])
def test_options_out_of_range_are_refused(factory):
  name = factory.__name__
  refused(f"{name}.*accumulate.*at least 1.*got 0", factory, accumulate=0)
  refused(f"{name}.*buffer.*one of.*got 'all'", factory, buffer="all")
  refused(f"{name}.*clip_norm.*got -1", factory, clip_norm=-1)
  refused(f"{name}.*wire_dtype.*got 'int8'", factory, wire_dtype="int8")


def test_what_only_one_has():
  refused("schedule.*1f1b, gpipe; got '2bw'", dj.pipeline, schedule="2bw")
  refused("buffer.*one of input, none, graph", dj.pipeline, buffer="params")
  refused("delay_exponent.*got 2", delay_exponent=2)
  refused("predict.*to 1.*got 1.5", predict=1.5)


def test_an_axis_of_another_size_is_refused():
  refused(
    r"3 stages need an axis 'stage' of as many devices; it has 5", workers=5
  )


def test_stages_that_do_not_chain_are_named_with_their_shapes():
  blocks, params, _ = nets.make("nr")
  params = {**params, "block_1": {**params["block_1"], "a": jnp.zeros((6, 7))}}
  refused(
    r"block 'block_1' cannot take what block 'block_0' gives it, "
    r"float32\[4, 5\], float32\[4, 5\]",
    network=blocks,
    shapes=params,
  )


def test_names_and_losses_must_be_where_they_belong():
  blocks, params, _ = nets.make("r")
  refused("two blocks are called 'block_0'", network=[*blocks[:2], *blocks[1:]])
  refused("must end in the one that has the loss", network=blocks[:-1])
  refused("every stage needs at least one block", network=[blocks, []])
  more = {**params, "extra": {"w": jnp.zeros(2)}}
  refused("have 'extra', but no block has that name", shapes=more)


def test_a_block_that_returns_whole_numbers_is_refused():
  blocks, *_ = nets.make("r")
  bad = stages.plain("stem", lambda p, s, x, k: (x.astype(jnp.int32), s))
  refused("'stem' returns int32.*must be floating", network=[bad, *blocks[1:]])


def test_an_inverse_of_another_shape_is_refused():
  blocks, params, _ = nets.make("r")
  bad = stages.reversible(
    "block_0", lambda p, s, x, k: (x, s), lambda p, s, y, k: y[0]
  )
  refused(
    "'block_0' is declared reversible, but its inverse returns",
    network=[blocks[0], bad, blocks[2]],
    shapes={**params, "block_0": {}},
  )


def test_an_inverse_that_is_none_is_found_on_small_random_input():
  blocks, params, _ = nets.make("rr")
  x, _ = nets.batches(1)
  good = stages.check_inverses(blocks, params, x)
  assert set(good) == {"block_0", "block_1"}
  assert max(good.values()) < 1e-6
  twice = lambda p, s, x, k: (jax.tree.map(lambda a: 2 * a, x), s)
  bad = stages.reversible("block_0", twice, lambda p, s, y, k: y)
  with pytest.raises(ValueError, match="'block_0' is declared reversible, but"):
    stages.check_inverses([blocks[0], bad, *blocks[2:]], params, x)


def test_a_transform_for_each_block_or_one_for_all():
  blocks, params, _ = nets.make("r")
  x, y = nets.batches(1)
  with pytest.raises(ValueError, match=r"each block.*\['stem'.*got \['stem'\]"):
    dj.petra(blocks, {"stem": TX}, shapes=params, example=(x, y))


def test_batches_of_another_form_are_refused():
  blocks, params, _ = nets.make("r")
  x, y = nets.batches(2)
  method = dj.petra(blocks, TX, shapes=params, example=(x[:4], y[:4]))
  run = dj.simulate(method, workers=3)
  state = run.abstract(KEY, params)
  with pytest.raises(
    ValueError, match=r"micro-batch.*float32\[8, 5\].*example"
  ):
    run.step.lower(state, (x, y), KEY)
  with pytest.raises(TypeError, match=r"a batch is a pair .*got dict"):
    run.step.lower(state, {"x": x, "y": y}, KEY)
  method = dj.petra(
    blocks, TX, shapes=params, example=(x[:4], y[:4]), accumulate=3
  )
  run = dj.simulate(method, workers=3)
  with pytest.raises(ValueError, match="accumulate=3 cannot cut"):
    run.step.lower(run.abstract(KEY, params), (x, y), KEY)
  with pytest.raises(TypeError, match=r"inputs='image' is a key.*\['x', 'y'\]"):
    stages.inputs_and_targets({"x": x, "y": y}, "image")
  with pytest.raises(TypeError, match="must both be Variables"):
    run.abstract(KEY, Variables(params, {}))


def test_replicas_need_an_axis():
  blocks, params, _ = nets.make("r")
  x, y = nets.batches(1)
  method = dj.petra(blocks, TX, shapes=params, example=(x, y))
  with pytest.raises(
    ValueError, match="replicas=2, but petra was made without"
  ):
    dj.simulate(method, workers=3, replicas=2)
  method = dj.petra(blocks, TX, shapes=params, example=(x, y), replicas="data")
  mesh = spmd.make_mesh({"stage": 3}, jax.devices()[:3])
  with pytest.raises(ValueError, match=r"works on the axis 'data'.*replicas="):
    dj.distribute(method, mesh)
