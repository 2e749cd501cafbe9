"""PAPA in the trainer: when members average, and how it is mended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax import data, gradients, models, train
from distrain_jax.data import mixing
from distrain_jax.models import zoo
from distrain_jax.population import members
from distrain_jax.train import averaging

N = 4
MESH = ConfigDict({"population": -1})
DEVICES = jax.devices()[:N]
ROWS = 1200  # of digits' training part


@pytest.fixture(scope="module")
def config(small):
  """config(**changes): PAPA-all of four members, three rows each."""

  def make(**changes):
    start = {
      "mesh": MESH,
      "method.name": "papa",
      "method.variant": "all",
      "method.every": 2,
      "population.repair": True,
      "batch_size": 12,
      "evaluation.batch_size": 120,
      "model": ConfigDict({"name": "mlp", "widths": (8, 6), "dropout": 0.2}),
    }
    return small(**{**start, **changes})

  return make


def trained(c, folder, devices=DEVICES):
  state = train.train(train.build(c, devices), folder).state.inner
  return jax.tree.map(np.asarray, state.params)


def hidden(params, images):
  """Pre-activations of the first hidden layer, in NumPy."""
  layer = params["dense_0"]
  return images.reshape(len(images), -1) @ layer["kernel"] + layer["bias"][None]


def test_an_average_has_the_statistics_that_members_had(config, tmp_path):
  alone = {"method.name": "ensemble", "population.repair": False}
  alone |= {"method.variant": None, "method.every": None, "steps": 2}
  before = trained(config(**alone), tmp_path / "ensemble")
  c = config(steps=2)
  params = trained(c, tmp_path / "repaired")
  for x in jax.tree.leaves(params):
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
  batches = train.build(c, DEVICES).batches()
  next(batches)
  rows = next(batches)["image"].reshape(N, 3, -1)
  of = lambda n: jax.tree.map(lambda x: x[n], before)
  each = [hidden(of(n), rows[n]) for n in range(N)]
  one = hidden(jax.tree.map(lambda x: x[0], params), rows.reshape(12, -1))
  for statistic in (np.mean, np.std):
    wanted = np.mean([statistic(y, 0) for y in each], 0)
    np.testing.assert_allclose(statistic(one, 0), wanted, atol=1e-5)


def test_members_that_share_a_device_or_divide_their_rows(config, tmp_path):
  same = {"batch_size": 16, "steps": 2}
  shared = config(**same, **{"population.per_device": 2})
  divided = config(
    **same,
    **{
      "mesh": ConfigDict({"population": N, "fsdp": 2}),
      "population.rows_over": ("fsdp",),
      "sharding": ConfigDict({"hidden_0": "fsdp"}),
    },
  )
  wanted = trained(config(**same), tmp_path / "one")
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  got = trained(shared, tmp_path / "shared", DEVICES[:2])
  jax.tree.map(near, got, wanted)
  got = trained(divided, tmp_path / "divided", jax.devices())
  jax.tree.map(near, got, wanted)


def test_what_is_measured_is_what_a_members_loss_sees(config, monkeypatch):
  """Its rows as it mixes them."""
  seen = {}

  def repairer(module, model, example, *, inputs):
    del module, model, example

    def mend(own, average, rows, mean, sharing):
      del own, mean, sharing
      seen.update(image=rows.batch[inputs], label=rows.batch["label"])
      return average

    return mend

  monkeypatch.setattr("distrain_jax.soups.repairer", repairer)
  c = config(**{"population.smoothing": (0.0, 0.1, 0.2, 0.3)})
  built = train.program(c, data.describe(c.data).info, DEVICES)
  built.run.step.trace(*built.abstract())
  assert seen["label"].shape == (3, 10)  # smoothed
  assert seen["image"].shape == (3, 8, 8, 1)


def every(c):
  """Steps that end with an average: the factory's option."""
  model = models.create("mlp")
  return averaging.options(c, model, {}, ROWS, N, None)["every"]


