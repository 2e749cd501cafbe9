"""Kinds, groups and bytes of collectives, on fragments written by hand."""

import pytest

from distrain_jax.inspect import collectives, hlo

MODULE = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[8,256]) -> f32[8,256] {
  %x = f32[8,256]{1,0} parameter(0)
  %h = bf16[1024]{0} parameter(1)
  LINES
}
"""
SIZE = 8 * 256 * 4


def described(line):
  module = hlo.parse(MODULE.replace("LINES", line))
  return collectives.describe(module, module.entry, module.entry.root)


@pytest.mark.parametrize(
  ("line", "kind", "size", "n", "wire"),
  [
    (
      "ROOT %c = f32[8,256]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add",
      *("all-reduce", SIZE, 8, 2 * SIZE * 7 / 8),
    ),
    (
      "ROOT %c = f32[8,256]{1,0} all-reduce-start(%x), "
      "replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add",
      *("all-reduce", SIZE, 4, 2 * SIZE * 3 / 4),
    ),
    (
      "ROOT %c = (f32[8,256]{1,0}, bf16[1024]{0}) all-reduce(%x, %h), "
      "replica_groups=[2,4]<=[8], to_apply=%add",
      *("all-reduce", SIZE + 2048, 4, 2 * (SIZE + 2048) * 3 / 4),
    ),
    (
      "ROOT %c = f32[1,256]{1,0} reduce-scatter(%x), dimensions={0}, "
      "replica_groups=mesh['data'=8] {'data'}, to_apply=%add",
      *("reduce-scatter", SIZE, 8, SIZE * 7 / 8),
    ),
    (
      "ROOT %c = ((f32[8,256]{1,0}), f32[1,256]{1,0}) reduce-scatter-start(%x), "
      "dimensions={0}, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
      *("reduce-scatter", SIZE, 8, SIZE * 7 / 8),
    ),
    (
      "ROOT %c = f32[32,256]{1,0} all-gather(%x), dimensions={0}, "
      "replica_groups=[2,4]<=[4,2]T(1,0)",
      *("all-gather", 4 * SIZE, 4, 3 * SIZE),
    ),
    (
      "ROOT %c = (f32[8,256]{1,0}, f32[32,256]{1,0}) all-gather-start(%x), "
      "dimensions={0}, replica_groups=mesh['a'=2,'b'=4] {'b'}",
      *("all-gather", 4 * SIZE, 4, 3 * SIZE),
    ),
    (
      "ROOT %c = f32[8,256]{1,0} all-to-all(%x), dimensions={0}, "
      "replica_groups={{0,2},{1,3}}",
      *("all-to-all", SIZE, 2, SIZE / 2),
    ),
    (
      "ROOT %c = (f32[8,256]{1,0}, f32[8,256]{1,0}) collective-permute-start(%x), "
      "source_target_pairs={{0,1},{1,2},{2,0}}",
      *("collective-permute", SIZE, 2, SIZE),
    ),
    (
      "ROOT %c = f32[8,256]{1,0} collective-permute(%x), "
      "source_target_pairs={{0,0},{1,1}}",
      *("collective-permute", SIZE, 2, 0),
    ),
    (
      "ROOT %c = f32[8,256]{1,0} collective-broadcast(%x), "
      "replica_groups={{0,1,2,3}}",
      *("collective-broadcast", SIZE, 4, SIZE),
    ),
    (
      "ROOT %c = f32[8,256]{1,0} all-reduce(%x), replica_groups={{0},{1}}, "
      "to_apply=%add",
      *("all-reduce", SIZE, 1, 0),
    ),
  ],
)
def test_bytes_that_a_device_sends(line, kind, size, n, wire):
  c = described(line)
  assert (c.kind, c.bytes, c.group_size, c.wire_bytes) == (kind, size, n, wire)


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("mesh['data'=4] {'data'}", ((0, 1, 2, 3),)),
    ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    (
      "mesh['a'=2, 'b'=2, device_ids=([4]<=[2,2]T(1,0))] {'b'}",
      ((0, 2), (1, 3)),
    ),
  ],
)
def test_notations_of_groups(text, groups):
  module = hlo.parse(MODULE.replace("LINES", "ROOT %c = f32[] constant(0)"))
  assert collectives.replica_groups(module, text) == groups


def test_an_unknown_notation_is_an_error():
  module = hlo.parse(MODULE.replace("LINES", "ROOT %c = f32[] constant(0)"))
  with pytest.raises(ValueError, match="unknown notation"):
    collectives.replica_groups(module, "stars{1}")


SLICED = """HloModule m, is_scheduled=true, num_partitions=8

