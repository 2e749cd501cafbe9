"""mulo inside distributed methods: where it trains, and where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distrain_jax as dj
from distrain_jax import learned
from distrain_jax.learned import meta

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


def test_pieces_of_parameters_are_refused():
  run = dj.simulate(dj.zero1(loss_fn, make_tx()), workers=2)
  with pytest.raises(ValueError, match=r"zero1 shards the optimizer element"):
    run.init(KEY, jax.jit(NET.init)(KEY))
