"""Devices that are not there, to compile for: TPU slices and GPU hosts by name.

`v5e:2x4`, `v6e:16x16`, `v5p:4x4x4`, `tpu7x:2x2x2` are slices by their chips
along each dimension (a TPU7x chip is two devices); `h100:8` is one host of
eight GPUs and `h100:2x8` two. The compilers come with the extra `aot`.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies as jax_topologies
from jax.sharding import Mesh

from distrain_jax import spmd
from distrain_jax.inspect import hardware, links

INSTALL = "pip install 'distrain-jax[aot]'"
TOOLKIT = pathlib.Path("/usr/local/cuda")


class Family(NamedTuple):
  """The shapes that a kind of chip comes in."""

  dims: tuple[int, ...]  # how many numbers a shape may have
  largest: tuple[int, ...]  # of each, in ascending order
  chips: int  # in all
  examples: tuple[str, ...]


FAMILIES: dict[str, Family] = {
  "v5e": Family((2,), (16, 16), 256, ("v5e:2x4", "v5e:16x16")),
  "v6e": Family((2,), (16, 16), 256, ("v6e:2x4", "v6e:4x4")),
  # The largest slice of a pod that Cloud TPU schedules.
  "v5p": Family((3,), (16, 16, 24), 6144, ("v5p:2x2x2", "v5p:4x4x4")),
  # A pod, https://docs.cloud.google.com/tpu/docs/tpu7x
  "tpu7x": Family((3,), (16, 24, 24), 9216, ("tpu7x:2x2x1", "tpu7x:2x2x2")),
  # GPUs a host, or hosts x GPUs: the second number is one NVLink domain.
  "h100": Family((1, 2), (128, 8), 1024, ("h100:8", "h100:2x8")),
}


class Topology(NamedTuple):
  """Devices to compile for, or attached ones, and what they can do."""

  name: str
  platform: str  # "tpu" or "cuda"
  chip: hardware.Chip  # of each device
  devices: tuple[Any, ...]
  shape: tuple[int, ...]  # chips along each dimension; hosts x GPUs
  hosts: int


@functools.cache
def topology(name: str) -> Topology:
  """Devices by name; they compile programs and run none.

  Starts no backend, and works beside one that runs.

  Args:
    name: e.g. `v5e:2x4`, `v5p:4x4x4`, `tpu7x:2x2x2`, `h100:8`, `h100:2x8`.

  Raises:
    ValueError: for an unknown kind of chip or a shape that it does not have.
    ImportError: if the compiler is not installed, with the command.
  """
  family, shape = _parsed(name)
  chip = hardware.CHIPS[family]
  if family == "h100":
    devices, name = _gpus(name, shape), _named(chip, shape)
    return Topology(name, "cuda", chip, devices, shape, hosts=shape[0])
  devices = _tpus(name, shape)
  hosts = len({d.process_index for d in devices})
  return Topology(name, "tpu", chip, devices, shape, hosts)


def mesh(name: str, axes: Mapping[str, int]) -> Mesh:
  """A mesh of a topology's devices, in an order that suits its links.

  Args:
    name: as `topology` takes it.
    axes: as `spmd.make_mesh`: name -> size; one may be -1: all that are left.

  Raises:
    ValueError, ImportError: as `topology` and `spmd.make_mesh`.
  """
  return spmd.make_mesh(axes, devices=topology(name).devices)


def of(where: Any) -> Topology | None:
  """The topology of devices or of a mesh of them, attached or ahead of time.

  Its name and shape are those of the smallest box around them.

  Returns:
    None for chips that `hardware` does not know, such as CPUs.
  """
  if isinstance(where, Mesh):
    where = where.devices.flat
  devices = tuple(where)
  chip = hardware.of_device(devices[0]) if devices else None
  if chip is None:
    return None
  if chip.name == "h100":
    # By NVLink domain: one host may run several processes.
    hosts = len(set(links.domains(devices)))
    shape = (hosts, len(devices) // hosts)
    return Topology(_named(chip, shape), "cuda", chip, devices, shape, hosts)
  dims = FAMILIES[chip.name].dims[0]
  along = list(zip(*(d.coords for d in devices), strict=True))[:dims]
  shape = tuple(max(c) - min(c) + 1 for c in along)
  hosts = len({d.process_index for d in devices})
  return Topology(_named(chip, shape), "tpu", chip, devices, shape, hosts)


def _named(chip, shape) -> str:
  if chip.name == "h100" and shape[0] == 1:
    shape = shape[1:]
  return f"{chip.name}:{'x'.join(map(str, shape))}"


def _parsed(name: str) -> tuple[str, tuple[int, ...]]:
  """'h100:8' -> ('h100', (1, 8)), checked."""
  family, _, rest = str(name).partition(":")
  if family not in FAMILIES:
    near = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    known = "; ".join(
      f"{k}, e.g. {f.examples[-1]}" for k, f in FAMILIES.items()
    )
    raise ValueError(
      f"topology {name!r}: {family!r} is no chip that can be compiled for. "
      f"{hint}Those that can: {known}."
    )
  rule = FAMILIES[family]
  numbers = r"[1-9]\d*"
  if not re.fullmatch(f"{numbers}(x{numbers})*", rest):
    raise _bad_shape(name, "a shape is numbers from 1 with x between them")
  shape = tuple(int(size) for size in rest.split("x"))
  if len(shape) not in rule.dims:
    dims = " or ".join(map(str, rule.dims))
    raise _bad_shape(
      name, f"a shape of {family} has {dims} numbers, not {len(shape)}"
    )
  if family == "h100":
    hosts, gpus = (1, *shape)[-2:]
    if gpus > 8:
      raise _bad_shape(name, "a host has at most 8 GPUs: write hosts x GPUs")
    shape = (hosts, gpus)
  small = zip(sorted(shape), sorted(rule.largest), strict=True)
  if math.prod(shape) > rule.chips or any(n > most for n, most in small):
    most = "x".join(map(str, rule.largest))
    raise _bad_shape(
      name, f"the largest is {most}, {rule.chips} chips; this is larger"
    )
  return family, shape


def _bad_shape(name: str, why: str) -> ValueError:
  rule = FAMILIES[name.partition(":")[0]]
  return ValueError(
    f"topology {name!r}: {why}. For example {' or '.join(rule.examples)}."
  )


def _tpus(name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
  _need(_has_libtpu(), name, "libtpu, the TPU compiler,")
  # No metadata server to ask for the machine's own topology, and no TPU that
  # two processes could fight over: each may load libtpu.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  options = {}
  if math.prod(shape) == 1:  # part of a host, which has 2x2 chips
    options["chips_per_host_bounds"] = (1, 1, 1)
  return _asked(name, platform="tpu", topology_name=name, **options)


def _gpus(name: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
  _need(_has_cuda_plugin(), name, "JAX's CUDA plugin")
  # Without it XLA fails at the end of a compilation, or ends the process.
  _need(_has_ptxas(), name, "ptxas, the assembler of the CUDA toolkit,")
  hosts, gpus = shape
  request = {
    "platform": "cuda",
    "topology_name": "h100",
    "target_config": H100,
    "topology": f"{hosts}x1x{gpus}",  # a host is an NVLink domain of its own
  }
  with _without_cuda_check():
    try:
      return _asked(name, **request)
    except NotImplementedError:  # it was refused when JAX started
      version = 12 if _has_module("jax_cuda12_plugin") else 13
      importlib.import_module(f"jax_plugins.xla_cuda{version}").initialize()
      return _asked(name, **request)


@contextlib.contextmanager
def _without_cuda_check():
  """Lets the plugin register where there is no CUDA to run programs on."""
  flag = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
  before = os.environ.get(flag)
  os.environ[flag] = "1"
  try:
    yield
  finally:
    del os.environ[flag]
    if before is not None:
      os.environ[flag] = before


def _asked(name: str, **request) -> tuple[Any, ...]:
  try:
    return tuple(jax_topologies.get_topology_desc(**request).devices)
  except jax.errors.JaxRuntimeError as error:
    said = str(error).splitlines()[0]
    if "divisible" in said:
      said = "a host has 2x2 chips: the first two numbers are even"
    raise _bad_shape(name, f"the compiler refuses it ({said})") from error


def _need(there: bool, name: str, what: str) -> None:
  if not there:
    raise ImportError(
      f"topology {name!r}: {what} is not installed. To compile for hardware "
      f"that is not there: {INSTALL}"
    )


def _has_libtpu() -> bool:
  return "TPU_LIBRARY_PATH" in os.environ or _has_module("libtpu")


def _has_cuda_plugin() -> bool:
  return any(_has_module(f"jax_cuda{v}_plugin") for v in (12, 13))


def _has_ptxas() -> bool:
  """Where XLA looks for it: pip's packages, PATH, and the toolkit's home."""
  spec = importlib.util.find_spec("nvidia")
  roots = [] if spec is None else spec.submodule_search_locations or []
  places = [
    pathlib.Path(root, package, "bin", "ptxas")
    for root in roots
    for package in ("cuda_nvcc", "cu13")
  ]
  places.append(TOOLKIT / "bin" / "ptxas")
  return shutil.which("ptxas") is not None or any(p.exists() for p in places)


def _has_module(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


# XLA's description of an H100 SXM (a GpuTargetConfigProto), as the device
# reports it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
