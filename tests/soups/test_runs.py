"""The models of runs' folders: the bits that the trainer had."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax.method import Variables
from distrain_jax.models import weights
from distrain_jax.soups import runs
from distrain_jax.train import export

equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", ["local_sgd", "wash"])
def test_a_population_gives_all_its_members(method, saved):
  """Of two devices, of wash with two members each, read on one."""
  changes = {"method.name": method}
  if method == "wash":
    mesh = ConfigDict({"population": -1})
    changes |= {"mesh": mesh, "population.per_device": 2, "stats": "local"}
  folder, run, state = saved(**changes)
  members = runs.members_of(folder)
  assert len(members) == run.workers == (4 if method == "wash" else 2)
  stacked = state.inner.params  # the guard's, (2, ...) or (4, ...)
  for i, member in enumerate(members):
    equal(member, jax.tree.map(lambda x, i=i: x[i], stacked))
  kernels = [m["dense_0"]["kernel"] for m in members]
  assert not np.array_equal(kernels[0], kernels[1])
  assert all(len(x.devices()) == 1 for x in kernels)


def test_whoever_left_since_an_older_checkpoint_has_them_all(saved, tmp_path):
  """A run that goes on has its config written over the folder's."""
  mesh = ConfigDict({"population": -1})
  folder, run, state = saved(
    **{"method.name": "wash", "mesh": mesh, "population.per_device": 2}
  )
  file = folder / "config.json"
  c = json.loads(file.read_text())
  c["method"] |= {"leave": [2], "learning_rates": [1.0, 1.0, 1.0, 1.0, 0.5]}
  c["population"]["smoothing"] = [0.0, 0.0, 0.0, 0.0, 0.1]
  file.write_text(json.dumps(c))
  members = runs.members_of(folder)
  for i, member in enumerate(members):
    equal(member, jax.tree.map(lambda x, i=i: x[i], state.inner.params))
  found = export.export(folder, tmp_path / "x.safetensors")
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
  jax.tree.map(near, found.params, run.params(state))


def test_members_come_with_their_own_statistics(saved, one_block):
  model = ConfigDict({"name": "resnet18", "width": 1 / 16})
  changes = {"method.name": "diloco", "stats": "local", "model": model}
  folder, run, state = saved(**changes)
  first, second = runs.members_of(folder)
  assert isinstance(first, Variables)
  for i, member in enumerate((first, second)):
    own = jax.tree.map(lambda x, i=i: x[i], state.inner.model_state)
    equal(member.model_state, own)
  # The run's own model has their mean.
  mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second).model_state
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(near, run.params(state).model_state, mean)


@pytest.mark.parametrize(
  "method", ["ddp", pytest.param("sdp", marks=pytest.mark.full)]
)
def test_other_runs_give_the_model_that_is_evaluated(method, saved, tmp_path):
  """SDP's workers train parts of one model: there is nothing to average."""
  folder, run, state = saved(**{"method.name": method})
  found = runs.read(folder)
  (model,) = found.models
  assert found.step == 3 and found.config.method.name == method
  equal(model, run.params(state))
  file = tmp_path / "new" / "x.safetensors"
  runs.save(file, model, found.config)
  told = {"activation": "relu", "classes": 10, "mup": False, "widths": [24]}
  told |= {"name": "mlp"}
  assert weights.model_of(file) == told
  equal(runs.from_weights(file, found.config), model)


def test_parts_of_a_model_are_no_members():
  like = {"w": np.zeros((2, 3))}
  whole = lambda count, *shape: lambda _: {"w": np.zeros((count, *shape))}
  assert runs._are_whole(whole(4, 2, 3), 0.0, like)
  assert not runs._are_whole(whole(4, 1, 3), 0.0, like)
  assert not runs._are_whole(lambda x: {"v": x}, 0.0, like)
  unlike = lambda x: jax.lax.cond(x > 0, lambda: 0.0, lambda: (0.0,))
  assert not runs._are_whole(unlike, 0.0, like)


def test_a_file_has_no_statistics_they_start_anew(tiny, one_block, tmp_path):
  model = {"name": "resnet18", "width": 1 / 16}
  c = tiny(model=ConfigDict(model))
  built = runs.program(c)
  start = built.task.init(jax.random.key(c.seed))
  file = tmp_path / "x.safetensors"
  weights.save(file, jax.tree.map(lambda x: x + 1, start.params))
  found = runs.from_weights(file, c)
  equal(found.params, jax.tree.map(lambda x: x + 1, start.params))
  equal(found.model_state, start.model_state)


def test_what_cannot_be_read_is_told(tiny, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
    runs.members_of(tmp_path / "none")
  with pytest.raises(FileNotFoundError, match="none"):
    runs.from_weights(tmp_path / "none.safetensors", tiny())
  staged = tmp_path / "staged"
  step = staged / "checkpoints" / "3"
  step.mkdir(parents=True)
  (staged / "config.json").write_text(tiny("stages").to_json_best_effort())
  told = {"custom_metadata": {"workers": 4}}
  (step / "_CHECKPOINT_METADATA").write_text(json.dumps(told))
  with pytest.raises(ValueError, match=r"of petra, .*export\.py"):
    runs.members_of(staged)
  with pytest.raises(
    FileNotFoundError, match="of step 2; there are those of 3"
  ):
    runs.members_of(staged, 2)
