"""Eight simulated devices for every test, and settings that let bugs show."""

import os

# Before JAX starts: the suite is judged on its own devices, whatever is there.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from distrain_jax import spmd

# Before a backend starts, which none of the above does.
# Code that runs a few steps need not be fast, but compile fast. XLA's own
# passes, which tests of compiled programs read, stay as they are.
FLAGS = ["--xla_backend_optimization_level=1"]
if jax.__version_info__ < (0, 11):  # XLA stops at a flag that it does not know
  FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
  ]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
spmd.use_cpu_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def mesh():
  """Meshes by size: mesh(4) has four workers on the axis `data`."""

  def make(workers, **others):
    sizes = {"data": workers, **others}
    count = 1
    for size in sizes.values():
      count *= size
    return spmd.make_mesh(sizes, jax.devices()[:count])

  return make
