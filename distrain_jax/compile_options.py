"""XLA's compile options by chip: one table, for training and for inspection.

`distribute` gives them to every step that it compiles, attached hardware or
not. Only what both ends of the supported JAX versions accept is here, and only
what was seen to change a compiled program: 8 devices, jax 0.10.2 and 0.12.0.1,
programs of four layers; tests/test_compile_options.py sees it again. None was
timed on hardware.

What has no entry did not help: TPU7x uses its SparseCores for three kinds of
collectives by itself; v5e, which has none, makes its all-gathers async fusions
by itself, and its options for async collective fusion and data-parallel
all-reduces left these programs as they were. So did the latency hiding
scheduler on GPUs: it is on.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh


class Entry(NamedTuple):
  """Options that buy one thing, and what they cost."""

  buys: str
  costs: str
  chips: tuple[str, ...]  # names of `KINDS`, or "gpu": every GPU
  options: Mapping[str, Any]


# What JAX calls a device -> what we call its chip.
KINDS: dict[str, str] = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
  "TPU v7x": "tpu7x",
  "NVIDIA H100 80GB HBM3": "h100",
}

_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_"
_COMBINE = "combine_threshold_bytes"

OPTIONS: dict[str, Entry] = {
  "reduce-scatter and all-gather beside compute": Entry(
    buys=(
      "The SparseCores run them, while the TensorCore goes on: a synchronous "
      "collective becomes a start and a done around whatever does not need it. "
      "On v5p only all-gathers, and only in jax 0.12."
    ),
    costs="Operands and results lie in HBM; small ones stayed in VMEM.",
    chips=("v5p", "v6e"),
    options={_OFFLOAD + "reduce_scatter": True, _OFFLOAD + "all_gather": True},
  ),
  "all-reduce beside compute": Entry(
    buys=(
      "The same for all-reduces, which on v5p are what XLA makes of "
      "reduce-scatters."
    ),
    costs="The same; one that nothing runs beside gains nothing.",
    chips=("v5p", "v6e"),
    options={_OFFLOAD + "all_reduce": True},
  ),
  "all-to-all beside compute": Entry(
    buys=(
      "An all-to-all becomes a start and a done. Where reduce-scatters cannot, "
      "gradients reach their owners that way (see overlap.REDUCTIONS)."
    ),
    costs="Its buffers live from the start to the done.",
    chips=("v5e", "v5p"),
    options={"xla_tpu_enable_async_all_to_all": True},
  ),
  "gradients leave while the backward pass runs": Entry(
    buys=(
      "XLA combines collectives up to 30 MiB. A model's gradients that are "
      "smaller wait for the last of them; in parts of 8 MiB the first leave "
      "while the backward pass of other layers runs."
    ),
    costs="More and smaller collectives: each pays its latency.",
    chips=("gpu",),
    options={
      f"xla_gpu_{kind}_{_COMBINE}": 8 << 20
      for kind in ("all_reduce", "reduce_scatter", "all_gather")
    },
  ),
}


def chip_name(device: Any) -> str | None:
  """Our name of a JAX device's chip, attached or ahead of time, or None."""
  return KINDS.get(device.device_kind)


def for_chip(name: str | None) -> dict[str, Any]:
  """The options of a chip by its name in `KINDS`, or "gpu"; None: of no chip.

  Raises:
    ValueError: for another name.
  """
  if name is None:
    return {}
  known = {*KINDS.values(), "gpu"}
  if name not in known:
    raise ValueError(
      f"compile_options: {name!r} is no chip that is known here. It is one of "
      f"{', '.join(sorted(known))}."
    )
  names = {name, "gpu"} if name == "h100" else {name}
  found: dict[str, Any] = {}
  for entry in OPTIONS.values():
    if names & set(entry.chips):
      found.update(entry.options)
  return found


def for_mesh(mesh: Mesh | None) -> dict[str, Any]:
  """The options for a mesh's devices; none on CPUs and on unknown TPUs."""
  if mesh is None:
    return {}
  device = mesh.devices.flat[0]
  # JAX calls AMD's and Intel's GPUs so too; XLA takes the same options there.
  gpu = "gpu" if device.platform in ("gpu", "cuda", "rocm") else None
  return for_chip(chip_name(device) or gpu)
