"""Several processes give the numbers of one device."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import petra_networks
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj

pytestmark = pytest.mark.core

PROCESSES, DEVICES, STEPS, ROWS = 2, 2, 4, 16
METHODS = {
  "ddp": dj.ddp,
  "zero1": dj.zero1,
  "fsdp": dj.fsdp,
  "acco": functools.partial(dj.acco, wire_dtype=None, warmup=1),
  "dpu": functools.partial(dj.dpu, wire_dtype=None, warmup=1),
  "weight_prediction": functools.partial(dj.weight_prediction, wire_dtype=None),
  "local_sgd": functools.partial(dj.local_sgd, sync_every=2),
  "diloco": functools.partial(dj.diloco, sync_every=2, fragments=2, delay=1),
}
UNITS = {"w": (None, "hidden"), "v": ("hidden",), "gain": ()}


def sdp(loss_fn, tx, **options):
  return dj.sdp(loss_fn, tx, names=UNITS, shapes=make_params(), **options)


METHODS |= {
  "sdp": functools.partial(sdp, coverage=0.5),
  "sdp_backward": functools.partial(
    sdp, coverage=0.25, masking="backward", shard_optimizer=True
  ),
}
on_data = {"axis": "data"}
# Members start from models of their own.
POPULATIONS = {
  "wash": functools.partial(
    dj.wash, **on_data, rate=0.5, period=2, shuffle_optimizer=True
  ),
  "wash_sharing": functools.partial(
    dj.wash, **on_data, rate=0.5, layer_schedule="constant", inner="member"
  ),
  "sparta": functools.partial(
    dj.sparta, **on_data, rate=0.5, layer_schedule="constant"
  ),
  "papa": functools.partial(
    dj.papa, **on_data, every=2, alpha=0.6, relative_rate=lambda step: 1 / step
  ),
  "dart": functools.partial(
    dj.dart, **on_data, joint_steps=1, every=2, opt_state="averaged"
  ),
}
METHODS |= POPULATIONS
PER_DEVICE = {"wash_sharing": 2}
HELPERS = pathlib.Path(petra_networks.__file__).parent
ALL = (*METHODS, "petra")
ROOT = pathlib.Path(dj.__file__).parents[1]


def make_params():
  rng = np.random.default_rng(0)
  f = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {"w": f(3, 8), "v": f(8), "gain": np.float32(1.5)}  # 8: fsdp cuts it


def make_batch(step):
  rng = np.random.default_rng(1 + step)
  x = rng.normal(size=(ROWS, 3)).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(1))}


def loss_fn(params, batch, key):
  noise = 1 + 0.1 * jax.random.normal(key, batch["x"].shape)
  out = jax.numpy.tanh(batch["x"] * noise @ params["w"]) @ params["v"]
  return ((params["gain"] * out - batch["y"]) ** 2).mean(), {}


def make_run(name, mesh=None):
  method = METHODS[name](
    loss_fn, optax.adamw(0.01), accumulate=2, clip_norm=0.5
  )
  each = PER_DEVICE.get(name, 1)
  if mesh is None:
    return dj.simulate(method, workers=PROCESSES * DEVICES * each)
  return dj.distribute(method, mesh, per_device=each)


def begin(run):
  """The state, and a function that reads what all processes can."""
  params, apart = make_params(), run.method.population
  if apart:
    factors = 1 + 0.1 * np.arange(run.workers, dtype=np.float32)
    params = jax.tree.map(lambda x: np.multiply.outer(factors, x), params)
  everywhere = None if run.mesh is None else NamedSharding(run.mesh, P())

  def read(state):
    out = {k: np.asarray(x) for k, x in run.params(state).items()}
    if apart:
      members = jax.jit(lambda x: x, out_shardings=everywhere)(state.params)
      out |= {f"{k}_of_each": np.asarray(x) for k, x in members.items()}
    return out

  return run.init(jax.random.key(7), params, per_worker=apart), read


def train(run, rows=slice(None)):
  """Parameters and metrics by name; `rows`: those that this process feeds."""
  key, out = jax.random.key(7), {}
  state, read = begin(run)
  for step in range(STEPS):
    batch = {k: x[rows] for k, x in make_batch(step).items()}
    state, metrics = run.step(state, run.put(batch), key)
    out |= {f"{k}_{step}": np.asarray(x) for k, x in metrics.items()}
  # A whole NumPy batch that every process holds is taken as well.
  state, metrics = run.step(state, make_batch(STEPS), key)
  out["loss_whole"] = np.asarray(metrics["loss"])
  return out | read(state)


def make_pipeline(mesh=None):
  """PETRA on four stages, two of them in each process."""
  blocks, params, _ = petra_networks.make("rr", fn=petra_networks.dropping)
  method = dj.petra(
    blocks,
    optax.adamw(0.01),
    shapes=params,
    example=petra_networks.batches(1),
    accumulate=2,
    clip_norm=0.5,
  )
  if mesh is None:
    return dj.simulate(method, workers=PROCESSES * DEVICES), params
  return dj.distribute(method, mesh), params


def train_pipeline(run, params):
  """As `train`; every process feeds all rows. Then what was in flight."""
  key, out = jax.random.key(7), {}
  state = run.init(key, params)
  for step in range(STEPS):
    batch = petra_networks.batches(2, seed=1 + step)
    state, metrics = run.step(state, run.put(batch), key)
    out |= {f"{k}_{step}": np.asarray(x) for k, x in metrics.items()}
  for when in ("before", "after"):
    for path, x in jax.tree_util.tree_leaves_with_path(run.params(state)):
      out[f"{when}{jax.tree_util.keystr(path)}"] = np.asarray(x)
    state = run.drain(state, key)
  return out


def child(folder):
  """One process: started by the test below, not by pytest."""
  from distrain_jax import spmd

  spmd.use_cpu_devices(DEVICES)
  spmd.join_processes()
  mesh = spmd.make_mesh({"data": -1})
  assert mesh.size == PROCESSES * DEVICES
  assert spmd.spans_processes(mesh)
  me, share = jax.process_index(), ROWS // PROCESSES
  rows = slice(me * share, (me + 1) * share)
  for name in METHODS:
    out = train(make_run(name, mesh), rows)
    np.savez(pathlib.Path(folder) / f"{name}_{me}.npz", **out)
  out = train_pipeline(*make_pipeline(spmd.make_mesh({"stage": -1})))
  np.savez(pathlib.Path(folder) / f"petra_{me}.npz", **out)


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def launch(folder):
  """Exit codes and outputs of all processes; none is left behind."""
  env = os.environ | {
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
    "JAX_NUM_PROCESSES": str(PROCESSES),
    "PYTHONPATH": os.pathsep.join(
      [str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")]
    ),
  }
  env.pop("XLA_FLAGS", None)
  children, logs = [], []
  try:
    for i in range(PROCESSES):
      logs.append(pathlib.Path(folder) / f"log_{i}")
      with logs[-1].open("w") as log:
        children.append(
          subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )
    for process in children:
      process.wait(timeout=900)
  except subprocess.TimeoutExpired:
    pass  # the codes and logs say which one hung
  finally:
    for process in children:
      process.kill()
      process.wait()
  codes = [process.returncode for process in children]
  return codes, "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  for _ in range(3):
    codes, output = launch(folder)
    lost = ("address already in use", "failed to add port")
    taken = any(words in output.lower() for words in lost)
    if not taken:  # else someone else got the port first: once more
      break
  assert codes == [0] * PROCESSES, output
  load = lambda name, i: dict(np.load(folder / f"{name}_{i}.npz"))
  return {name: [load(name, i) for i in range(PROCESSES)] for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_all_processes_hold_the_same_numbers(name, results):
  first, second = results[name]
  assert first.keys() == second.keys()
  for k in first:
    np.testing.assert_array_equal(first[k], second[k])


@pytest.mark.parametrize("name", ALL)
def test_two_processes_equal_one_device(name, results):
  expected = train(make_run(name)) if name in METHODS else None
  if expected is None:
    expected = train_pipeline(*make_pipeline())
  assert expected.keys() == results[name][0].keys()
  for k, x in expected.items():
    np.testing.assert_allclose(results[name][0][k], x, rtol=1e-5, atol=1e-6)


def test_members_meet_across_processes(results):
  """Those that train alone end elsewhere, so what is compared has travelled."""
  shared = {"accumulate": 2, "clip_norm": 0.5}
  alone = dj.ensemble(loss_fn, optax.adamw(0.01), **on_data, **shared)
  apart = train(dj.simulate(alone, workers=PROCESSES * DEVICES))
  for name in ("wash", "papa", "dart"):
    for k in ("w_of_each", "v_of_each"):
      difference = np.abs(results[name][0][k] - apart[k]).max()
      assert difference > 1e-3, (name, k, difference)


if __name__ == "__main__":
  child(sys.argv[1])
