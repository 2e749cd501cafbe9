"""Populations in the trainer: how members differ, leave, and are scored."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax import train
from distrain_jax.train import export

N = 4
MESH = ConfigDict({"population": -1})
DEVICES = jax.devices()[:N]


@pytest.fixture(scope="module")
def config(small):
  """config(**changes): four members, three rows each."""

  def make(**changes):
    c = small(
      **{
        "mesh": MESH,
        "method.name": "wash",
        "method.rate": 0.3,
        "batch_size": 12,
        "evaluation.batch_size": 120,
        "model": ConfigDict({"name": "mlp", "widths": (8,), "dropout": 0.2}),
        **changes,
      }
    )
    return c

  return make


def leaves(state):
  return [np.asarray(x) for x in jax.tree.leaves(state.inner)]


def test_members_start_from_models_and_orders_of_their_own(config):
  x = train.build(config(), DEVICES)
  kernel = np.asarray(x.params()["dense_0"]["kernel"])
  assert kernel.shape[0] == N
  assert len({row.tobytes() for row in kernel}) == N
  rows = next(x.batches())["image"].reshape(N, 3, -1)
  assert len({row.tobytes() for row in rows.reshape(12, -1)}) == 12
  # A member's rows are what it would see alone with its own batch.
  alone = train.build(config(batch_size=3), DEVICES[:1])
  np.testing.assert_array_equal(
    next(alone.batches())["image"].reshape(3, -1), rows[0]
  )
  alike = {"population.same_init": True, "population.same_order": True}
  x = train.build(config(**alike), DEVICES)
  assert x.params()["dense_0"]["kernel"].ndim == 2


def test_an_interrupted_population_goes_on_to_the_same_bits(config, tmp_path):
  c = config(
    **{
      "checkpoint.every": 2,
      "population.mixup": (0.0, 1.0, 0.5, 0.0),
      "population.smoothing": (0.1,),
      "method.tied": True,
      "method.shuffle_optimizer": True,
    }
  )
  whole = train.train(train.build(c, DEVICES), tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  again = train.train(train.build(c, DEVICES), tmp_path)
  for one, two in zip(leaves(whole.state), leaves(again.state)):
    np.testing.assert_array_equal(one, two)


def test_members_that_share_a_device_train_alike(config, tmp_path):
  results = []
  for each in (1, 2, 4):
    options = {"population.per_device": each, "population.erasing": (0.5,)}
    c = config(**options, steps=2)
    devices = DEVICES[: N // each]
    results.append(train.train(train.build(c, devices), tmp_path / str(each)))
  for other in results[1:]:
    for one, two in zip(leaves(results[0].state), leaves(other.state)):
      np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-6)
  # What is exported is the average of all of them, on any number of devices.
  assert export.devices(tmp_path / "4") == N != jax.device_count()
  done = export.export(tmp_path / "4", tmp_path / "average.safetensors")
  for one, all_of in zip(
    jax.tree.leaves(done.params), jax.tree.leaves(other.state.inner.params)
  ):
    expected = np.asarray(all_of).mean(0)
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


def test_a_member_leaves_and_the_others_lose_nothing(config, tmp_path):
  rates = {"method.learning_rates": (1.0, 0.9, 1.1, 1.0)}
  c = config(**{"checkpoint.every": 2, **rates})
  before = train.train(train.build(c, DEVICES), tmp_path).state
  fewer = {"steps": 5, "batch_size": 9, "method.leave": (1,), **rates}
  fewer = config(**fewer)
  x = train.build(fewer, DEVICES[:3])
  with train.Checkpoints(tmp_path / "checkpoints", reading=True) as saved:
    batches = x.batches()
    state = saved.restore(4, x.run, x.key, x.params(), batches)
    stay = np.array([0, 2, 3])
    assert state.inner.number.tolist() == stay.tolist()
    for one, two in zip(
      jax.tree.leaves(before.inner.params), jax.tree.leaves(state.inner.params)
    ):
      np.testing.assert_array_equal(np.asarray(one)[stay], two)
    # Their data go on as well.
    full = train.build(c, DEVICES).batches()
    for _ in range(4):
      next(full)
    wanted = next(full)["image"].reshape(N, 3, -1)[stay]
    got = next(batches)["image"].reshape(3, 3, -1)
    np.testing.assert_array_equal(wanted, got)
  assert train.train(x, tmp_path).metrics["test_loss"] < 10


def test_scores_of_members_and_soups_come_with_the_test_split(config, tmp_path):
  c = config(**{"evaluation.members": True, "evaluation.batch_size": 64})
  found = train.train(train.build(c, DEVICES), tmp_path).metrics
  wanted = {
    "test_members_worst_accuracy",
    "test_ensemble_loss",
    "test_logit_ensemble_accuracy",
    "test_greedy_accuracy",
    "test_greedy_size",
    "test_distance",
  }
  assert wanted < found.keys()
  assert 1 <= found["test_greedy_size"] <= N and found["test_distance"] > 0.5


def test_a_member_whose_loss_is_not_finite_is_named(config, tmp_path):
  rates = (1.0, 1.0, 1e30, 1.0)
  alone = {"method.name": "ensemble", "method.rate": None, "steps": 20}
  c = config(**{"method.learning_rates": rates, **alone})
  with pytest.raises(
    train.BadStep, match=r"Member 2 is worst.*leave='\(2,\)' .*size=9"
  ):
    train.train(train.build(c, DEVICES), tmp_path)


REFUSED = {
  "no population": (
    {
      "method.name": "ddp",
      "method.rate": None,
      "mesh": ConfigDict({"data": -1}),
    },
    {"population.mixup": (0.1,)},
    r"population.mixup=\(0.1,\), but the workers of .*'ddp' are no population",
  ),
  "no axis": (
    {"mesh": ConfigDict({"data": -1})},
    {},
    r"has no axis 'population', which config.method.name='wash' works on",
  ),
  "unequal settings": (
    {},
    {"population.mixup": (0.1, 0.2), "population.cutmix": (1.0,) * 4},
    r"population.mixup=\(0.1, 0.2\) has 2 values, others have 4",
  ),
  "few settings": (
    {},
    {"population.mixup": (0.1, 0.2)},
    "mixing settings for 2 members, but the last one has the number 3",
  ),
  "branches of no tree": (
    {"method.name": "dart", "method.rate": None},
    {},
    "Set --config.population.same_init=True",
  ),
  "a setting": (
    {},
    {"population.erasing": (2.0,)},
    "erasing=2.0 must be a probability",
  ),
  "none a device": (
    {},
    {"population.per_device": 0},
    "per_device=0 is how many",
  ),
  "a batch": ({"batch_size": 10}, {}, "must be a multiple of the 4 workers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_fields_are_refused(config, case):
  start, changes, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    train.build(config(**start, **changes), DEVICES)


def test_mixing_is_of_images(config):
  text = ConfigDict({"name": "llama", "preset": "tiny", "layers": 1})
  c = config(**{"data.name": "stdlib_text", "data.length": 16, "model": text})
  with c.unlocked():
    c.data.augment = ()
    c.population.mixup = (0.1,)
  with pytest.raises(
    ValueError, match=r"population.mixup: mixing is of images"
  ):
    train.build(c, DEVICES)
