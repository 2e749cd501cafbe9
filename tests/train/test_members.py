"""Scores of the workers' own models, and of their ensemble."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import distrain_jax as dj
from distrain_jax import models, soups, train
from distrain_jax.train import members
from distrain_jax.train.members import members_evaluator

N = 4
KEY = jax.random.key(0)


def batch(rows=8, padding=2):
  rng = np.random.default_rng(0)
  return {
    "image": rng.normal(size=(rows, 3, 3, 1)).astype(np.float32),
    "label": rng.integers(0, 5, rows),
    "weight": np.float32(np.arange(rows) < rows - padding),
  }


@pytest.fixture(scope="module")
def apart():
  """A task, and four models that drifted apart."""
  model = models.create("mlp", widths=(6,), classes=5)
  task = models.task(model, "classification", batch())
  method = dj.local_sgd(task.loss_fn, optax.sgd(1.0), sync_every=100)
  params = task.init(KEY).params
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, params)
  rows = {k: np.repeat(x, N, axis=0) for k, x in batch().items()}
  rows["label"] = np.repeat(np.arange(N), len(rows["label"]) // N)
  for _ in range(3):
    state, _ = run.step(state, rows, KEY)
  return task, method, jax.tree.map(np.asarray, state)


def oracle(task, state):
  """NumPy, from every worker's own logits."""
  rows = batch()
  counts, labels = rows["weight"] > 0, rows["label"]
  logits = []
  for w in range(N):
    own = jax.tree.map(lambda x, w=w: x[w], state.params)
    logits.append(np.asarray(task.logits(own, rows), np.float64))
  softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
  each = list(map(softmax, logits))
  at = lambda p: p[np.arange(len(labels)), labels][counts]
  loss = lambda p: -np.log(at(p)).mean()
  right = lambda p: (p.argmax(1) == labels)[counts].mean()
  mean, of_logits = np.mean(each, axis=0), softmax(np.mean(logits, axis=0))
  losses, rights = list(map(loss, each)), list(map(right, each))
  return {
    "members_loss": np.mean(losses),
    "members_worst_loss": max(losses),
    "members_best_loss": min(losses),
    "members_accuracy": np.mean(rights),
    "members_worst_accuracy": min(rights),
    "members_best_accuracy": max(rights),
    "ensemble_loss": loss(mean),
    "ensemble_accuracy": right(mean),
    "logit_ensemble_loss": loss(of_logits),
    "logit_ensemble_accuracy": right(of_logits),
  }


@pytest.mark.parametrize("distributed", [False, True])
def test_scores_are_those_of_a_loop_over_the_workers(apart, distributed, mesh):
  task, method, state = apart
  if distributed:
    run = dj.distribute(method, mesh(N))
  else:
    run = dj.simulate(method, workers=N)
  found = members_evaluator(run, task)(state, [batch()])
  expected = oracle(task, state)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
  assert found["ensemble_loss"] < found["members_loss"]  # Jensen


def test_a_mixture_has_the_weights_that_it_is_given(apart, mesh):
  _, method, state = apart
  weights = np.float32([0.5, 0, 0.75, -0.25])
  broken = jax.tree.map(np.copy, state.params)
  for x in jax.tree.leaves(broken):
    x[1] = np.nan  # has weight 0
  for run in (
    dj.simulate(method, workers=N),
    dj.distribute(method, mesh(N)),
  ):
    found = members.mixer(run)(state._replace(params=broken), weights)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(found)):
      expected = np.tensordot(weights, x, 1)
      np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_greedy_soup_is_that_of_the_soups_library(apart):
  _, method, state = apart
  run = dj.simulate(method, workers=N)
  target = 0.6 * state.params["output"]["kernel"][2]
  target += 0.4 * state.params["output"]["kernel"][0]
  score = lambda model: -np.square(model["output"]["kernel"] - target).sum()
  soup, size = members.greedy_soup(members.mixer(run), state, N, score)
  expected = soups.greedy(soups.unstack(state.params), score)
  assert size == len(expected.chosen) > 1
  for x, y in zip(jax.tree.leaves(soup), jax.tree.leaves(expected.model)):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_the_distance_is_that_of_the_soups_library(apart, mesh):
  _, method, state = apart
  expected = soups.consensus_distance(soups.unstack(state.params)).total
  for run in (
    dj.simulate(method, workers=N),
    dj.distribute(method, mesh(N)),
  ):
    found = members.relative_distance(run)(state)
    np.testing.assert_allclose(found, expected.relative, rtol=1e-5)


def test_equal_members_are_their_ensemble(apart):
  task, method, state = apart
  run = dj.simulate(method, workers=N)
  same = jax.tree.map(lambda x: np.stack([x[0]] * N), state.params)
  found = members_evaluator(run, task)(state._replace(params=same), [batch()])
  for score in ("loss", "accuracy"):
    alone, together = found[f"members_{score}"], found[f"ensemble_{score}"]
    np.testing.assert_allclose(alone, together, rtol=1e-6)


def test_the_end_of_a_run_has_them_where_they_are_asked_for(small, tmp_path):
  changes = {"method.name": "sdp", "evaluation.members": True, "steps": 2}
  model = ConfigDict({"name": "mlp", "widths": (16,)})
  x = train.build(small(model=model, **changes))
  metrics = train.train(x, tmp_path).metrics
  scores = {
    f"test_{who}_{what}"
    for who in ("members", "ensemble")
    for what in ("loss", "accuracy")
  }
  assert scores < metrics.keys()
  assert metrics["test_ensemble_loss"] <= metrics["test_members_loss"] + 1e-6


def test_a_method_of_equal_workers_has_none(small):
  with pytest.raises(ValueError, match=r"members=True .*'ddp' they are all al"):
    train.build(small(**{"evaluation.members": True}))
