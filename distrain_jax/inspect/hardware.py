"""What chips can do at best: peak FLOP/s, bandwidths, memory, with sources.

All numbers are per JAX device. On a TPU7x a chip is two devices; on the other
TPUs here, and on GPUs, a chip is one. They are vendors' peaks, which programs
approach and never pass: what is computed from them is a model.

`link_bandwidth` is what one device sends in a ring inside its fast domain:

- TPU: both directions of one torus axis. Google states twice the sum over all
  links of a chip (both ways), which is 100 or 50 GB/s a link and direction; we
  take the 90 and 45 that the scaling book uses. A slice that is shorter than
  the torus has no wraparound, but a ring that goes up and down its second
  dimension still uses both directions. XLA may use several axes at once, and
  is then faster than this.
- H100: NVLink, one way.

`network_bandwidth` is the same outside of that domain: for GPUs between hosts,
one 400 Gb/s adapter a GPU; TPUs of a slice never leave it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from distrain_jax import compile_options

TERA, GIGA, GIB = 1e12, 1e9, 1 << 30


class Chip(NamedTuple):
  """The peaks of one device, and where each number is published."""

  name: str
  # HLO's name of a dtype -> FLOP/s (or integer operations) of a dense matrix
  # product of such operands at JAX's default precision.
  flops: Mapping[str, float]
  memory_bandwidth: float  # bytes/s
  memory_bytes: int  # the compiler and the runtime keep a few per cent of it
  link_bandwidth: float  # bytes/s that it sends in a ring, in its fast domain
  network_bandwidth: float  # bytes/s that it sends out of that domain
  source: Mapping[str, str]  # field -> URL

  def peak(self, dtype: str) -> float:
    """FLOP/s for any dtype, by HLO's name (`bf16`, `f8e5m2`, `s32`, ...).

    What the table does not have is taken as its nearest relative: 8-bit floats
    as each other, else as bf16; integers of up to 8 bits as s8; everything
    else, emulated float64 on a TPU too, as f32, which then is an upper bound.
    """
    if dtype in self.flops:
      return self.flops[dtype]
    if dtype.startswith("f8"):
      return self.flops.get("f8e4m3fn", self.flops["bf16"])
    if dtype in ("s4", "u4", "u8", "pred"):
      return self.flops["s8"]
    return self.flops["f32"]


def of_device(device: Any) -> Chip | None:
  """The chip of a JAX device, attached or ahead of time; None: not known."""
  return CHIPS.get(compile_options.chip_name(device))


CLOUD = "https://docs.cloud.google.com/tpu/docs/"
SCALING_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
NVIDIA_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
NVIDIA_DGX = "https://www.nvidia.com/en-us/data-center/dgx-h100/"
XLA_H100 = (
  "https://github.com/openxla/xla/blob/main/xla/backends/gpu/target_config/"
  "specs/h100_sxm.txtpb"
)


def _tpu(
  name, page, *, bf16, s8, bandwidth, memory, link, devices=1, f8=None
) -> Chip:
  """From the numbers of a chip, and of a link in one direction."""
  # The matrix unit rounds f32 operands to bf16 at the default precision.
  flops = {"bf16": bf16, "f32": bf16, "f16": bf16, "s8": s8}
  if f8:
    flops["f8e4m3fn"] = f8
  ring = 2 * link / devices
  stated = dict.fromkeys(("flops", "memory_bandwidth", "memory_bytes"), page)
  links = dict.fromkeys(("link_bandwidth", "network_bandwidth"), SCALING_BOOK)
  return Chip(
    name=name,
    flops={dtype: peak / devices for dtype, peak in flops.items()},
    memory_bandwidth=bandwidth / devices,
    memory_bytes=memory // devices,
    link_bandwidth=ring,
    network_bandwidth=ring,
    source={**stated, **links, "flops.s8": SCALING_BOOK},
  )


CHIPS: dict[str, Chip] = {
  "v5e": _tpu(
    "v5e",
    CLOUD + "v5e",
    bf16=197 * TERA,
    s8=393 * TERA,  # 394 in the scaling book
    bandwidth=819 * GIGA,  # rounded to 800 GiB/s in newer editions
    memory=16 * GIB,
    link=45 * GIGA,
  ),
  "v5p": _tpu(
    "v5p",
    CLOUD + "v5p",
    bf16=459 * TERA,
    s8=918 * TERA,  # only in the scaling book
    f8=459 * TERA,
    bandwidth=2765 * GIGA,
    memory=95 * GIB,  # of 96, 1 is kept by the system
    link=90 * GIGA,
  ),
  "v6e": _tpu(
    "v6e",
    CLOUD + "v6e",
    bf16=918 * TERA,
    s8=1836 * TERA,
    f8=918 * TERA,
    bandwidth=1638 * GIGA,
    memory=32 * GIB,
    link=90 * GIGA,
  ),
  "tpu7x": _tpu(
    "tpu7x",
    CLOUD + "tpu7x",
    bf16=2307 * TERA,
    s8=4614 * TERA,  # only in the scaling book, which has f8's number
    f8=4614 * TERA,
    bandwidth=7380 * GIGA,
    memory=192 * GIB,
    link=90 * GIGA,
    devices=2,
  ),
  "h100": Chip(  # the SXM module
    name="h100",
    flops={  # NVIDIA states these with sparsity, f64 aside: halved
      "f64": 67 * TERA,  # tensor cores
      "f32": 989 * TERA / 2,  # as TF32, XLA's default
      "bf16": 1979 * TERA / 2,
      "f16": 1979 * TERA / 2,
      "f8e4m3fn": 3958 * TERA / 2,
      "s8": 3958 * TERA / 2,
    },
    memory_bandwidth=3.35 * TERA,
    memory_bytes=84_942_979_072,  # sold as 80 GB
    link_bandwidth=900 * GIGA / 2,  # stated for both ways
    network_bandwidth=400 * GIGA / 8,
    source={
      "flops": NVIDIA_H100,
      "memory_bandwidth": NVIDIA_H100,
      "memory_bytes": XLA_H100,
      "link_bandwidth": NVIDIA_H100,
      "network_bandwidth": NVIDIA_DGX,
    },
  ),
}
