"""The report of who holds what, against masks in plain loops."""

import jax
import numpy as np
import pytest
from sdp import toys

from distrain_jax.methods.sdp import load
from distrain_jax.methods.sdp.assignments import Holding

pytestmark = pytest.mark.core

N = 8
ONE = {"w": ("hidden",)}, {"w": np.zeros(N, np.float32)}
GAPS = {1: 0, 2: 0.146, 3: 0.352, 4: 0.573, 5: 0.767, 6: 0.905, 8: 1}
BLOCKS = {  # shapes of residual blocks beside a stem
  "stem": {"w": np.zeros((4, 2), np.float32)},
  **{
    f"block_{i}": {"a": np.zeros((4, width)), "b": np.zeros((width, 4))}
    for i, width in enumerate((1, 1, 2, 2, 4, 4, 8, 8))
  },
}


def of_toy(level, **options):
  shapes = toys.float32(toys.start())
  options = {"coverage": toys.LEVELS[level], "level": level, **options}
  return load(toys.NAMES, shapes, workers=toys.N, **options)


def of_blocks(**options):
  """One name in place of each axis: no unit is sampled, only whole blocks."""
  names = jax.tree.map(lambda x: ("embed",) * x.ndim, BLOCKS)
  keys = [k for k in BLOCKS if k != "stem"]
  return load(names, BLOCKS, level="block", blocks=keys, **options)


@pytest.mark.parametrize(("holders", "gap"), GAPS.items())
def test_cyclic_windows_have_the_gaps_and_overlaps_of_theory(holders, gap):
  found = load(*ONE, workers=N, coverage=holders / N)
  assert round(found.gap, 3) == gap
  assert found.connected == (holders > 1)
  assert found.holders == (holders, holders)
  for i in range(N):
    for j in range(N):
      d = min(abs(i - j), N - abs(i - j))
      both = max(0, holders - d) + max(0, holders - (N - d))
      assert found.overlap[i, j] == (both if d else holders) / N


@pytest.mark.parametrize("level", toys.LEVELS)
def test_bytes_and_overlaps_are_those_of_the_masks(level):
  found = of_toy(level)
  masks = toys.whole_masks(level, toys.masks(level))
  flat = np.concatenate([m.reshape(toys.N, -1) for m in masks.values()], 1)
  sampled = ~flat.all(0)
  assert found.whole == 4 * flat.shape[1]
  assert found.shared == 4 * (~sampled).sum()
  np.testing.assert_array_equal(found.bytes, 4 * flat.sum(1))
  np.testing.assert_array_equal(found.sampled, 4 * flat[:, sampled].sum(1))
  both = flat[:, sampled] @ flat[:, sampled].T / sampled.sum()
  np.testing.assert_allclose(found.overlap, both, rtol=1e-12)
  count = flat[:, sampled].sum(0)
  assert found.holders == (count.min(), count.max())
  assert found.connected and found.imbalance == 1


def test_units_are_counted_by_family():
  layers, units = toys.L, toys.M
  assert of_toy("neuron").total == {"mlp": units}  # alike in all layers
  shuffled = of_toy("neuron", assignment="shuffled")
  assert shuffled.total == {"mlp": layers * units}
  assert shuffled.units["mlp"].tolist() == [layers * units // 2] * toys.N
  both = of_toy("both")
  assert both.total == {"mlp": layers * units, "layers": layers}
  assert both.units["mlp"].tolist() == [layers * units // 4] * toys.N
  assert both.units["layers"].tolist() == [layers // 2] * toys.N


def test_whole_blocks_of_many_sizes_load_workers_unevenly():
  cyclic = of_blocks(workers=4, coverage=0.5)
  balanced = of_blocks(workers=4, coverage=0.5, assignment="balanced")
  for found in (cyclic, balanced):
    assert found.shared == 4 * 8
    assert found.whole == found.shared + 8 * 8 * (1 + 1 + 2 + 2 + 4 + 4 + 8 + 8)
    assert found.sampled.sum() == 2 * (found.whole - found.shared)
    assert found.holders == (2, 2)
    assert found.units["blocks"].sum() == 2 * found.total["blocks"] == 16
  assert cyclic.units["blocks"].tolist() == [4, 4, 4, 4]
  assert balanced.imbalance < cyclic.imbalance
  assert cyclic.imbalance == cyclic.bytes.max() / cyclic.bytes.mean()


def test_a_worker_with_nothing_is_apart():
  def few(family, layers, units, workers):
    del family
    held = np.array([[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [8] * 4])
    owners = np.array([0, 0, 0, 0, 1, 1, 2, 2])[:, None]
    lanes = np.zeros((workers, layers), int)
    return Holding((layers, units), lanes, held[:, None], owners)

  found = load(*ONE, workers=4, assignment=few)
  assert found.sampled.tolist() == [16, 16, 16, 0]
  assert found.holders == (1, 2)
  assert (found.connected, found.gap) == (False, 0.0)


def test_bytes_are_those_of_the_dtype_that_workers_hold():
  plain, low = (of_toy("block", param_dtype=d) for d in (None, "bfloat16"))
  np.testing.assert_array_equal(plain.bytes, 2 * low.bytes)
  assert plain.whole == 2 * low.whole


def test_shared_families_are_no_part_of_the_tables():
  names = {"a": ("embed", "mlp"), "b": ("heads", "embed")}
  shapes = {"a": np.zeros((2, 8)), "b": np.zeros((4, 2))}
  found = load(names, shapes, workers=4, shared=("heads",))
  assert list(found.units) == ["mlp"]
  assert found.shared == 8 * 8


def test_it_prints_a_row_a_worker_or_one_for_all():
  text = str(of_toy("block"))
  assert "each of 4" in text and "2 of 4" in text
  assert "Connected, spectral gap 0.500" in text
  uneven = of_blocks(workers=4, coverage=0.5)
  lines = str(uneven._replace(flops=np.arange(4) * 1e9)).splitlines()
  assert [line.split()[0] for line in lines[2:6]] == list("0123")
  assert lines[0].split()[-1] == "FLOPs" and lines[5].endswith("3e+09")
  assert f"{uneven.bytes[3]:,}" in lines[5]
  apart = str(load(*ONE, workers=N, coverage=1 / N))
  assert "Not connected, spectral gap 0.000" in apart
  assert "none of what" in str(load(*ONE, workers=1, coverage=1.0))


def test_what_sdp_refuses_is_refused():
  with pytest.raises(ValueError, match=r"Nearest: 0\.25 or 0.375"):
    load(*ONE, workers=N, coverage=0.3)
  with pytest.raises(ValueError, match="`level` is"):
    load(*ONE, workers=N, level="channel")
