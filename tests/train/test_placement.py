"""Parameters by their names, and rows by process."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrain_jax.train import placement

NAMES = {
  "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
  "down": {"kernel": ("mlp", "embed")},
}
SHAPES = {
  "up": {
    "kernel": jax.ShapeDtypeStruct((6, 8), np.float32),
    "bias": jax.ShapeDtypeStruct((8,), np.float32),
  },
  "down": {"kernel": jax.ShapeDtypeStruct((8, 6), np.float32)},
}


def specs(rules, mesh):
  shardings = placement.shardings(rules, NAMES, SHAPES, mesh)
  return jax.tree.map(lambda x: x.spec, shardings)


def test_a_rule_shards_every_axis_of_its_name(mesh):
  assert specs({"mlp": "tensor"}, mesh(2, tensor=4)) == {
    "up": {"kernel": P(None, "tensor"), "bias": P("tensor")},
    "down": {"kernel": P("tensor", None)},
  }


def test_a_rule_for_a_kind_is_one_for_its_numbers_but_those_of_their_own(mesh):
  names = {k: (f"mlp_{k}", "embed") for k in range(3)}
  shapes = {k: jax.ShapeDtypeStruct((8, 8), np.float32) for k in range(3)}
  rules = {"mlp": "tensor", "mlp_1": "fsdp"}
  found = placement.shardings(rules, names, shapes, mesh(2, tensor=2, fsdp=2))
  wanted = {0: "tensor", 1: "fsdp", 2: "tensor"}
  assert {k: x.spec for k, x in found.items()} == {
    k: P(axis, None) for k, axis in wanted.items()
  }


def test_without_rules_everything_is_replicated(mesh):
  for spec in jax.tree.leaves(
    specs({}, mesh(4)), is_leaf=lambda x: isinstance(x, P)
  ):
    assert not any(spec)


@pytest.mark.parametrize(
  "rules, message",
  [
    ({"mpl": "tensor"}, r"sharding\.mpl: no parameter.*Did you mean 'mlp'"),
    (
      {"mlp": "tensor", "embed": "tensor"},
      r"puts two axes of params\['down'\]\['kernel'\], \(8, 6\)",
    ),
    (
      {"embed": "tensor"},
      r"embed='tensor' cuts params\['down'\]\['kernel'\], \(8, 6\) of "
      r"\('mlp', 'embed'\), into 4 unequal parts",
    ),
  ],
)
def test_a_rule_that_no_parameter_can_follow_is_refused(rules, message, mesh):
  with pytest.raises(ValueError, match=message):
    specs(rules, mesh(2, tensor=4))


class Mesh:
  """Devices of several processes, of which there is only one here."""

  def __init__(self, processes, **shape):
    self.axis_names, self.shape = tuple(shape), shape
    make = np.vectorize(lambda p: SimpleNamespace(process_index=p))
    self.devices = make(np.reshape(processes, tuple(shape.values())))


def rows(monkeypatch, mesh, process):
  monkeypatch.setattr(jax, "process_index", lambda: process)
  share = placement.process_rows(mesh, "data")
  return share["process_index"], share["process_count"]


@pytest.mark.parametrize(
  "mesh, expected",
  [
    (Mesh([0, 0, 1, 1], data=4), [(0, 2), (1, 2)]),
    (Mesh([0, 1, 0, 1], data=4), [(0, 2), (1, 2)]),
    (Mesh([0, 0, 1, 1], data=2, tensor=2), [(0, 2), (1, 2)]),
    # Both hold both workers, a half of each: the same rows.
    (Mesh([0, 0, 1, 1], tensor=2, data=2), [(0, 1), (0, 1)]),
    # Four processes, two to a worker.
    (Mesh([0, 1, 2, 3], data=2, tensor=2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (Mesh([0, 0, 1, 1], data=1, tensor=4), [(0, 1), (0, 1)]),
  ],
)
def test_processes_with_the_same_workers_make_the_same_rows(
  mesh, expected, monkeypatch
):
  got = [rows(monkeypatch, mesh, process) for process in range(len(expected))]
  assert got == expected


def test_workers_that_processes_share_in_part_are_refused(monkeypatch):
  mesh = Mesh([0, 0, 0, 1, 1, 1], data=3, tensor=2)
  with pytest.raises(ValueError, match="some processes share a part of their"):
    rows(monkeypatch, mesh, 0)
