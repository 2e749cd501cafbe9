"""mulo inside distributed methods: where it trains, and where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distrain_jax as dj
from distrain_jax import learned, spmd, stages
from distrain_jax.learned import meta
from distrain_jax.method import Variables

KEY = jax.random.key(0)
NET = meta.MLP(8, (16,), 3)


def loss_fn(params, batch, key):
  del key
  return meta.cross_entropy(NET.apply(params, batch["x"]), batch["y"]), {}


def make_batch():
  data = meta.teacher_data(inputs=8, classes=3, count=64)
  return {"x": data["x"], "y": data["y"]}


def make_tx():
  return learned.mulo(jax.jit(learned.init_theta)(KEY), mup=NET.multipliers())


def test_ddp_is_one_worker_with_the_whole_batch(mesh):
  results = []
  for run in (
    dj.simulate(dj.ddp(loss_fn, make_tx()), workers=1),
    dj.distribute(dj.ddp(loss_fn, make_tx()), mesh(4)),
  ):
    state = run.init(KEY, jax.jit(NET.init)(KEY))
    for _ in range(3):
      state, metrics = run.step(state, make_batch(), KEY)
    assert np.isfinite(float(metrics["loss"]))
    results.append(run.params(state))
  near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(near, *results)
  moved = jax.tree.map(
    lambda a, b: jnp.abs(a - b).max(), *results[:1], jax.jit(NET.init)(KEY)
  )
  assert min(map(float, jax.tree.leaves(moved))) > 0


@pytest.mark.full
def test_members_that_train_alone_have_states_of_their_own():
  run = dj.simulate(dj.local_sgd(loss_fn, make_tx(), sync_every=4), workers=2)
  state = run.init(KEY, jax.jit(NET.init)(KEY))
  state, _ = run.step(state, make_batch(), KEY)
  m = state.opt_state[0].moments["w1"].m
  assert m.shape == (2, 3, 16, 3)
  assert float(jnp.abs(m[0] - m[1]).max()) > 0


@pytest.fixture(scope="module")
def shipped():
  """The package's weights, which do lower a loss."""
  return learned.mulo(mup=NET.multipliers())


def losses(run, params, steps=12):
  state = run.init(KEY, params)
  found = []
  for _ in range(steps):
    state, metrics = run.step(state, run.put(make_batch()), KEY)
    found.append(float(metrics["loss"]))
  assert run.step.compilations() == 1
  return np.array(found), run.params(state)


def near(a, b, tolerance=1e-5):
  one = lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance)
  jax.tree.map(one, a, b)


def test_a_population_trains_by_it(shipped, mesh):
  method = dj.wash(loss_fn, shipped, axis="data", rate=0.1)
  run = dj.distribute(method, mesh(2))
  got, _ = losses(run, jax.jit(NET.init)(KEY))
  assert got[-1] < 0.9 * got[0]


@pytest.mark.full
def test_a_population_on_one_device_is_one_on_a_mesh(shipped, mesh):
  method = dj.wash(loss_fn, shipped, axis="data", rate=0.1)
  runs = dj.distribute(method, mesh(2)), dj.simulate(method, workers=2)
  near(*(losses(run, jax.jit(NET.init)(KEY)) for run in runs))


def test_moments_of_a_learned_rule_are_not_shuffled(shipped):
  method = dj.wash(loss_fn, shipped, rate=0.1, shuffle_optimizer=True)
  run = dj.simulate(method, workers=2)
  params, batch = jax.jit(NET.init)(KEY), make_batch()
  with pytest.raises(ValueError, match=r"wash: shuffle_optimizer=True.*mom"):
    run.step.lower(run.abstract(KEY, params), batch, KEY)


def hidden(params, model_state, x, key):
  return jax.nn.relu(x @ params["w"]), model_state


def head(params, model_state, x, targets, key):
  logits = x @ params["w"] / x.shape[1]
  return meta.cross_entropy(logits, targets), ({}, model_state)


BLOCKS = (stages.plain("first", hidden), stages.last("last", head))


def in_blocks(tree):
  """What belongs to w0 and to w1, by block."""
  return {"first": {"w": tree["w0"]}, "last": {"w": tree["w1"]}}


def rows():
  return make_batch()["x"], make_batch()["y"]


def pipelined(factory, tx):
  params = in_blocks(jax.eval_shape(NET.init, KEY))
  x, y = rows()
  example = (x[:32], y[:32])
  return factory(BLOCKS, tx, shapes=params, example=example, accumulate=2)


def by_stage(run, model, steps=12):
  state, found = run.init(KEY, model), []
  for _ in range(steps):
    state, metrics = run.step(state, run.put(rows()), KEY)
    found.append(float(metrics["loss"]))
  return np.array(found), run.params(state)


def transforms():
  """Each block's own; a stage's optimizer sees nothing else."""
  mup = in_blocks(NET.multipliers())
  return {name: learned.mulo(mup=mup[name]) for name in mup}


def stage_mesh():
  return spmd.make_mesh({"stage": 2}, jax.devices()[:2])


def test_a_pipeline_is_data_parallel_training_by_it():
  model = in_blocks(jax.jit(NET.init)(KEY))
  method = pipelined(dj.pipeline, transforms())
  got, end = by_stage(dj.distribute(method, stage_mesh()), model)
  assert got[-1] < 0.9 * got[0]
  tx = learned.mulo(mup=in_blocks(NET.multipliers()))
  loss = dj.stateful(stages.loss_fn(BLOCKS))
  whole = dj.simulate(dj.ddp(loss, tx, accumulate=2), workers=1)
  wanted, other = by_stage(whole, Variables(model, {}))
  near((got, end), (wanted, other.params))


def test_petra_trains_by_it():
  model = in_blocks(jax.jit(NET.init)(KEY))
  method = pipelined(dj.petra, transforms())
  got, _ = by_stage(dj.distribute(method, stage_mesh()), model)
  assert np.isfinite(got).all() and got[-1] < 0.9 * got[1]


@pytest.mark.parametrize("factory", [dj.petra, dj.pipeline])
def test_the_whole_models_multipliers_do_not_fit_a_stage(factory):
  tx = learned.mulo(mup=in_blocks(NET.multipliers()))
  with pytest.raises(ValueError, match=r"one block at a time.*mup=mup\[block"):
    pipelined(factory, tx)


def sdp(loss_fn, tx):
  params = jax.eval_shape(NET.init, KEY)
  names = jax.tree.map(lambda x: (None,) * x.ndim, params)
  names |= {"w0": (None, "hidden"), "b0": ("hidden",), "w1": ("hidden", None)}
  return dj.sdp(loss_fn, tx, names=names, shapes=params, coverage=0.5)


@pytest.mark.parametrize("factory", [dj.zero1, dj.fsdp, dj.acco, dj.dpu, sdp])
def test_pieces_of_parameters_are_refused(factory):
  run = dj.simulate(factory(loss_fn, make_tx()), workers=2)
  says = r"shards the optimizer element.*muLO.*use ddp, zero1\(\.\.\., shard"
  with pytest.raises(ValueError, match=says):
    run.init(KEY, jax.jit(NET.init)(KEY))
