"""Bandwidths of groups inside a fast domain and across hosts."""

from types import SimpleNamespace

import pytest

from distrain_jax.inspect import links, topologies
from distrain_jax.inspect.collectives import Collective
from distrain_jax.inspect.hardware import CHIPS

H100 = CHIPS["h100"]


def among(*groups):
  return Collective(
    "c", "all-reduce", "f32", 8, groups, len(groups[0]), 1.0, ""
  )


@pytest.mark.parametrize(
  ("groups", "expected"),
  [
    ((range(8), range(8, 16)), H100.link_bandwidth),
    # Across hosts a ring for each member of a host, over a card of its own.
    ((range(16),), min(H100.link_bandwidth, 8 * H100.network_bandwidth)),
    (((0, 1, 8, 9),), 2 * H100.network_bandwidth),
    (((0, 8), (1, 9)), H100.network_bandwidth),
    (((0, 1), (1, 9)), H100.network_bandwidth),  # the slowest decides
  ],
)
def test_two_hosts_of_gpus(groups, expected):
  domains = links.domains(topologies.topology("h100:2x8").devices)
  bandwidth = links.bandwidth(H100, domains)
  assert bandwidth(among(*map(tuple, groups))) == expected


def test_a_slice_of_tpus_is_one_domain_on_any_number_of_hosts():
  devices = topologies.topology("v5e:4x4").devices
  assert len({d.process_index for d in devices}) > 1
  assert len(set(links.domains(devices))) == 1


def test_attached_gpus_are_told_apart_by_their_host():
  gpu = lambda host: SimpleNamespace(platform="gpu", slice_index=host)
  assert links.domains([gpu(0), gpu(0), gpu(1)]) == [0, 0, 1]
