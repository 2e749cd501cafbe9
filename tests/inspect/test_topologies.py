"""Topologies by name: what they are, and what is said of those that are not."""

import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax.inspect import hardware, topologies

pytestmark = pytest.mark.core

# name -> devices, hosts, kind: the forms that are promised.
NAMES = {
  "v5e:2x4": (8, 2, "TPU v5 lite"),
  "v5e:16x16": (256, 64, "TPU v5 lite"),
  "v5p:4x4x4": (64, 16, "TPU v5"),
  "v6e:4x4": (16, 4, "TPU v6 lite"),
  "v6e:1x1": (1, 1, "TPU v6 lite"),
  "tpu7x:2x2x2": (16, 2, "TPU7x"),
  "h100:8": (8, 1, "NVIDIA H100 80GB HBM3"),
  "h100:1x8": (8, 1, "NVIDIA H100 80GB HBM3"),
  "h100:2x8": (16, 2, "NVIDIA H100 80GB HBM3"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_its_devices_beside_a_running_backend(name):
  assert jax.default_backend() == "cpu"
  count, hosts, kind = NAMES[name]
  found = topologies.topology(name)
  assert len(found.devices) == count and found.hosts == hosts
  assert {d.device_kind for d in found.devices} == {kind}
  assert len({d.process_index for d in found.devices}) == hosts
  assert found.platform == ("cuda" if name.startswith("h100") else "tpu")
  assert found.chip is hardware.CHIPS[name.partition(":")[0]]
  assert topologies.topology(name) is found


@pytest.mark.parametrize("name", NAMES)
def test_devices_and_meshes_are_recognised(name):
  found = topologies.topology(name)
  mesh = topologies.mesh(name, {"data": -1})
  assert set(mesh.devices.flat) == set(found.devices)
  assert topologies.of(found.devices) == found
  again = topologies.of(mesh)
  assert again._replace(devices=found.devices) == found


def test_a_part_of_a_topology_is_a_smaller_one():
  mesh = topologies.mesh("v5e:4x4", {"data": -1, "tensor": 4})
  part = topologies.of(mesh.devices[:2].ravel())
  assert (part.name, sorted(part.shape)) == ("v5e:4x2", [2, 4])
  pair = topologies.of(topologies.topology("h100:2x8").devices[:8])
  assert (pair.name, pair.hosts) == ("h100:8", 1)


def test_attached_devices_have_their_chip_and_cpus_have_none():
  assert topologies.of(jax.devices()) is None
  assert topologies.of([]) is None
  kind = "NVIDIA H100 80GB HBM3"
  # One process a GPU, as SLURM starts them: two hosts all the same.
  gpu = functools.partial(
    types.SimpleNamespace, device_kind=kind, platform="gpu"
  )
  attached = [gpu(process_index=i, slice_index=i // 8) for i in range(16)]
  found = topologies.of(attached)
  assert (found.name, found.hosts, found.chip.name) == ("h100:2x8", 2, "h100")


def test_meshes_have_automatic_axes_and_neighbours_beside_each_other():
  mesh = topologies.mesh("v5e:4x4", {"data": -1})
  assert mesh.axis_types == (AxisType.Auto,)
  places = np.array([d.coords for d in mesh.devices])
  steps = np.abs(places - np.roll(places, -1, axis=0)).sum(1)
  # A ring that goes only from chip to neighbouring chip.
  np.testing.assert_array_equal(steps, 1)
  two = topologies.mesh("tpu7x:2x2x2", {"data": -1, "tensor": 2})
  assert dict(two.shape) == {"data": 8, "tensor": 2}
  with pytest.raises(ValueError, match=r"needs 3 devices.*8 \(tpu\)"):
    topologies.mesh("v5e:2x4", {"data": 3})


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:2x8"])
def test_programs_compile_for_devices_that_are_not_there(name):
  mesh = topologies.mesh(name, {"data": -1})
  f = jax.shard_map(
    lambda x: jax.lax.psum(jnp.tanh(x @ x.T), "data"),
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P(),
    check_vma=False,
  )
  where = NamedSharding(mesh, P("data"))
  x = jax.ShapeDtypeStruct((mesh.size * 128, 128), jnp.float32, sharding=where)
  text = jax.jit(f).lower(x).compile().as_text()
  assert "all-reduce" in text


@pytest.mark.parametrize(
  ("name", "says"),
  [
    (
      "v7x:2x2x2",
      "'v7x' is no chip.*Did you mean 'tpu7x'.*v5e, e.g. v5e:16x16",
    ),
    ("a10g:4", "'a10g' is no chip that can be compiled for"),
    (8, "'8' is no chip"),
    ("v5e", "numbers from 1 with x between.*For example v5e:2x4 or v5e:16x16"),
    ("v5e:0x4", "numbers from 1"),
    ("v5e:2X4", "numbers from 1"),
    ("v5e:2x2x2", "a shape of v5e has 2 numbers, not 3.*v5e:2x4"),
    ("v5p:4x4", "a shape of v5p has 3 numbers, not 2.*v5p:4x4x4"),
    ("tpu7x:8", "a shape of tpu7x has 3 numbers, not 1"),
    ("h100:2x2x8", "a shape of h100 has 1 or 2 numbers, not 3"),
    ("v6e:32x8", "the largest is 16x16, 256 chips; this is larger"),
    ("tpu7x:16x24x25", "the largest is 16x24x24, 9216 chips"),
    ("h100:16", "at most 8 GPUs: write hosts x GPUs.*h100:8 or h100:2x8"),
    ("h100:200x8", "the largest is 128x8, 1024 chips"),
    ("v5e:3x4", "the compiler refuses it .a host has 2x2 chips"),
  ],
)
def test_a_name_that_means_nothing_is_refused_with_examples(name, says):
  with pytest.raises(ValueError, match=says) as e:
    topologies.topology(name)
  assert str(e.value).startswith(f"topology {name!r}: ")


def test_what_else_the_compiler_refuses_is_passed_on(monkeypatch):
  def refuse(**request):
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such thing\ntrace")

  monkeypatch.setattr(topologies.jax_topologies, "get_topology_desc", refuse)
  says = r"the compiler refuses it \(INVALID_ARGUMENT: no such thing\)\. For"
  with pytest.raises(ValueError, match=says):
    topologies.topology("v6e:6x6")


@pytest.mark.parametrize(
  ("name", "lookup", "what"),
  [
    ("v5p:2x2x4", "_has_libtpu", "libtpu, the TPU compiler,"),
    ("h100:6", "_has_cuda_plugin", "JAX's CUDA plugin"),
    ("h100:7", "_has_ptxas", "ptxas, the assembler of the CUDA toolkit,"),
  ],
)
def test_a_missing_compiler_is_named_with_the_command_that_gets_it(
  name, lookup, what, monkeypatch
):
  monkeypatch.setattr(topologies, lookup, lambda: False)
  with pytest.raises(ImportError, match=f"{what} is not installed") as e:
    topologies.topology(name)
  assert "pip install 'distrain-jax[aot]'" in str(e.value)
  monkeypatch.undo()
  assert topologies.topology(name).devices  # a failure is not remembered


def test_compilers_are_looked_for_where_xla_finds_them(monkeypatch, tmp_path):
  modules = {}
  find = lambda name: modules.get(name)
  monkeypatch.setattr(topologies.importlib.util, "find_spec", find)
  monkeypatch.setattr(topologies.shutil, "which", lambda name: None)
  monkeypatch.setattr(topologies, "TOOLKIT", tmp_path / "cuda")
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  assert not topologies._has_libtpu()
  assert not topologies._has_cuda_plugin()
  assert not topologies._has_ptxas()
  ptxas = tmp_path / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
  ptxas.parent.mkdir(parents=True)
  package = types.SimpleNamespace(
    submodule_search_locations=[str(tmp_path / "nvidia")]
  )
  modules.update(nvidia=package, libtpu=1, jax_cuda13_plugin=1)
  assert not topologies._has_ptxas()
  ptxas.touch()
  assert topologies._has_ptxas()
  assert topologies._has_libtpu() and topologies._has_cuda_plugin()


ALONE = """
import os, sys
from distrain_jax.inspect import topologies
from jax._src import xla_bridge
assert len(topologies.topology("v5e:2x4").devices) == 8
assert len(topologies.topology("h100:8").devices) == 8
assert not xla_bridge.backends_are_initialized()
assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
print("made", flush=True)
sys.stdin.read()
"""


def test_two_processes_at_once_and_no_backend_is_started():
  def start():
    return subprocess.Popen(
      [sys.executable, "-c", ALONE],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )

  with start() as one, start() as two:
    assert one.stdout.readline() == "made\n"
    assert two.stdout.readline() == "made\n"  # while the first holds libtpu
    for process in (one, two):
      process.communicate(timeout=60)
      assert process.returncode == 0


@pytest.mark.parametrize("first", ["jax.devices()", "pass"])
def test_gpus_need_no_cuda_whether_jax_runs_or_not(first):
  """In a process that has not said JAX_PLATFORMS=cpu, as a notebook's."""
  environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  script = (
    f"import jax; {first}; from distrain_jax.inspect import topologies as t; "
    "print(t.topology('h100:2x8').hosts)"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.split() == ["2"]