%mine (g: f32[8,256], me: u32[]) -> f32[1,256] {
  %g = f32[8,256]{1,0} parameter(0)
  %b = f32[8,256]{1,0} bitcast(%g)
  %me = u32[] parameter(1)
  %nil = u32[] constant(0)
  %s = f32[1,256]{1,0} dynamic-slice(%b, %me, %nil), dynamic_slice_sizes={1,256}
  ROOT %n = f32[1,256]{1,0} negate(%s)
}

%all (g: f32[8,256], me: u32[]) -> f32[8,256] {
  %g = f32[8,256]{1,0} parameter(0)
  %me = u32[] parameter(1)
  ROOT %n = f32[8,256]{1,0} negate(%g)
}

ENTRY %main (x: f32[8,256]) -> f32[1,256] {
  %x = f32[8,256]{1,0} parameter(0)
  %me = u32[] partition-id()
  %c = f32[8,256]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %r = f32[1,256]{1,0} fusion(%c, %me), kind=kLoop, calls=%CALLED
}
"""


def kept(lines, name, called):
  """Whether each of 8 devices keeps a part of the named instruction."""
  text = SLICED.replace("CALLED", called).replace(
    "  %c = f32[8,256]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add\n",
    lines,
  )
  module = hlo.parse(text)
  x = module.entry.instructions[name]
  return collectives.keeps_a_part(module, module.entry, x, 8)


ALONE = "  %c = f32[8,256]{1,0} all-reduce(%x), to_apply=%add\n"
LATER = """  %s = f32[8,256]{1,0} all-reduce-start(%x), to_apply=%add
  %c = f32[8,256]{1,0} all-reduce-done(%s)
"""
CALLED = """  %s = ((f32[8,256]{1,0}, token[]), (f32[8,256]{1,0}, f32[])) call-start(%x), to_apply=%f
  %e = (f32[8,256]{1,0}, f32[]) call-done(%s)
  %c = f32[8,256]{1,0} get-tuple-element(%e), index=0
  %loss = f32[] get-tuple-element(%e), index=1
  %half = f32[] negate(%loss)
"""
TWO = """  %s = (f32[8,256]{1,0}, f32[16,256]{1,0}) all-reduce(%x, %x), to_apply=%add
  %c = f32[8,256]{1,0} get-tuple-element(%s), index=0
  %large = f32[16,256]{1,0} get-tuple-element(%s), index=1
  %used = f32[16,256]{1,0} negate(%large)
"""


@pytest.mark.parametrize(
  ("lines", "name", "called", "sliced"),
  [
    (ALONE, "c", "mine", True),
    (ALONE, "c", "all", False),
    (LATER, "s", "mine", True),
    (LATER, "s", "all", False),
    (CALLED, "s", "mine", True),  # beside a scalar that all need
    (TWO, "s", "mine", False),  # beside more that all need
  ],
)
def test_a_reduce_scatter_that_became_an_all_reduce_is_found(
  lines, name, called, sliced
):
  assert kept(lines, name, called) is sliced


def test_a_slice_that_is_no_device_s_share_is_none():
  small = """%mine (g: f32[8,256], i: u32[]) -> f32[1,2] {
  %g = f32[8,256]{1,0} parameter(0)
  %i = u32[] parameter(1)
  ROOT %s = f32[1,2]{1,0} dynamic-slice(%g, %i, %i), dynamic_slice_sizes={1,2}
}

"""
  text = SLICED.replace("%mine", "%other").replace("CALLED", "mine")
  module = hlo.parse(text.replace("ENTRY", small + "ENTRY"))
  x = module.entry.instructions["c"]
  assert not collectives.keeps_a_part(module, module.entry, x, 8)
