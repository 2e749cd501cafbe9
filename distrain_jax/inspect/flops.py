"""Floating-point operations of matrix products and convolutions.

A multiply-add counts two. Only `dot`, `convolution` and the library calls that
stand for them are counted, as usual for model FLOPs: what is elementwise is
bound by memory. XLA for TPU writes matrix products as convolutions whose
windows hold the batch, with dilation and padding; as in XLA's own analysis
only positions that meet the input count.
"""

import math
import re
from typing import Any

import numpy as np

from distrain_jax.inspect.hlo import Computation, Instruction, Module, Shape

# What runs the computations that it names.
_CALLS = ("fusion", "call", "fusion-start", "async-start", "call-start")
_CALLS += ("custom-call-start",)
# Custom calls that compute nothing that counts.
NO_FLOPS = {
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
  "ConcatBitcast",
  "GatherScatterIndicesBitpacked",
  "PrepareAsyncCallDone",
  "PrepareAsyncCallStart",
  "Sharding",
  "TopK",
}
# cuDNN's convolutions -> where input, filter and output are: operand numbers,
# or "out" for the result.
_CUDNN = {
  "__cudnn$convForward": (0, 1, "out"),
  "__cudnn$convBiasActivationForward": (0, 1, "out"),
  "__cudnn$convBackwardInput": ("out", 1, 0),
  "__cudnn$convBackwardFilter": (0, "out", 1),
}


def flops(
  module: Module, computation: Computation, x: Instruction
) -> tuple[dict[str, float], list[str]]:
  """Operations of one instruction, those of a fusion's inside included.

  Args:
    module, computation: where the instruction is.
    x: not a loop, conditional or call: a schedule walks into those.

  Returns:
    {dtype of the operands: operations}, and what could not be counted.
  """
  shapes = computation.instructions
  if x.opcode in _CALLS:
    return _of_called(module, x)
  if x.opcode == "dot":
    lhs = shapes[x.operands[0]].shape
    contracted = _numbers(x.attributes["lhs_contracting_dims"])
    inner = math.prod(lhs.dims[i] for i in contracted)
    return {lhs.dtype: 2.0 * x.shape.size * inner}, []
  if x.opcode == "convolution":
    operands = [shapes[name].shape for name in x.operands]
    return {operands[0].dtype: _convolution(x, *operands, x.shape)}, []
  if x.opcode == "custom-call":
    return _of_custom_call(x, [shapes[name].shape for name in x.operands])
  if x.opcode in ("ragged-dot", "scaled-dot"):
    return {}, [f"the operations of {x.opcode}"]
  return {}, []


def _of_called(module: Module, x: Instruction):
  total: dict[str, float] = {}
  unknown: list[str] = []
  for name in x.called("calls", "to_apply", "called_computations"):
    inside = module.computations[name]
    for y in inside.instructions.values():
      if y.opcode in ("while", "conditional"):
        unknown.append(f"the operations of {y.opcode} {y.name} in {x.name}")
      found, missing = flops(module, inside, y)
      for dtype, count in found.items():
        total[dtype] = total.get(dtype, 0.0) + count
      unknown += missing
  return total, unknown


def _of_custom_call(x: Instruction, operands: list[Shape]):
  output = x.shape.arrays()[0] if x.shape.arrays() else x.shape
  config = x.config()
  if x.target.startswith(("__cublas$", "__onednn$matmul")):
    gemm = config.get("gemm_backend_config", config)
    numbers = gemm.get("dot_dimension_numbers", {})
    contracted = numbers.get("lhs_contracting_dimensions")
    if contracted is None:  # a plain matrix product
      contracted = [len(operands[0].dims) - 1]
    inner = math.prod(operands[0].dims[int(i)] for i in contracted)
    return {operands[0].dtype: 2.0 * output.size * inner}, []
  if x.target in _CUDNN:
    roles = [output if i == "out" else operands[i] for i in _CUDNN[x.target]]
    return {operands[0].dtype: _convolution(x, *roles)}, []
  estimate = config.get("custom_call_config", config).get("cost_estimate", {})
  if "flops" in estimate:  # a Pallas kernel whose author says it
    kind = operands[0].dtype if operands else "f32"
    return {kind: float(estimate["flops"])}, []
  if x.target in NO_FLOPS or x.target.startswith("xla."):
    return {}, []
  return {}, [f"the operations of custom call {x.target!r}"]


def _convolution(
  x: Instruction, lhs: Shape, rhs: Shape, output: Shape
) -> float:
  """2 * batch * input features of a group * output features * positions."""
  lhs_names, rhs_names, out_names = re.split("_|->", x.attributes["dim_labels"])
  window = _window(x.attributes.get("window", "{}"))
  positions = 1
  for digit in (c for c in out_names if c.isdigit()):
    positions *= _positions(
      size=lhs.dims[lhs_names.index(digit)],
      kernel=rhs.dims[rhs_names.index(digit)],
      outputs=output.dims[out_names.index(digit)],
      window={key: value[int(digit)] for key, value in window.items()},
    )
  groups = int(x.attributes.get("batch_group_count", 1))
  batch = lhs.dims[lhs_names.index("b")] / groups
  features = rhs.dims[rhs_names.index("i")] * output.dims[out_names.index("f")]
  return 2.0 * batch * features * positions


def _window(text: str) -> dict[str, list[Any]]:
  """{size=4x1 pad=0_0x3_3} -> {"size": ["4", "1"], "pad": ["0_0", "3_3"]}."""
  pairs = (part.split("=") for part in text.strip("{}").split())
  return {key: value.split("x") for key, value in pairs}


def _positions(size: int, kernel: int, outputs: int, window) -> int:
  """Pairs of an output and a kernel position that meet the input."""
  get = lambda key, default: window.get(key, default)
  low = int(get("pad", "0_0").split("_")[0])
  stride, spread = int(get("stride", 1)), int(get("rhs_dilate", 1))
  holes = int(get("lhs_dilate", 1))
  out = np.arange(outputs) * stride - low
  count = 0
  for k in range(kernel):
    at = out + k * spread
    count += int(np.sum((at >= 0) & (at % holes == 0) & (at // holes < size)))
  return count


def _numbers(text: str) -> list[int]:
  return [int(x) for x in text.strip("{}").split(",") if x.strip()]
