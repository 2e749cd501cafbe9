"""Two runs to test with: tiny.py, here or in real processes; least squares."""

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

import distrain_jax as dj
from distrain_jax import train

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.py")
PATIENCE = 300.0  # seconds, of a loaded machine


@pytest.fixture(scope="session")
def tiny():
  """tiny(steps=4, **{"method.name": "zero1"}) -> the config, so changed."""
  spec = importlib.util.spec_from_file_location("tiny", TINY)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def make(arg=None, **changes):
    c = module.get_config(arg)
    c.compilation_cache = ""  # it would stay on for other tests
    with c.unlocked():
      for name, value in changes.items():
        *parts, last = name.split(".")
        node = c
        for part in parts:
          node = node[part]
        node[last] = value
    return c

  return make


@pytest.fixture(scope="session")
def small(tiny):
  """As `tiny`, of few steps with nothing between them."""

  def make(**changes):
    quiet = {"steps": 4, "evaluation.every": 0, "checkpoint.every": 0}
    return tiny(**quiet | changes)

  return make


@pytest.fixture(scope="session")
def uninterrupted(tiny, tmp_path_factory):
  """The folder of a run that nothing stopped, by method; in this process."""

  @functools.cache
  def folder(method, arg=None):
    folder = tmp_path_factory.mktemp(f"uninterrupted_{method}")
    train.train(train.build(tiny(arg, **{"method.name": method})), folder)
    return folder

  return folder


@pytest.fixture(scope="session")
def contents():
  """contents(folder, step) -> all that a checkpoint holds, as NumPy arrays."""
  here = SingleDeviceSharding(jax.devices()[0])
  one = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

  def read(folder, step):
    where = folder / "checkpoints" / str(step)
    saved = ocp.checkpointables_metadata(where).metadata["state"]
    wanted = {"state": jax.tree.map(one, saved)}
    state = ocp.load_checkpointables(where, wanted)["state"]
    leaves = jax.tree_util.tree_leaves_with_path(state)
    out = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    for file in sorted((where / "data").glob("process_*")):
      out["data"] = file.read_text()  # the same in every process
    return out

  return read


@pytest.fixture(scope="session")
def assert_same_end(contents):
  """Two runs' last checkpoints and their metrics, to the bit."""

  def check(folder, reference, step=50):
    got, want = contents(folder, step), contents(reference, step)
    assert got.keys() == want.keys()
    different = [k for k in want if not np.array_equal(got[k], want[k])]
    assert not different
    name = "metrics.jsonl"
    assert (folder / name).read_bytes() == (reference / name).read_bytes()

  return check


class Started:
  """A command that runs; whoever uses it, stops it."""

  def __init__(self, command, folder):
    self.folder = folder
    self.output = folder / "output.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with self.output.open("ab") as file:
      self.process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # XLA_FLAGS as here: other flags, other bits
      )

  def logged_steps(self):
    """Those whose metrics are in metrics.jsonl."""
    return [x["step"] for x in train.read_metrics(self.folder) if "loss" in x]

  def logged(self):
    return len(self.logged_steps())

  def until(self, condition):
    """Waits for it while the process runs."""
    limit = time.monotonic() + PATIENCE
    while not condition():
      assert self.process.poll() is None, self.text()
      assert time.monotonic() < limit, self.text()
      time.sleep(0.003)

  def send(self, number):
    self.process.send_signal(number)

  def wait(self):
    return self.process.wait(PATIENCE)

  def text(self):
    return self.output.read_text()


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
  """For the real runs; those of this process compile for themselves."""
  folder = tmp_path_factory.mktemp("xla")
  yield folder
  assert any(folder.iterdir())  # so resumed runs had their programs from it


@pytest.fixture
def start(compilation_cache):
  """start(folder, *arguments) -> a real run of tiny.py; `local` in two."""
  started = []

  def run(folder, *arguments, local=False, arg=None):
    command = [
      "launch/train.py",
      f"--config={TINY}" + (f":{arg}" if arg else ""),
      f"--workdir={folder}",
      f"--config.compilation_cache={compilation_cache}",
      *arguments,
    ]
    if local:
      two = ("--processes=2", "--devices=2")
      command = ["launch/local.py", *two, "--", *command]
    else:
      command.append("--devices=8")
    started.append(Started(command, folder))
    return started[-1]

  yield run
  for one in started:
    if one.process.poll() is None:
      os.killpg(one.process.pid, signal.SIGKILL)
      one.process.wait()


def loss_fn(params, batch, key):
  """Least squares, with a little noise."""
  noise = jax.random.uniform(key, minval=0.9, maxval=1.1)
  error = batch["x"] @ params["w"] - batch["y"]
  return noise * jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def evaluate(params, split):
  del split
  distance = params["w"] - jnp.array([1.0, 2, 3])
  return {"loss": float(jnp.sum(distance**2)), "accuracy": 0.5}


class Batches:
  """A plain iterator; `events` has what happens when batch i is taken."""

  def __init__(self, events=()):
    self.taken, self.events = 0, dict(events)

  def __next__(self):
    self.taken += 1
    happens = self.events.get(self.taken, lambda batch: batch)
    rng = np.random.default_rng(self.taken)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    return happens({"x": x, "y": x @ np.array([1.0, 2, 3], np.float32)})

  def get_state(self):
    return {"taken": self.taken}

  def set_state(self, state):
    self.taken = state["taken"]


@pytest.fixture(scope="session")
def least_squares(mesh):
  """The guarded run on 4 workers by action and spike, compiled once."""

  @functools.cache
  def make(action, spike):
    method = dj.ddp(loss_fn, optax.adam(0.05))
    return dj.distribute(dj.guard(method, action=action, spike=spike), mesh(4))

  return make


@pytest.fixture
def experiment(least_squares):
  """experiment(steps, events={}, evaluate=..., **config): made by hand."""

  def make(steps=8, events=(), evaluate=evaluate, **changes):
    c = train.default_config()
    c.steps, c.log.every, c.compilation_cache = steps, 1, ""
    c.evaluation.every = c.checkpoint.every = 0
    c.update_from_flattened_dict(changes)
    action = "skip" if c.bad_step.action == "skip" else "count"
    return train.Experiment(
      config=c,
      run=least_squares(action, c.bad_step.spike),
      key=jax.random.key(0),
      params=lambda: {"w": jnp.zeros(3)},
      batches=lambda: Batches(events),
      evaluate=evaluate,
    )

  return make
