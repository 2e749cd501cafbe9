"""From a config to an experiment."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from distrain_jax import train


def test_sharded_parameters_train_to_the_same_numbers(small, tmp_path):
  mesh = ConfigDict({"data": 4, "tensor": 2})
  rule = ConfigDict({"hidden_0": "tensor"})

  def run(name, **changes):
    x = train.build(small(mesh=mesh, **changes))
    x = x._replace(evaluate=lambda *_: {"loss": 0.0})  # is not the point
    state = train.train(x, tmp_path / name).state
    losses = [y.get("loss") for y in train.read_metrics(tmp_path / name)]
    return state.inner.params, losses[:4]

  plain, losses = run("plain")
  params, got = run("sharded", sharding=rule, **{"method.name": "zero1"})
  assert params["dense_0"]["kernel"].sharding.spec == P(None, "tensor")
  assert params["output"]["kernel"].sharding.spec[0] == "tensor"
  np.testing.assert_allclose(got, losses, rtol=1e-5)
  near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(near, params, plain)


def test_the_seed_alone_decides_parameters_and_keys(small):
  a, b, c = (train.build(small(seed=seed)) for seed in (0, 0, 1))
  kernel = lambda x: np.asarray(x.params()["dense_0"]["kernel"])
  np.testing.assert_array_equal(kernel(a), kernel(b))
  data = lambda x: jax.random.key_data(x.key)
  np.testing.assert_array_equal(data(a), data(b))
  assert not np.array_equal(data(a), data(c))


def test_the_data_decides_the_size_of_the_output(small):
  for own, classes in (({}, 10), ({"classes": 12}, 12)):
    model = ConfigDict({"name": "mlp", "widths": (24,), **own})
    params = jax.eval_shape(train.build(small(model=model)).params)
    assert params["output"]["kernel"].shape == (24, classes)


@pytest.mark.parametrize("stats", ["averaged", "local"])
def test_statistics_of_a_batch_norm_differ_by_worker_if_they_are_local(
  stats, small
):
  model = {"name": "resnet18", "stem": "cifar", "width": 1 / 16}
  x = train.build(small(stats=stats, model=ConfigDict(model)))
  like = x.run.abstract(x.key, jax.eval_shape(x.params))
  for leaf in jax.tree.leaves(like.inner.model_state):
    assert leaf.ndim == (2 if stats == "local" else 1)
