"""Ensembles against NumPy, over padded batches too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import data, models, soups
from distrain_jax.train import evaluate

rng = np.random.default_rng(0)
LOGITS = rng.normal(0, 3, (3, 5, 4)).astype(np.float32)  # (N, b, classes)


def softmax(x):
  x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def test_both_ways_are_those_of_numpy():
  found = softmax(np.asarray(soups.ensemble_logits(list(LOGITS))))
  np.testing.assert_allclose(found, softmax(LOGITS).mean(0), rtol=1e-5)
  found = soups.ensemble_logits(LOGITS, "logits")
  np.testing.assert_allclose(found, LOGITS.mean(0), rtol=1e-5)
  geometric = np.exp(np.log(softmax(LOGITS)).mean(0))
  geometric /= geometric.sum(-1, keepdims=True)
  np.testing.assert_allclose(softmax(np.asarray(found)), geometric, rtol=1e-5)


@pytest.mark.parametrize("how", ["probabilities", "logits"])
def test_an_ensemble_of_equal_members_is_the_member(how):
  found = soups.ensemble_logits([LOGITS[0]] * 4, how)
  wanted = softmax(LOGITS[0])
  np.testing.assert_allclose(softmax(np.asarray(found)), wanted, rtol=1e-5)


def test_certain_members_and_low_precision_stay_finite():
  sure = jnp.array([[[1e4, -1e4]], [[-1e4, 1e4]]], jnp.bfloat16)
  found = soups.ensemble_logits(sure)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(jnp.exp(found), [[0.5, 0.5]])


@pytest.mark.parametrize(
  "logits, says",
  [
    ([], "at least one member"),
    ([LOGITS[0], LOGITS[0, :2]], "all of one shape"),
  ],
)
def test_logits_that_are_unlike_are_refused(logits, says):
  with pytest.raises(ValueError, match=says):
    soups.ensemble_logits(logits)
  with pytest.raises(ValueError, match="probabilities, logits; got 'votes'"):
    soups.ensemble_logits(LOGITS, "votes")


@pytest.fixture(scope="module")
def scored():
  """(task, 3 MLPs, a split in batches of which the last is padded)."""
  split = data.load("digits", max_records=70).validation
  batches = list(data.eval_batches(split, batch_size=32))
  task = models.task(
    models.create("mlp", widths=(8,)), "classification", batches[0]
  )
  members = [task.init(jax.random.key(k)).params for k in range(3)]
  return task, members, batches


def test_an_ensemble_is_scored_over_the_rows_that_count(scored):
  task, members, batches = scored
  found = soups.evaluate_ensemble(task, members, batches)
  rows = [b["weight"] > 0 for b in batches]
  labels = np.concatenate([b["label"][r] for b, r in zip(batches, rows)])
  logits = np.stack(
    [
      np.concatenate([task.logits(m, b)[r] for b, r in zip(batches, rows)])
      for m in members
    ]
  )
  assert len(labels) == 70
  p = softmax(logits).mean(0)
  own = p[np.arange(70), labels]
  wanted = {"loss": -np.log(own).mean()}
  wanted["accuracy"] = (p.argmax(-1) == labels).mean()
  assert found["probabilities"] == pytest.approx(wanted, rel=1e-5)
  p = softmax(logits.mean(0))
  loss = -np.log(p[np.arange(70), labels]).mean()
  assert found["logits"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_equal_members_score_as_one(scored):
  task, members, batches = scored
  found = soups.evaluate_ensemble(task, members[:1] * 3, batches, ["logits"])
  alone = evaluate.averages(lambda b: task.evaluate(members[0], b), batches)
  assert found == {"logits": pytest.approx(alone, rel=1e-6)}


def test_bad_members_are_refused_before_anything_runs(scored):
  task, members, _ = scored
  never = (1 / 0 for _ in range(1))
  other = models.create("mlp", widths=(9,))
  bad = models.init(other, jax.random.key(0), jnp.zeros((1, 8, 8, 1))).params
  with pytest.raises(ValueError, match=r"models\[1\] is unlike"):
    soups.evaluate_ensemble(task, [members[0], bad], never)
  with pytest.raises(ValueError, match="got 'votes'"):
    soups.evaluate_ensemble(task, members, never, ["votes"])
