"""REPAIR inside a step: the averages of a population, by the rows just seen."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import models, soups
from distrain_jax.models import MLP
from distrain_jax.models.norms import BatchNorm

N, ROWS, KEY = 4, 8, jax.random.key(3)
MODULE, HIDDEN = MLP(widths=(7, 5), classes=3), ("dense_0", "dense_1")
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(N, ROWS, 3, 2, 1)).astype(np.float32)
IMAGES += rng.normal(size=(N, 1, 3, 2, 1)).astype(np.float32)  # members' differ


def still(params, batch, key):
  del batch, key
  return 0.0 * params["output"]["bias"].sum(), {}


def population(seed=0):
  """Random kernels and biases of N members, (N, ...) each."""
  rng = np.random.default_rng(seed)
  shapes = models.zoo.abstract(MODULE, IMAGES[0]).params
  draw = lambda x: 0.7 * rng.normal(size=(N, *x.shape)).astype(np.float32)
  return jax.tree.map(draw, shapes)


def repairer(**options):
  shapes = models.zoo.abstract(MODULE, IMAGES[0])
  return soups.repairer(MODULE, shapes, IMAGES[0], **options)


def after(run, start, images=IMAGES):
  """The members' models after one step, (N, ...) each, in NumPy."""
  state = run.init(KEY, start, per_worker=True)
  rows = {"image": images.reshape(-1, *images.shape[2:])}
  state, _ = run.step(state, rows, KEY)
  return jax.tree.map(np.asarray, state.params)


def papa(repair, **options):
  options = {"variant": "all", "every": 1, "repair": repair} | options
  return dj.papa(still, optax.sgd(0.1), **options)


def simulated(repair, start=None, images=IMAGES, **options):
  run = dj.simulate(papa(repair, **options), workers=N)
  return after(run, population() if start is None else start, images)


def wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def member(tree, n):
  return jax.tree.map(lambda x: x[n], tree)


def statistics(params, images):
  """{layer: (2, c)} of a NumPy forward pass over all rows, in float64."""
  params, found = wide(params), {}
  x = np.asarray(images, np.float64)
  x = x.reshape(-1, np.prod(x.shape[-3:]))
  for layer in HIDDEN:
    y = x @ params[layer]["kernel"] + params[layer]["bias"][None]
    found[layer] = np.stack([y.mean(0), y.std(0)])
    x = np.maximum(y, 0)
  return found


def oracle(start):
  """PAPA-all's average, corrected layer after layer, over everybody's rows."""
  own = [statistics(member(start, n), IMAGES[n]) for n in range(N)]
  model = jax.tree.map(lambda x: x.mean(0), wide(start))
  for layer in HIDDEN:
    mean, deviation = np.mean([x[layer] for x in own], 0)
    m, s = statistics(model, IMAGES)[layer]
    old = model[layer]
    model[layer] = {
      "kernel": old["kernel"] * (deviation / s)[None],
      "bias": (old["bias"] - m) * deviation / s + mean,
    }
  return model


def near(a, b, tolerance=2e-5):
  assert_near = np.testing.assert_allclose
  one = lambda x, y: assert_near(x, y, rtol=tolerance, atol=tolerance)
  jax.tree.map(one, a, b)


@pytest.mark.core
def test_members_become_one_average_with_their_mean_statistics(mesh):
  start = population()
  run = dj.distribute(papa(repairer(), axis="data"), mesh(N))
  found = {"simulate": simulated(repairer()), "distribute": after(run, start)}
  for name, new in found.items():
    for n in range(N):
      near(member(new, n), oracle(start))
      for x in jax.tree.leaves(jax.tree.map(lambda x, n=n: x[n] - x[0], new)):
        assert not x.any(), name  # one model, to the bit
  near(found["simulate"], found["distribute"], 2e-6)
  own = [statistics(member(start, n), IMAGES[n]) for n in range(N)]
  got = statistics(member(new, 0), IMAGES)
  plain = statistics(member(simulated(None), 0), IMAGES)
  for layer in HIDDEN:
    wanted = np.mean([x[layer] for x in own], 0)
    np.testing.assert_allclose(got[layer], wanted, atol=1e-5)
    assert np.abs(plain[layer] - wanted).max() > 0.1  # were not so


def test_it_is_repair_of_the_members_by_one_batch():
  """Where all members see that batch."""
  start, images = population(1), np.repeat(IMAGES[:1], N, 0)
  got = simulated(repairer(), start, images)
  wanted = soups.repair(
    MODULE, soups.unstack(start), [{"image": IMAGES[0]}]
  ).model
  near(member(got, 0), wanted, 1e-4)


def test_unpooled_every_average_is_exact_on_its_members_own_rows():
  start = population()
  new = simulated(repairer(pooled=False))
  own = [statistics(member(start, n), IMAGES[n]) for n in range(N)]
  for n in range(N):
    got = statistics(member(new, n), IMAGES[n])
    for layer in HIDDEN:
      wanted = np.mean([x[layer] for x in own], 0)
      np.testing.assert_allclose(got[layer], wanted, atol=1e-5)
  apart = jax.tree.map(lambda x: np.ptp(x, 0).max(), new)
  assert apart["dense_0"]["kernel"] > 0.01
  assert apart["output"] == {"kernel": 0, "bias": 0}


