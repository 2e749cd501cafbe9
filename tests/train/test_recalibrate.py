"""Statistics of a batch norm estimated anew, against NumPy over all rows."""

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import distrain_jax as dj
from distrain_jax import data, models, spmd, train
from distrain_jax.method import Variables
from distrain_jax.models.norms import BatchNorm

ROWS, BATCHES, C = 16, 3, 4
rng = np.random.default_rng(0)
# Batches apart from each other: the variance of their means counts.
IMAGES = [
  rng.normal(k, 1 + k, (ROWS, 3, 3, C)).astype(np.float32)
  for k in range(BATCHES)
]
EPS = 1e-5


class Ours(nn.Module):
  """norm(relu(norm(x))), the second one inside of a block of its own."""

  momentum: float = 0.9

  @nn.compact
  def __call__(self, x, *, train=False):
    options = {"momentum": self.momentum, "eps": EPS}
    x = nn.relu(BatchNorm("conv_out", **options, name="a")(x, train))
    return BatchNorm("conv_out", **options, name="b")(x, train)


class Foreign(nn.Module):
  """The same of Flax's layers, of which each has a momentum of its own."""

  @nn.compact
  def __call__(self, x, *, train=False):
    norm = lambda momentum, name: nn.BatchNorm(
      not train, momentum=momentum, epsilon=EPS, name=name
    )
    return norm(0.99, "b")(nn.relu(norm(0.5, "a")(x)))


class Other(nn.Module):
  """A statistic that is no mean and no variance."""

  @nn.compact
  def __call__(self, x, *, train=False):
    largest = self.variable("batch_stats", "largest", lambda: jnp.ones(()))
    if train:
      largest.value = 0.75 * largest.value + 0.25 * x.max()
    return x


def made_run(workers_mesh):
  method = dj.ddp(lambda *_: (0.0, {}), optax.sgd(0.1))
  if workers_mesh is None:
    return dj.simulate(method, workers=4)
  return dj.distribute(method, workers_mesh)


def batches(images=IMAGES):
  return [{"image": x} for x in images]


def variables_of(model):
  """With scales that matter, and running averages that are nobody's."""
  shapes = models.zoo.boxes(model, IMAGES[0])
  rng = np.random.default_rng(1)
  draw = lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
  return jax.tree.map(draw, nn.meta.unbox(shapes))


def oracle(params, images):
  """In float64; a layer's input is normalised by its batch's statistics."""
  a = {k: np.asarray(v, np.float64) for k, v in params["a"].items()}
  seen = {"a": [], "b": []}
  for x in images:
    x = x.astype(np.float64)
    seen["a"].append(x)
    y = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + EPS)
    seen["b"].append(np.maximum(y * a["scale"] + a["bias"], 0))
  rows = {name: np.concatenate(xs) for name, xs in seen.items()}
  return {
    name: {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
    for name, x in rows.items()
  }


def assert_near(found, wanted, tolerance=1e-5):
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance)
  jax.tree.map(near, dict(found), wanted)


@pytest.mark.parametrize("model", [Ours(), Ours(momentum=0.0), Foreign()])
@pytest.mark.parametrize("workers", [None, 1, 4])
def test_statistics_are_those_of_all_rows(model, workers, mesh):
  variables = variables_of(model)
  run = made_run(workers and mesh(workers))
  new = train.recalibrator(run, model)(variables, batches())
  assert new.params is variables.params
  found = new.model_state["batch_stats"]
  assert_near(found, oracle(variables.params, IMAGES))
  evaluated = model.apply(
    {"params": new.params, **new.model_state}, IMAGES[0], train=False
  )
  assert jnp.isfinite(evaluated).all()


def child(folder):
  """One of two processes: its half of each batch's rows."""
  spmd.use_cpu_devices(2)
  spmd.join_processes()
  run = made_run(spmd.make_mesh({"data": -1}))
  me, half = jax.process_index(), ROWS // 2
  mine = [x[me * half : (me + 1) * half] for x in IMAGES]
  new = train.recalibrator(run, Ours())(variables_of(Ours()), batches(mine))
  found = jax.tree.map(np.asarray, new.model_state["batch_stats"])
  np.savez(
    pathlib.Path(folder) / f"{me}.npz",
    **{f"{k}_{what}": v[what] for k, v in found.items() for what in v},
  )


def test_two_processes_find_the_statistics_of_both_their_rows(tmp_path):
  launcher = pathlib.Path(dj.__file__).parents[1] / "launch" / "local.py"
  command = [sys.executable, launcher, "--processes=2", f"--logs={tmp_path}"]
  subprocess.run([*command, "--", __file__, tmp_path], check=True, timeout=300)
  wanted = oracle(variables_of(Ours()).params, IMAGES)
  for me in range(2):
    with np.load(tmp_path / f"{me}.npz") as found:
      for name, statistics in wanted.items():
        found_here = {k: found[f"{name}_{k}"] for k in statistics}
        assert_near(found_here, statistics)


