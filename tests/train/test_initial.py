"""Runs that start from given weights."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from distrain_jax import train
from distrain_jax.models import weights

MLP = {"name": "mlp", "widths": [24]}


@pytest.fixture
def file(tmp_path):
  return tmp_path / "x.safetensors"


def given(small, file, dtype=np.float32, told=None, **changes):
  """Writes parameters that no seed of the config makes."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(train.build(small(**changes)).params)
  shapes = getattr(shapes, "params", shapes)
  draw = lambda x: rng.normal(0, 0.2, x.shape).astype(dtype)
  params = jax.tree.map(draw, shapes)
  weights.save(file, params, told)
  return params


def started(small, file, **changes):
  return train.build(small(initial_params=str(file), **changes)).params()


def test_a_run_starts_from_the_files_parameters(small, file):
  want = given(small, file, told=MLP)
  got = started(small, file)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  random = train.build(small()).params()
  assert (random["dense_0"]["kernel"] != want["dense_0"]["kernel"]).any()


def test_they_train(small, file, tmp_path):
  given(small, file)
  x = train.build(small(initial_params=str(file), steps=1))
  x = x._replace(evaluate=lambda *_: {"loss": 0.0})  # is not the point
  train.train(x, tmp_path / "run")
  first = train.read_metrics(tmp_path / "run")[0]["loss"]
  y = train.build(small(steps=1))._replace(evaluate=x.evaluate)
  train.train(y, tmp_path / "random")
  assert first != train.read_metrics(tmp_path / "random")[0]["loss"]


def test_parameters_take_the_models_dtype_and_lie_where_they_should(
  small, file
):
  want = given(small, file, ml_dtypes.bfloat16)
  got = started(
    small,
    file,
    mesh=ConfigDict({"data": 4, "tensor": 2}),
    sharding=ConfigDict({"hidden_0": "tensor"}),
  )
  kernel = got["dense_0"]["kernel"]
  assert kernel.dtype == np.float32
  assert kernel.sharding.spec == P(None, "tensor")
  np.testing.assert_array_equal(kernel, want["dense_0"]["kernel"])


def test_statistics_that_are_not_trained_start_as_ever(small, file):
  changes = {"stem": "cifar", "width": 1 / 16}
  model = ConfigDict({"name": "resnet18", **changes})
  want = given(small, file, model=model)
  got = started(small, file, model=model)
  jax.tree.map(np.testing.assert_array_equal, got.params, want)
  assert all((x == x[0]).all() for x in jax.tree.leaves(got.model_state))


def test_a_missing_file_is_told_with_the_ways_to_make_one(small, file):
  with pytest.raises(FileNotFoundError, match=r"x\.safetensors.*convert_weigh"):
    started(small, file)


@pytest.mark.parametrize(
  "told, changes, message",
  [
    (
      None,
      {"widths": (8,)},
      r"'dense_0/bias' is \(24,\), but \(8,\) in the model",
    ),
    (
      None,
      {"widths": (24, 8)},
      r"no 'dense_1/bias', which the model has, \(8,\)",
    ),
    (
      {"name": "mlp", "activation": "tanh"},
      {},
      r"activation='tanh', not 'relu'\. Set --config\.model\.activation=tanh",
    ),
    ({"name": "llama"}, {}, r"name='llama', not 'mlp'\. Set"),
  ],
)
def test_another_models_file_is_refused_before_anything_compiles(
  told, changes, message, small, file
):
  given(small, file, told=told)
  own = ConfigDict({"name": "mlp", "widths": (24,), "dropout": 0.2, **changes})
  with pytest.raises(ValueError, match=r"does not fit config\.model") as e:
    started(small, file, model=own)
  assert e.match(message)


def test_a_file_that_is_none_is_refused(small, file):
  file.write_bytes(b"not weights")
  with pytest.raises(ValueError, match="is not a safetensors file"):
    started(small, file)