def test_of_a_pair_the_parents_statistics_count():
  start = population()
  new = simulated(repairer(), variant="pair")
  own = [statistics(member(start, n), IMAGES[n]) for n in range(N)]
  kernels, seen = start["output"]["kernel"], set()
  for n in range(N):
    pairs = list(itertools.combinations(range(N), 2))
    outputs = [(kernels[i] + kernels[j]) / 2 for i, j in pairs]
    is_child = lambda x, n=n: np.allclose(x, new["output"]["kernel"][n])
    (parents,) = [p for p, x in zip(pairs, outputs) if is_child(x)]
    seen.add(parents)
    got = statistics(member(new, n), IMAGES[n])
    for layer in HIDDEN:
      wanted = np.mean([own[i][layer] for i in parents], 0)
      np.testing.assert_allclose(got[layer], wanted, atol=1e-5)
  assert len(seen) == N


def test_only_chosen_layers_change():
  plain = member(simulated(None), 0)
  some = simulated(repairer(layers=lambda name: name == "dense_0"))
  some = member(some, 0)
  for layer in ("dense_1", "output"):
    near(some[layer], plain[layer], 1e-6)
  assert np.abs(some["dense_0"]["kernel"] - plain["dense_0"]["kernel"]).max()


def test_parameters_keep_their_dtypes():
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), population())
  new = simulated(repairer(), half)
  assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
  near(wide(member(new, 0)), oracle(population()), 0.1)


class Normed(nn.Module):
  """BatchNorm in front of what can be corrected."""

  @nn.compact
  def __call__(self, x, *, train=False):
    x = BatchNorm("c", name="norm")(x, train)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(3, name="output")(nn.Dense(4, name="hidden")(x))


def test_networks_with_batch_norm_run_in_training_mode():
  """Each member's rows are normalised by themselves."""
  module = Normed()
  shapes = models.zoo.abstract(module, IMAGES[0])
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(size=(N, *x.shape)).astype(np.float32)
  start = jax.tree.map(draw, shapes)
  same = dj.stateful(
    lambda p, s, b, k: (0.0 * p["norm"]["scale"].sum(), ({}, s))
  )
  mend = soups.repairer(module, shapes, IMAGES[0])
  method = dj.papa(same, optax.sgd(0.1), variant="all", every=1, repair=mend)
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, start, per_worker=True)
  rows = {"image": IMAGES.reshape(-1, *IMAGES.shape[2:])}
  state, _ = run.step(state, rows, KEY)

  def hidden(params, images):
    y = np.asarray(images, np.float64)
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    y = (y * params["norm"]["scale"] + params["norm"]["bias"]).reshape(ROWS, -1)
    return y @ params["hidden"]["kernel"] + params["hidden"]["bias"][None]

  before = [hidden(member(start.params, n), IMAGES[n]) for n in range(N)]
  params = member(wide(state.params), 0)
  got = np.concatenate([hidden(params, images) for images in IMAGES])
  for statistic in (np.mean, np.std):
    wanted = np.mean([statistic(y, 0) for y in before], 0)
    np.testing.assert_allclose(statistic(got, 0), wanted, atol=1e-4)
  means = start.model_state["batch_stats"]["norm"]["mean"].mean(0)
  kept = state.model_state["batch_stats"]["norm"]["mean"]
  np.testing.assert_allclose(kept, np.tile(means, (N, 1)), atol=1e-6)


def test_what_cannot_be_repaired_is_refused_at_once(monkeypatch):
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  monkeypatch.setitem(models.zoo.FIXED["resnet18"], "stages", (1,))
  module = models.create("resnet18", stem="cifar", width=0.125, classes=10)
  shapes = models.zoo.abstract(module, image)
  with pytest.raises(
    ValueError, match=r"no layer can be corrected: .* has no bias .*BatchNorm"
  ):
    soups.repairer(module, shapes, image)
  with pytest.raises(ValueError, match="output has the network's outputs"):
    alone = MLP(widths=())
    soups.repairer(alone, models.zoo.abstract(alone, image), image)


@pytest.mark.core
def test_right_after_an_average_the_loss_is_lower_with_repair():
  """Digits: four MLPs that began as different models."""
  data = dj.data.load("digits")
  size = len(data.train)
  every = next(iter(dj.data.eval_batches(data.train, batch_size=size)))
  one = {k: every[k][:1] for k in ("image", "label")}
  module = MLP(widths=(32, 32))
  task = models.task(module, "classification", one)
  keys = jax.random.split(jax.random.key(0), N)
  start = jax.vmap(lambda key: task.init(key).params)(keys)
  shapes = jax.eval_shape(task.init, KEY)

  def losses(repair, steps=20):
    tx = optax.sgd(0.1, momentum=0.9)
    options = {"variant": "all", "every": steps, "repair": repair}
    run = dj.simulate(dj.papa(task.loss_fn, tx, **options), workers=N)
    state = run.init(KEY, start, per_worker=True)
    rng, found = np.random.default_rng(0), []
    for _ in range(steps + 1):
      chosen = rng.integers(0, size, N * 32)
      rows = {k: every[k][chosen] for k in one}
      state, metrics = run.step(state, rows, KEY)
      found.append(float(metrics["loss"]))
    return found

  plain = losses(None)
  mended = losses(soups.repairer(module, shapes, one["image"]))
  assert mended[:-1] == plain[:-1]  # alike up to the average
  assert plain[-1] > plain[-2] + 0.5  # which is worse than its members were
  assert mended[-1] < plain[-1] - 0.3