def test_running_averages_leave_no_trace_not_even_as_nan(mesh):
  variables = variables_of(Ours())
  lost = variables._replace(
    model_state=jax.tree.map(lambda x: x * np.nan, variables.model_state)
  )
  recalibrate = train.recalibrator(made_run(mesh(2)), Ours())
  found = [recalibrate(v, batches()).model_state for v in (variables, lost)]
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_other_statistics_are_averaged(mesh):
  variables = Variables({}, {"batch_stats": {"largest": np.float32(50.0)}})
  recalibrate = train.recalibrator(made_run(mesh(4)), Other())
  found = recalibrate(variables, batches()).model_state["batch_stats"]
  assert_near(found, {"largest": np.mean([x.max() for x in IMAGES])}, 1e-6)


@pytest.fixture
def compiled():
  """A list that grows by one with every program that is compiled."""
  programs = []

  def listen(event, *_, **__):
    if event == "/jax/core/compile/backend_compile_duration":
      programs.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield programs
  jax.monitoring.unregister_event_duration_listener(listen)


def test_it_compiles_once(mesh, compiled):
  recalibrate = train.recalibrator(made_run(mesh(4)), Ours())
  given = jax.device_put(variables_of(Ours()))
  del compiled[:]
  jax.block_until_ready(recalibrate(given, batches()[:1]))
  assert len(compiled) == 2  # and what the statistics start from
  jax.block_until_ready(recalibrate(given, batches()))
  assert len(compiled) == 2


RESNET = {"stages": (1,), "width": 1 / 16, "zero_last_scale": False}


def test_what_is_only_of_training_is_off(mesh):
  """Of a ResNet that synchronises over an axis that is not there."""
  quiet = models.ResNet(**RESNET)
  images = [x[..., :3] for x in IMAGES]
  variables = models.init(quiet, jax.random.key(0), images[0])
  noisy = models.ResNet(
    **RESNET, axis_name="data", dropout=0.5, stochastic_depth=0.5
  )
  run = made_run(mesh(4))
  found, wanted = (
    train.recalibrator(run, model)(variables, batches(images)).model_state
    for model in (noisy, quiet)
  )
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  rows = np.concatenate(images)
  stem = variables.params["stem"]["kernel"]
  y = models.layers.Conv(4, 3, ("a", "b")).apply(
    {"params": {"kernel": stem}}, rows
  )
  mean = np.asarray(y, np.float64).mean((0, 1, 2))
  got = found["batch_stats"]["stem_norm"]["mean"]
  np.testing.assert_allclose(got, mean, atol=1e-5)


@pytest.mark.parametrize(
  "variables",
  [
    {"w": np.ones(2)},
    Variables({"w": np.ones(2)}, {}),
    Variables({"w": np.ones(2)}, {"cache": np.ones(2)}),
  ],
)
def test_a_model_without_statistics_is_left_as_it_is(variables, mesh):
  recalibrate = train.recalibrator(made_run(mesh(2)), models.MLP())
  unread = (1 / 0 for _ in range(1))
  assert recalibrate(variables, unread) is variables


def test_no_batches_are_refused(mesh):
  recalibrate = train.recalibrator(made_run(mesh(2)), Ours())
  with pytest.raises(ValueError, match="`batches` is empty"):
    recalibrate(variables_of(Ours()), [])


MODEL = {"name": "resnet18", "stem": "cifar", "width": 1 / 16}


def test_the_trainer_evaluates_the_model_with_its_own_statistics(small):
  """The config's experiment equals the one that is put together by hand."""
  changes = {"model": ConfigDict(MODEL), "evaluation.recalibrate": 2}
  x = train.build(small(**changes))
  params = x.run.params(x.run.init(x.key, x.params()))
  found = x.evaluate(params, "validation")
  plain = train.build(small(model=ConfigDict(MODEL)))
  own = train.program(x.config, data.load("digits").info).model
  it = x.batches()
  recalibrate = train.recalibrator(x.run, own)
  by_hand = recalibrate(params, [next(it) for _ in range(2)])
  assert plain.evaluate(by_hand, "validation") == found
  assert plain.evaluate(params, "validation") != found
  assert x.evaluate(params, "validation") == found  # always the same batches


def test_a_model_without_statistics_is_evaluated_as_ever(small):
  plain, more = (
    train.build(small(**{"evaluation.recalibrate": count})) for count in (0, 2)
  )
  params = plain.params()
  assert plain.evaluate(params, "test") == more.evaluate(params, "test")


if __name__ == "__main__":
  child(sys.argv[1])
