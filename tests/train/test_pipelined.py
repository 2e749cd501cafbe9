"""A config's network in stages, and how its run ends."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax import data, models, train
from distrain_jax.train import experiment

FEW = {"steps": 3, "evaluation.every": 0, "checkpoint.every": 0}
MESH = ConfigDict({"stage": 4, "data": 2})


def test_a_run_ends_with_nothing_in_flight_and_scores_that_model(
  tiny, tmp_path
):
  built = train.build(tiny("stages", mesh=MESH, **FEW))
  result = train.train(built, tmp_path)
  state = result.state.inner
  assert state.counted.tolist() == [3 * 2] * 4  # steps times micro-batches
  assert (np.asarray(state.flight.entered) == -1).sum() >= 6
  params = built.run.params(result.state)
  assert set(params) == {"stem", "block_0", "block_1", "head"}
  loss = built.evaluate(params, "test")["loss"]
  assert result.metrics["test_loss"] == pytest.approx(loss)


def test_each_block_has_its_own_masks_and_all_the_schedule(tiny):
  c = tiny("stages", **{"optimizer.weight_decay": 0.5})
  told = data.describe(c.data, vocab=None, classes=None)
  devices = jax.devices()[:4]
  built = experiment.program(c, told.info, devices)
  assert built.run.method.layout.startswith("stages: stem | block_0 | block_1")
  assert built.run.method.replicas is None


def test_one_stage_trains_what_data_parallelism_trains(tiny, tmp_path):
  """The same model, data and updates, by two of the trainer's ways."""
  model = ConfigDict({"name": "rev_mlp", "width": 8, "hidden": 8, "blocks": 2})
  same = {**FEW, "model": model, "method.clip_norm": None}
  results = []
  for arg, changes in (
    (None, {"method.name": "ddp", "mesh": ConfigDict({"data": 8})}),
    ("stages", {"mesh": ConfigDict({"stage": 1, "data": 8})}),
  ):
    c = tiny(arg, **same, **changes)
    c.method.accumulate = 1
    results.append(train.train(train.build(c), tmp_path / str(arg)).metrics)
  assert results[0]["test_loss"] == pytest.approx(
    results[1]["test_loss"], rel=1e-5
  )


def test_the_order_of_the_passes_is_a_field(tiny, tmp_path):
  """Both orders make the same gradients."""
  losses = []
  for order in ("1f1b", "gpipe"):
    own = {"method.name": "pipeline", "method.schedule": order}
    built = train.build(tiny("stages", mesh=MESH, **FEW, **own))
    losses.append(train.train(built, tmp_path / order).metrics["test_loss"])
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model": ConfigDict({"name": "mlp", "widths": (24,)})},
      "config.model.name='mlp' cannot be cut into any. Models that can: rev_",
    ),
    (
      {"mesh": ConfigDict({"stage": 8})},
      "4 blocks cannot be cut into 8 stages",
    ),
    (
      {"mesh": ConfigDict({"data": 8})},
      "has no axis 'stage', which config.method.name='petra' works on",
    ),
    ({"method.accumulate": 5}, "must be a multiple of the 2 pipelines"),
    ({"method.buffer": "all"}, "`buffer` is one of"),
    ({"method.coverage": 0.5}, "petra has no such option"),
  ],
)
def test_what_cannot_be_is_refused_before_anything_compiles(
  changes, message, tiny
):
  with pytest.raises(ValueError) as e:
    train.build(tiny("stages", **{"mesh": MESH, **changes}))
  assert message in str(e.value)


def test_names_of_models_with_parts_are_all_there_are():
  named = set(models.parts.NAMES)
  made = {name for name in models.zoo.MODELS if name in named}
  assert made == named
  for name in models.zoo.MODELS:
    assert hasattr(models.create(name), "parts") == (name in named)
