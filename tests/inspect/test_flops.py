"""Operations of matrix products and convolutions, against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.inspect import hlo
from distrain_jax.inspect.flops import flops

HEAD = "HloModule m, is_scheduled=true\n\n"


def count(line, *shapes):
  """Operations of one instruction whose operands are %p0, %p1, ..."""
  parameters = "\n".join(
    f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(shapes)
  )
  text = (
    f"{HEAD}ENTRY %main (p: f32[]) -> f32[] {{\n{parameters}\n  {line}\n}}\n"
  )
  module = hlo.parse(text)
  return flops(module, module.entry, module.entry.root)


def test_a_batched_dot():
  line = (
    "ROOT %d = f32[4,8,16]{2,1,0} dot(%p0, %p1), lhs_batch_dims={0}, "
    "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
  )
  found = count(line, "bf16[4,8,32]{2,1,0}", "bf16[4,32,16]{2,1,0}")
  assert found == ({"bf16": 2 * 4 * 8 * 16 * 32}, [])


def tpu(shape, window, labels, *operands):
  line = f"ROOT %c = {shape} convolution(%p0, %p1), window={{{window}}}, dim_labels={labels}"
  found, unknown = count(line, *operands)
  assert not unknown
  return sum(found.values())


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    # A matrix product: (6, 128, 32) @ (32, 64), the 6 as a window of size 1.
    (
      (
        "f32[6,128,64]",
        "size=1",
        "0bf_io0->0bf",
        "f32[6,128,32]",
        "f32[32,64,1]",
      ),
      2 * 6 * 128 * 32 * 64,
    ),
    # Contracted over two axes, one of them the window's: (4, 128, 2, 32).
    (
      (
        "f32[128,64,1]",
        "size=4",
        "0fb_0io->bf0",
        "f32[4,32,128]",
        "f32[4,32,64]",
      ),
      2 * 4 * 32 * 128 * 64,
    ),
    # Batched, by dilation: each output position meets one of the kernel's.
    (
      (
        "f32[4,128,64]",
        "size=4 stride=3 lhs_dilate=4",
        "0bf_0io->0bf",
        "f32[4,128,32]",
        "f32[4,32,64]",
      ),
      2 * 4 * 128 * 32 * 64,
    ),
    # The outer product of heads, by padding and reversal.
    (
      (
        "f32[1,8,4,32]",
        "size=1x4 pad=0_0x3_3 rhs_reversal=0x1",
        "0bf1_1oi0->0b1f",
        "f32[1,8,16,1]",
        "f32[4,32,16,1]",
      ),
      2 * 8 * 4 * 32 * 16,
    ),
  ],
)
def test_matrix_products_that_tpus_write_as_convolutions(given, expected):
  assert tpu(*given) == expected


@pytest.mark.parametrize(
  ("stride", "padding", "groups"),
  [(1, "VALID", 1), (2, "SAME", 1), (1, "SAME", 4), (3, "VALID", 2)],
)
def test_convolutions_of_a_real_program(stride, padding, groups):
  x = jnp.ones((2, 11, 13, 8))
  w = jnp.ones((3, 5, 8 // groups, 12))

  def f(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (stride, stride), padding, feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip

  # By hand: ones convolved count the positions that meet the input.
  met = np.asarray(f(x, w)).sum()
  text = jax.jit(f).lower(x, w).compile().as_text()
  line = next(x for x in text.splitlines() if " convolution(" in x)
  found = hlo.parse_instruction(line)
  module = hlo.parse(text)
  computation = next(
    c for c in module.computations.values() if found.name in c.instructions
  )
  counted, unknown = flops(module, computation, found)
  assert (counted, unknown) == ({"f32": 2 * met}, [])


def test_gemms_and_convolutions_of_libraries():
  config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}'
  line = (
    "ROOT %g = (f32[8,16]{1,0}, s8[4096]{0}) custom-call(%p0, %p1), "
    f'custom_call_target="__cublas$gemm", backend_config={config}'
  )
  assert count(line, "f32[32,8]", "f32[32,16]")[0] == {"f32": 2 * 8 * 16 * 32}
  line = (
    "ROOT %g = (f32[3,3,8,16]{1,0,2,3}, u8[64]{0}) custom-call(%p0, %p1), "
    "window={size=3x3}, dim_labels=b01f_01io->b01f, "
    'custom_call_target="__cudnn$convBackwardFilter"'
  )
  found = count(line, "f32[2,10,10,8]", "f32[2,8,8,16]")[0]
  assert found == {"f32": 2 * 2 * 8 * 8 * 16 * 3 * 3 * 8}


def test_what_cannot_be_counted_is_named_not_zero():
  line = 'ROOT %k = f32[8]{0} custom-call(%p0), custom_call_target="my_kernel"'
  found, unknown = count(line, "f32[8]")
  assert found == {}
  assert "my_kernel" in unknown[0]
  line = line.replace("f32[8]{0} ", "f32[8]{0} ").replace(
    '"my_kernel"',
    '"tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"640"}}}',
  )
  assert count(line, "bf16[8]") == ({"bf16": 640.0}, [])
