"""The table of chips: its units, its relations, and what XLA itself knows."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax.inspect import hardware, topologies

CHIPS = hardware.CHIPS
TPUS = [name for name in CHIPS if name != "h100"]
# Google's "bidirectional inter-chip interconnect bandwidth per chip" and the
# axes of its torus, from the same pages as the rest: bytes/s, axes, devices.
ICI = {
  "v5e": (400e9, 2, 1),
  "v5p": (1200e9, 3, 1),
  "v6e": (800e9, 2, 1),
  "tpu7x": (1200e9, 3, 2),
}


@pytest.mark.parametrize("name", CHIPS)
def test_numbers_are_in_flops_and_bytes_per_second(name):
  chip = CHIPS[name]
  assert chip.name == name
  assert all(1e13 < peak < 1e16 for peak in chip.flops.values())
  assert 8 << 30 < chip.memory_bytes < 256 << 30
  # Each is slower than the one before; programs of any intensity exist
  # between them.
  assert 1e2 < chip.flops["bf16"] / chip.memory_bandwidth < 1e3
  assert chip.memory_bandwidth > 4 * chip.link_bandwidth
  assert chip.link_bandwidth >= chip.network_bandwidth > 1e10


@pytest.mark.parametrize("name", CHIPS)
def test_every_number_has_a_source(name):
  chip = CHIPS[name]
  numbers = set(chip._fields) - {"name", "source"}
  assert numbers <= set(chip.source)
  assert all(url.startswith("https://") for url in chip.source.values())


@pytest.mark.parametrize("name", TPUS)
def test_links_of_all_axes_are_nine_tenths_of_what_google_states(name):
  stated, axes, devices = ICI[name]
  sent = axes * devices * CHIPS[name].link_bandwidth
  assert sent == pytest.approx(0.9 * stated / 2, rel=1e-3)


def test_two_devices_of_a_tpu7x_are_its_chip():
  chip = CHIPS["tpu7x"]
  assert 2 * chip.peak("bf16") == 2307e12
  assert 2 * chip.memory_bytes == 192 << 30
  # One axis of a v5p and of a 7x have the same links.
  assert 2 * chip.link_bandwidth == CHIPS["v5p"].link_bandwidth
  assert len(topologies.topology("tpu7x:2x2x1").devices) == 2 * 4


def test_peaks_of_dtypes_relate_as_the_matrix_units_do():
  for name in TPUS:  # operands are rounded to bf16
    assert CHIPS[name].peak("f32") == CHIPS[name].peak("bf16")
  h100 = CHIPS["h100"]
  assert h100.peak("bf16") == pytest.approx(2 * h100.peak("f32"), rel=1e-3)
  assert h100.peak("f8e4m3fn") == pytest.approx(2 * h100.peak("f16"), rel=1e-3)
  assert h100.peak("f64") < h100.peak("f32") / 5
  for chip in CHIPS.values():
    assert chip.peak("s8") >= chip.peak("bf16")


def test_a_dtype_that_is_not_in_the_table_is_taken_as_its_relative():
  v5e, h100 = CHIPS["v5e"], CHIPS["h100"]
  assert v5e.peak("f8e5m2") == v5e.peak("bf16")
  assert h100.peak("f8e5m2") == h100.peak("f8e4m3fn")
  assert v5e.peak("u4") == v5e.peak("s8")
  assert v5e.peak("f64") == v5e.peak("s32") == v5e.peak("f32")


def test_devices_are_known_by_their_kind():
  kind = lambda name: types.SimpleNamespace(device_kind=name)
  attached = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
  }
  for name, chip in attached.items():
    assert hardware.of_device(kind(name)) is CHIPS[chip]
  assert hardware.of_device(kind("NVIDIA A10G")) is None
  assert hardware.of_device(jax.devices()[0]) is None


@pytest.mark.core
@pytest.mark.parametrize(
  "name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
)
def test_the_compiler_knows_the_same_memory(name):
  mesh = topologies.mesh(name, {"data": -1})

  def fits(share):
    rows = int(share * topologies.topology(name).chip.memory_bytes) >> 20
    where = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct(
      (mesh.size, rows, 1024, 1024), "int8", sharding=where
    )
    jax.jit(lambda x: x + jnp.int8(1), donate_argnums=0).lower(x).compile()

  fits(0.97)
  with pytest.raises(jax.errors.JaxRuntimeError, match=r"[Oo]ut of memory"):
    fits(1.02)


def test_xlas_description_of_an_h100_agrees():
  said = dict(re.findall(r"(\w+): ([\d.]+)", topologies.H100))
  chip = CHIPS["h100"]
  assert int(said["device_memory_size"]) == chip.memory_bytes
  bandwidth = float(said["memory_bandwidth"])
  assert bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.01)
