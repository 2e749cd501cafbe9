"""Everything judged at once: a network with BatchNorm, and one without."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax import soups
from distrain_jax.soups import judging, runs

NAMES = ("a", "b")


@pytest.fixture(scope="module")
def judged(tiny):
  """(members by name, judge) of an MLP; two of new parameters."""
  c = tiny(**{"evaluation.batch_size": 64})
  built = runs.program(c)
  members = {
    name: built.task.init(jax.random.key(k)).params
    for k, name in enumerate(NAMES)
  }
  judge = judging.judge_of(c, members["a"], batches=2, eval_batches=2)
  return members, judge


def test_a_table_has_every_model_on_both_splits(judged):
  members, judge = judged
  models = list(members.values())
  made = judging.cook(models, judge)
  rows = judging.table(members, made, judge)
  assert list(rows) == [
    *NAMES,
    "mean of members",
    "ensemble of probabilities",
    "ensemble of logits",
    "soup: uniform",
    "soup: repair",
    "soup: greedy",
  ]
  for row in rows.values():
    for split in judging.SPLITS:
      assert 0 <= row[split]["accuracy"] <= 1 and row[split]["loss"] > 0
  best = max(rows[x]["validation"]["accuracy"] for x in NAMES)
  assert rows["soup: greedy"]["validation"]["accuracy"] >= best
  mean = np.mean([rows[x]["test"]["loss"] for x in NAMES])
  assert rows["mean of members"]["test"]["loss"] == pytest.approx(mean)
  # Convex: the ensemble's loss is at most its members' mean.
  assert rows["ensemble of probabilities"]["test"]["loss"] < mean
  by_loss = judging.cook(models, judge, "loss")
  lowest = min(rows[x]["validation"]["loss"] for x in NAMES)
  found = judge.scores(by_loss.greedy.model, "validation")["loss"]
  assert found <= lowest and by_loss.greedy.tried[0].score < 0


def test_paths_end_at_the_members_scores(judged):
  members, judge = judged
  paths, layers = judging.walk(
    members, judge, [NAMES], points=3, layer_points=2
  )
  (along,) = paths.values()
  ends = [judge.scores(members[x], "validation")["loss"] for x in NAMES]
  assert [along.loss[0], along.loss[-1]] == ends and list(paths) == ["a to b"]
  assert set(layers) == {"dense_0", "output"}
  half = soups.interpolate(*members.values(), 0.5)
  assert along.loss[1] == judge.scores(half, "validation")["loss"]


def test_statistics_are_mended_in_soups_and_on_the_way(tiny, one_block):
  """Of a ResNet; its members keep their own."""
  model = ConfigDict({"name": "resnet18", "width": 1 / 16})
  c = tiny(model=model, **{"evaluation.batch_size": 32, "batch_size": 32})
  start = runs.program(c).params()
  members = {
    "a": start,
    "b": start._replace(params=jax.tree.map(lambda x: 1.1 * x, start.params)),
  }
  judge = judging.judge_of(c, start, batches=1, eval_batches=1)
  calls = []
  mend = lambda model: calls.append(model) or judge.mend(model)
  watched = judge._replace(mend=mend)
  made = judging.cook(list(members.values()), watched)
  assert list(made.models) == ["uniform", "recalibrated", "greedy"]
  assert "has no bias to take the shift (as 2 more)" in made.no_repair
  plain, mended = made.models["uniform"], made.models["recalibrated"]
  assert mended.params is plain.params
  stem = lambda m: m.model_state["batch_stats"]["stem_norm"]["mean"]
  assert not np.array_equal(stem(mended), stem(plain))
  assert len(calls) == 2  # and the greedy soup that was tried
  del calls[:]
  judging.walk(members, watched, [NAMES], points=3)
  assert len(calls) == 1  # in the middle only
