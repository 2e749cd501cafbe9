"""A config's program, without data and for devices that need not run it."""

import jax
import pytest
from ml_collections import ConfigDict

from distrain_jax import data
from distrain_jax.train import experiment

INFO = data.describe("digits").info
CONVOLUTIONS = {"name": "resnet18", "stem": "cifar", "width": 1 / 16}
SHARDED = {
  "mesh": ConfigDict({"data": 4, "tensor": 2}),
  "sharding": ConfigDict({"hidden_0": "tensor"}),
  "method.name": "zero1",
}


@pytest.mark.parametrize(
  "changes",
  [{}, SHARDED, {"model": ConfigDict(CONVOLUTIONS)}],
  ids=["replicated", "sharded", "with statistics"],
)
def test_the_abstract_arguments_are_those_of_a_run(changes, small):
  program = experiment.program(small(**changes), INFO)
  state, batch, key = program.abstract()
  real = program.run.init(jax.random.key(0), program.params())
  kinds = lambda tree: jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding), tree
  )
  assert kinds(state) == kinds(real)
  assert batch["image"].shape == (48, 8, 8, 1)
  assert batch["label"].shape == (48,)
  assert key.dtype == jax.random.key(0).dtype


def test_the_mesh_is_made_of_the_devices_that_are_given(small):
  some = jax.devices()[2:4]
  program = experiment.program(small(), INFO, some)
  assert list(program.run.mesh.devices.flat) == some
  state = program.abstract()[0]
  assert all(x.sharding.device_set == set(some) for x in jax.tree.leaves(state))


def test_a_batch_is_refused_for_the_devices_that_are_given(small):
  with pytest.raises(ValueError, match=r"batch_size=48 .* the 5 workers"):
    experiment.program(small(), INFO, jax.devices()[:5])
