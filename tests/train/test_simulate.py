"""config.simulate: all workers on one device train as on as many devices."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from distrain_jax import data, inspect, methods, train
from distrain_jax.train import experiment, export

N = 4
FLOAT32 = {"method.wire_dtype": "float32"}  # not to round what differs by order
# What a method's hardest settings need beside tiny.py's.
SETTINGS = {
  "acco": FLOAT32,
  "dpu": FLOAT32,
  "weight_prediction": FLOAT32,
  "dart": {"population.same_init": True, "method.joint_steps": 2},
  "sdp": {"method.coverage": 0.5},
  "local_sgd": {"method.sync_every": 2},
  "diloco": {"method.sync_every": 2},
}
STAGES = {
  "mesh": ConfigDict({"stage": N, "data": 1}),
  "model": ConfigDict(
    {"name": "rev_mlp", "width": 8, "hidden": 8, "blocks": 2, "dropout": 0.2}
  ),
  "method.accumulate": 2,
}
# Random values of a member or stage are told apart by their places, and both
# runners have those: the same bits are drawn. What is summed differs by order.
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


def of(small, method, folder, **changes):
  """(result, experiment) of a short run; on N devices, or as `changes` say."""
  own = SETTINGS.get(method, {}) | {"method.name": method}
  own = (STAGES if method in methods.PIPELINED else {}) | own
  if method in methods.PIPELINED:
    own["optimizer.name"] = "momentum"
  if method in methods.POPULATIONS:
    own["mesh"] = ConfigDict({"population": -1})
  c = small(**own | changes)
  built = train.build(c, jax.devices()[:N])
  return train.train(built, folder), built


@pytest.mark.parametrize("method", methods.FACTORIES)
def test_every_method_trains_as_on_devices(method, small, tmp_path):
  there, _ = of(small, method, tmp_path / "there")
  here, built = of(small, method, tmp_path / "here", simulate=N)
  assert built.run.workers == N and built.run.mesh.size == 1
  devices = {x.sharding.device_set == {jax.devices()[0]} for x in leaves(here)}
  assert devices == {True}
  for x, y in zip(leaves(here), leaves(there), strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype
    np.testing.assert_allclose(host(x), host(y), **CLOSE)
  for name, value in there.metrics.items():
    np.testing.assert_allclose(here.metrics[name], value, rtol=2e-3, atol=1e-5)


def leaves(result):
  return jax.tree.leaves(result.state)


def host(x):
  if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  return np.asarray(x, np.float64)


def test_pipelines_side_by_side(small, tmp_path):
  two = {"mesh": ConfigDict({"stage": 2, "data": 2})}
  there, _ = of(small, "petra", tmp_path / "there", **two)
  here, built = of(small, "petra", tmp_path / "here", simulate=N, **two)
  assert built.run.workers == 2
  for x, y in zip(leaves(here), leaves(there), strict=True):
    np.testing.assert_allclose(host(x), host(y), **CLOSE)


@pytest.mark.parametrize("method", ["petra", "sdp", "wash"])
def test_it_resumes_to_the_same_bits(method, small, tmp_path):
  run = {"simulate": N, "steps": 6, "checkpoint.every": 3}
  straight, _ = of(small, method, tmp_path, **run)
  shutil.rmtree(tmp_path / "checkpoints" / "6")  # as if stopped after step 3
  resumed, _ = of(small, method, tmp_path, **run)
  for x, y in zip(leaves(resumed), leaves(straight), strict=True):
    np.testing.assert_array_equal(host(x), host(y))


@pytest.mark.parametrize("method", ["zero1", "wash", "sdp"])
@pytest.mark.parametrize("first", [0, N])
def test_a_checkpoint_goes_on_simulated_and_back(
  first, method, small, tmp_path
):
  """What was saved with `first` goes on with the other, as if with one."""
  short, long = ({"steps": n, "optimizer.schedule": "constant"} for n in (3, 6))
  of(small, method, tmp_path, simulate=first, **short)
  moved, _ = of(small, method, tmp_path, simulate=N - first, **long)
  stayed, _ = of(small, method, tmp_path / "one", simulate=N, **long)
  for x, y in zip(leaves(moved), leaves(stayed), strict=True):
    np.testing.assert_allclose(host(x), host(y), **CLOSE)


def test_another_number_of_workers_goes_on(small, tmp_path):
  run = {"model.dropout": 0.0, "optimizer.schedule": "constant"}
  of(small, "zero1", tmp_path, simulate=2, steps=3, **run)
  fewer, _ = of(small, "zero1", tmp_path, simulate=N, steps=6, **run)
  stayed, _ = of(small, "zero1", tmp_path / "one", simulate=2, steps=6, **run)
  params = lambda result: jax.tree.leaves(result.state.inner.params)
  for x, y in zip(params(fewer), params(stayed), strict=True):
    np.testing.assert_allclose(host(x), host(y), **CLOSE)


def test_another_number_of_workers_has_the_same_model(small, tmp_path):
  """Of SDP, whose workers then hold other parts, and go on with them."""
  run = {"method.coverage": 0.5, "optimizer.schedule": "constant"}

  def model(workers, steps):
    result, built = of(
      small, "sdp", tmp_path, simulate=workers, steps=steps, **run
    )
    return jax.tree.leaves(built.run.params(result.state))

  saved = [host(x) for x in model(2, 3)]
  for x, y in zip(model(N, 3), saved, strict=True):
    np.testing.assert_array_equal(host(x), y)
  after = [host(x) for x in model(N, 6)]
  assert all(np.isfinite(x).all() for x in after)
  assert not any(np.array_equal(x, y) for x, y in zip(after, saved))


def test_its_model_is_exported(small, tmp_path):
  result, built = of(small, "sdp", tmp_path, simulate=N)
  made = export.export(tmp_path, tmp_path / "model.safetensors")
  model = built.run.params(result.state)
  for x, y in zip(*map(jax.tree.leaves, (made.params, model)), strict=True):
    np.testing.assert_array_equal(host(x), host(y))


def test_its_report_is_of_all_workers_on_the_device(small):
  c = small(simulate=N, **{"method.name": "local_sgd", "method.sync_every": 2})
  program = experiment.program(c, data.describe("digits").info)
  report = inspect.compile(program.run, *program.abstract())
  assert report.devices == 1 and not report.step.communication
  params = sum(x.size * 4 for x in jax.tree.leaves(program.params()))
  assert report.memory.state["params"] == N * params
  options = {"compiler_options": {"xla_cpu_enable_fast_math": False}}
  again = inspect.compile(program.run, *program.abstract(), **options)
  assert again.memory.state == report.memory.state
  with pytest.raises(ValueError, match="this run is simulated on one device"):
    inspect.bytes_sent(program.run, *program.abstract())


def test_what_one_device_cannot_simulate_is_refused(small):
  build = lambda **changes: train.build(small(simulate=N, **changes))
  with pytest.raises(ValueError, match=r"mesh.tensor=2 divides what one"):
    build(mesh=ConfigDict({"data": -1, "tensor": 2}))
  with pytest.raises(ValueError, match=r"per_device=2, but with config.simul"):
    build(
      mesh=ConfigDict({"population": -1}),
      **{"method.name": "wash", "population.per_device": 2},
    )
  with pytest.raises(ValueError, match=r"simulate=-1 must be at least 0"):
    train.build(small(simulate=-1))
  with pytest.raises(ValueError, match=r"there are 4 \(simulated"):
    build(mesh=ConfigDict({"data": 8}))