def test_five_epochs_of_a_member_unless_told_otherwise(config):
  unset = {"method.every": None, "population.repair": False}
  c = config(**unset, steps=10_000)
  assert every(c) == 5 * ROWS // 3
  # They share one pass over the data, four times as fast.
  assert (
    every(config(**unset, **{"population.same_order": True}, steps=501)) == 500
  )
  train.build(c, DEVICES)
  with pytest.raises(
    ValueError,
    match=r"5 epochs of 1200 rows, 2000 steps, and "
    r"config.steps=4 ends before. .*every=1, or --config.steps=2000",
  ):
    train.build(config(**unset), DEVICES)
  # Who only reads the run, or compiles it, has no data to count.
  assert not data.describe(c.data).info.count
  train.program(config(**unset), data.describe(c.data).info, DEVICES)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_measured_is_mixed_as_it_was_in_the_gradient(
  accumulate, config, monkeypatch
):
  monkeypatch.setattr(
    "distrain_jax.soups.repairer", lambda *_, inputs: lambda *args: args[2]
  )
  settings = [mixing.Mixing(mixup=1.0), mixing.Mixing(cutmix=1.0)]
  of = settings, 10, "population"
  c = config(**{"method.accumulate": accumulate})
  example = {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)}
  model = models.create("mlp")
  options = averaging.options(c, model, example, ROWS, 2, mixing.mixer(*of))
  slope = lambda w, batch, key: ((w * batch["image"]).sum(), {})  # the images
  gradient = gradients.gradient_fn(mixing.mixing_loss(slope, *of), accumulate)

  def member(batch, key):
    found = options["repair"](0, 0, members.Rows(batch, key), 0, 0)
    found = found.batch["image"].reshape(accumulate, -1, 8, 8, 1)
    return found.mean(0), gradient(found[0], (), batch, key).grads

  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(2, 4, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(0, 10, (2, 4)),
  }
  keys = jax.random.split(jax.random.key(1), 2)
  found, wanted = jax.vmap(member, axis_name="population")(batch, keys)
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
  assert (
    np.abs(
      found - batch["image"].reshape(2, accumulate, -1, 8, 8, 1).mean(1)
    ).max()
    > 0.1
  )


REFUSED = {
  "epochs without a number": (
    {"method.every": None, "method.epoch_steps": 37},
    "config.method.epoch_steps=37 starts the count",
  ),
  "the end of averages": (
    {"method.every": None, "method.stop_after": 50, "steps": 5000},
    r"config.method.stop_after=50 ends before.* --config.method.stop_after=2000",
  ),
  "another method": (
    {"method.name": "wash", "method.variant": None, "method.every": None},
    r"repair=True corrects averages .* those of config.method.name='wash' do ",
  ),
  "a pull": (
    {"method.variant": "pull"},
    r"of config.method.name='papa' with config.method.variant='pull' do not",
  ),
  "the default": (
    {"method.variant": None},
    "config.method.variant=None do not",
  ),
  "no population": (
    {
      "method.name": "ddp",
      "method.variant": None,
      "method.every": None,
      "mesh": ConfigDict({"data": -1}),
    },
    "population.repair=True, but the workers of .*'ddp' are no population",
  ),
  "nothing hidden": (
    {"model": ConfigDict({"name": "mlp", "widths": ()})},
    r"repair=True: repair: no layer can be corrected: output has the network's "
    r"outputs.* Set --config.population.repair=False",
  ),
  "text": (
    {
      "data.name": "stdlib_text",
      "data.length": 16,
      "data.augment": (),
      "model": ConfigDict({"name": "llama", "preset": "tiny", "layers": 1}),
    },
    r"repair=True: repair: no layer can be corrected: none is a Dense or Conv",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_fields_are_refused(config, case):
  changes, message = REFUSED[case]
  with pytest.raises(ValueError, match=message):
    train.build(config(**changes), DEVICES)


def test_our_resnets_only_need_new_statistics(config, monkeypatch):
  monkeypatch.setitem(zoo.FIXED["resnet18"], "stages", (1,))
  model = ConfigDict({"name": "resnet18", "stem": "cifar", "width": 0.125})
  with pytest.raises(ValueError, match="only needs its statistics estimated"):
    train.build(config(model=model), DEVICES)
