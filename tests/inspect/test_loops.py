"""Trip counts: written down, or followed back to constants."""

import jax
import jax.numpy as jnp
import pytest

from distrain_jax.inspect import hlo
from distrain_jax.inspect.loops import Scope, trip_count

# A counter that starts at START, is compared with LIMIT and grows by STRIDE.
LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[4], s32[], s32[])) -> (s32[], f32[4], s32[], s32[]) {
  %p = (s32[], f32[4]{0}, s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %d = s32[] get-tuple-element(%p), index=3
  %twice = f32[4]{0} add(%x, %x)
  %next = s32[] add(%i, STRIDE)
  ROOT %t = (s32[], f32[4]{0}, s32[], s32[]) tuple(%next, %twice, %n, CARRIED)
}

%condition (q: (s32[], f32[4], s32[], s32[])) -> pred[] {
  %q = (s32[], f32[4]{0}, s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] get-tuple-element(%q), index=2
  %fixed = s32[] constant(12)
  ROOT %lt = pred[] compare(COMPARED)
}

ENTRY %main (a: f32[4], unknown: s32[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %unknown = s32[] parameter(1)
  %two = s32[] constant(2)
  %start = s32[] copy(%two)
  %ten = s32[] constant(10)
  %three = s32[] constant(3)
  %init = (s32[], f32[4]{0}, s32[], s32[]) tuple(START, %a, %ten, %three)
  %w = (s32[], f32[4]{0}, s32[], s32[]) while(%init), condition=%condition, body=%body
  ROOT %r = f32[4]{0} get-tuple-element(%w), index=1
}
"""


def count(**changes):
  text = LOOP
  values = {
    "STRIDE": "%d",
    "CARRIED": "%d",
    "START": "%start",
    "COMPARED": "%j, %limit), direction=LT",
  }
  for name, value in (values | changes).items():
    text = text.replace(f"{name})" if value.count(")") else name, value)
  module = hlo.parse(text)
  return trip_count(Scope(module, module.entry), module.entry.instructions["w"])


@pytest.mark.parametrize(
  ("changes", "trips"),
  [
    ({}, 3),  # 2, 5, 8
    ({"COMPARED": "%j, %fixed), direction=LT"}, 4),  # 2, 5, 8, 11
    ({"COMPARED": "%fixed, %j), direction=GT"}, 4),
    ({"COMPARED": "%j, %limit), direction=LE"}, 3),
    ({"START": "%ten"}, 0),
    ({"START": "%unknown"}, None),
    ({"CARRIED": "%i"}, None),  # the stride changes as it goes
    ({"COMPARED": "%j, %limit), direction=GE"}, None),
  ],
)
def test_counts_are_followed_to_their_constants(changes, trips):
  assert count(**changes) == trips


def test_the_compiler_s_own_count_is_taken():
  text = LOOP.replace("STRIDE", "%d").replace("CARRIED", "%i")
  text = text.replace("START", "%unknown").replace(
    "COMPARED)", "%j, %limit), direction=LT"
  )
  text = text.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  )
  module = hlo.parse(text)
  loop = module.entry.instructions["w"]
  assert trip_count(Scope(module, module.entry), loop) == 7


@pytest.mark.parametrize("trips", [1, 3, 17])
def test_a_scan_of_a_real_program(trips):
  def f(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  arrays = jnp.ones((4, 4)), jnp.ones((trips, 4, 4))
  module = hlo.parse(jax.jit(f).lower(*arrays).compile().as_text())
  loops = [
    (c, x)
    for c in module.computations.values()
    for x in c.instructions.values()
    if x.opcode == "while"
  ]
  found = [trip_count(Scope(module, c), x) for c, x in loops]
  assert found == ([] if trips == 1 and not loops else [trips])
