"""What instructions cost: bytes and operations counted by hand."""

import pytest

from distrain_jax.inspect import cost, hardware, hlo

CHIP = hardware.CHIPS["v5e"]
# A product of (64, 64) matrices beside an all-gather: its operand and result
# pass through the fusion.
BESIDE = """\
HloModule m, num_partitions=8

%body (a: f32[64,64], b: f32[64,64], c: f32[100], d: f32[800]) -> (f32[64,64], f32[100], f32[800], f32[800]) {
  %a = f32[64,64]{1,0} parameter(0)
  %b = f32[64,64]{1,0} parameter(1)
  %c = f32[100]{0} parameter(2)
  %d = f32[800]{0} parameter(3)
  %dot.1 = f32[64,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather = f32[800]{0} all-gather(%c), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %t = (f32[64,64]{1,0}, f32[100]{0}, f32[800]{0}, f32[800]{0}) tuple(%dot.1, %c, %d, %gather)
}

ENTRY %main (a: f32[64,64], b: f32[64,64], c: f32[100], d: f32[800]) -> (f32[64,64], f32[100], f32[800], f32[800]) {
  %a = f32[64,64]{1,0} parameter(0)
  %b = f32[64,64]{1,0} parameter(1)
  %c = f32[100]{0} parameter(2)
  %d = f32[800]{0} parameter(3)
  ROOT %beside = (f32[64,64]{1,0}, f32[100]{0}, f32[800]{0}, f32[800]{0}) fusion(%a, %b, %c, %d), kind=kOutput, calls=%body
}
"""


def test_what_travels_beside_a_product_is_not_the_product_s_own_cost():
  module = hlo.parse(BESIDE)
  found = cost.cost(module, module.entry, module.entry.root, CHIP)
  assert found.bytes == 3 * 4 * 64 * 64
  assert found.flops == {"f32": pytest.approx(2 * 64**3)}
