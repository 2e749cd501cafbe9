"""How fast a device sends in a collective: within a fast domain, and beyond.

A domain is what the fast links join: a TPU slice, or the GPUs of one host. A
ring that leaves a domain crosses its network once in each direction, and is cut
into as many rings as members share the domain, each over its own network card.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from distrain_jax.inspect.collectives import Collective
from distrain_jax.inspect.hardware import Chip


def domains(devices: Sequence[Any]) -> list[int]:
  """The fast domain of each device, in the order of the program's mesh."""

  return [domain(device) for device in devices]


def domain(device: Any) -> int:
  """The fast domain of a device, by its number."""
  if device.platform == "gpu" and hasattr(device, "coords"):
    return device.coords[0]  # ahead of time: (host, 0, GPU)
  return getattr(device, "slice_index", None) or 0


def bandwidth(
  chip: Chip, domain_of: Sequence[int]
) -> Callable[[Collective], float]:
  """Bytes/s that a device sends in a collective, the slowest group deciding."""

  def of_group(group) -> float:
    members = Counter(domain_of[i] for i in group)
    if len(members) == 1:
      return chip.link_bandwidth
    network = chip.network_bandwidth * min(members.values())
    return min(chip.link_bandwidth, network)

  def of(collective: Collective) -> float:
    return min(
      map(of_group, collective.groups or ()), default=chip.link_bandwidth
    )

  return of
