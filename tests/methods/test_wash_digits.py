"""Members that cannot be averaged, and those of WASH, which can: on digits.

Four MLPs 64-128-128-128-10 from models of their own, SGD at 0.05 with momentum
and a cosine to 0, 32 rows a member and step; all steps are one scan.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import distrain_jax as dj

SIZES, N, ROWS, KEY = (64, 128, 128, 128, 10), 4, 32, jax.random.key(0)
TRAIN = 1400  # images; the others are to test on
RATE = 1e-2  # of the first layer, down to 0 of the last


@functools.cache
def digits():
  x, y = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(x))
  return jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])


def logits(params, x):
  for i in range(len(SIZES) - 1):
    x = x @ params[f"w{i}"] + params[f"b{i}"][None]
    x = jax.nn.relu(x) if i < len(SIZES) - 2 else x
  return x


def loss_fn(params, batch, key):
  del key
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits(params, batch["x"]), batch["y"]
  )
  return losses.mean(), {}


def start(key):
  params = {}
  for i, (rows, columns) in enumerate(itertools.pairwise(SIZES)):
    draw = jax.random.normal(jax.random.fold_in(key, i), (rows, columns))
    params |= {f"w{i}": draw * np.sqrt(2 / rows), f"b{i}": jnp.zeros(columns)}
  return params


def scores(method, steps):
  """Test accuracies, %, of the ensemble and the average; the distance."""
  run = dj.simulate(method, workers=N)
  members = jax.vmap(start)(jax.random.split(KEY, N))
  images, labels = digits()

  def step(state, i):
    order = jax.random.fold_in(jax.random.key(7), i)
    rows = jax.random.randint(order, (N * ROWS,), 0, TRAIN)
    batch = {"x": images[rows], "y": labels[rows]}
    return run.step(state, batch, KEY)[0], None

  train = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps))[0])
  params = train(run.init(KEY, members, per_worker=True)).params
  x, y = images[TRAIN:], labels[TRAIN:]
  mean = jax.tree.map(lambda a: a.mean(0), params)
  each = jax.nn.softmax(jax.vmap(logits, (0, None))(params, x))
  right = lambda p: 100 * float((p.argmax(-1) == y).mean())
  square = lambda a: float(jnp.square(a - a.mean(0, keepdims=True)).sum()) / N
  distance = np.sqrt(sum(map(square, jax.tree.leaves(params))))
  return right(each.mean(0)), right(logits(mean, x)), distance


def alone_and_washed(steps, decay):
  tx = optax.chain(
    optax.add_decayed_weights(decay),
    optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9),
  )
  alone = scores(dj.ensemble(loss_fn, tx), steps)
  return alone, scores(dj.wash(loss_fn, tx, rate=RATE), steps)


def test_the_average_is_as_good_as_the_ensemble_where_others_have_none():
  alone, washed = alone_and_washed(4000, 1e-4)
  ensemble, average, distance = alone
  assert average < 60
  assert washed[1] >= ensemble - 1
  assert washed[2] > 0.5 * distance  # and members stay apart


@pytest.mark.full
def test_with_weight_decay_and_time_members_come_together():
  alone, washed = alone_and_washed(20_000, 1e-3)
  assert alone[1] < 60
  assert washed[1] >= alone[0] - 1
  assert washed[2] < 0.1 * alone[2]
