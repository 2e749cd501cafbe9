"""Windows, trip counts and exposed time, form by form, on hand-written HLO.

The chip of these tests does 1 FLOP/ns in every dtype, moves 1 byte/ns and
sends 1 byte/ns, so that nanoseconds can be counted by hand.
"""

import pytest

from distrain_jax.inspect import hlo, schedule
from distrain_jax.inspect.hardware import Chip

NS = 1e-9
PEAKS = dict.fromkeys(("f32", "bf16", "s8"), 1 / NS)
CHIP = Chip("test", PEAKS, 1 / NS, 10**9, 1 / NS, 1 / NS, {})

# A product of 2 x 8 x 8 x 8 = 1024 FLOPs on 768 bytes: 1024 ns. The gradient
# has 800 bytes: an all-reduce among 8 sends 1400, a reduce-scatter 700.
MODULE = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

COMPUTATIONS
ENTRY %main (w: f32[8,8], g: f32[200]) -> f32[8,8] {
  %w = f32[8,8]{1,0} parameter(0)
  %g = f32[200]{0} parameter(1)
  LINES
  ROOT %out = f32[8,8]{1,0} copy(%w)
}
"""
COPY = 512  # the ROOT's nanoseconds
ALL = "replica_groups={{0,1,2,3,4,5,6,7}}"
DOT = (
  "dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
  'metadata={op_name="f"}'
)


def walk(lines, computations=""):
  text = MODULE.replace("LINES", lines.strip())
  module = hlo.parse(text.replace("COMPUTATIONS", computations.strip()))
  return schedule.walk(module, CHIP, lambda collective: 1 / NS)


def one(step):
  (found,) = step.communication
  return found


def ns(seconds):
  return round(seconds / NS)


def test_compute_is_the_roofline_of_each_instruction():
  step = walk(f"%d = f32[8,8]{{1,0}} {DOT}")
  assert ns(step.seconds) == 1024 + COPY
  assert step.flops == {"f32": 1024}
  assert [e.kind for e in step.events] == ["matrix products", "other compute"]


def test_a_synchronous_collective_is_fully_exposed():
  step = walk(f"%c = f32[200]{{0}} all-reduce(%g), {ALL}, to_apply=%add")
  c = one(step)
  assert c.window is None
  assert (ns(c.seconds), ns(c.exposed)) == (1400, 1400)
  assert ns(step.seconds) == 1400 + COPY


# Each form of an asynchronous all-reduce of 1400 ns around DOTS products.
PAIRS = {
  "start and done": (
    f"%s = f32[200]{{0}} all-reduce-start(%g), {ALL}, to_apply=%add",
    "%c = f32[200]{0} all-reduce-done(%s)",
    "",
  ),
  "generic": (
    "%s = ((f32[200]{0}), f32[200]{0}, u32[]) async-start(%g), calls=%wrapped",
    """%u = ((f32[200]{0}), f32[200]{0}, u32[]) async-update(%s)
  %c = f32[200]{0} async-done(%u)""",
    f"""
%wrapped (p: f32[200]) -> f32[200] {{
  %p = f32[200]{{0}} parameter(0)
  ROOT %r = f32[200]{{0}} all-reduce(%p), {ALL}, to_apply=%add
}}
""",
  ),
  "SparseCore with tokens": (
    """%ps = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"
  %pd = token[] custom-call(%ps), custom_call_target="PrepareAsyncCallDone"
  %s = ((f32[200]{0}, token[]), f32[200]{0}) call-start(%g, %pd), async_execution_thread="sparsecore", to_apply=%called""",
    "%c = f32[200]{0} call-done(%s)",
    f"""
%called (p: f32[200], t: token[]) -> f32[200] {{
  %t = token[] parameter(1)
  %p = f32[200]{{0}} parameter(0)
  ROOT %r = f32[200]{{0}} all-reduce(%p), {ALL}, to_apply=%add
}}, execution_thread="sparsecore"
""",
  ),
  "SparseCore with an update": (
    """%s = ((), (), (s32[4]{0})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="T", called_computations={%called}
  %u = ((f32[200]{0}), f32[200]{0}, (s32[4]{0})) custom-call-update(%s, %g)""",
    "%c = f32[200]{0} custom-call-done(%u)",
    f"""
%called (p: f32[200]) -> f32[200] {{
  %p = f32[200]{{0}} parameter(0)
  ROOT %r = f32[200]{{0}} all-reduce(%p), {ALL}, to_apply=%add
}}, execution_thread="sparsecore"
""",
  ),
  "TPU's collective fusion": (
    "%s = (f32[200]{0}, u32[]) fusion(%g), kind=kCustom, calls=%begin",
    """%e = f32[200]{0} get-tuple-element(%s), index=0
  %c = f32[200]{0} fusion(%e), kind=kCustom, calls=%end""",
    f"""
%begin (p: f32[200]) -> (f32[200], u32[]) {{
  %p = f32[200]{{0}} parameter(0)
  %r = f32[200]{{0}} all-reduce(%p), {ALL}, to_apply=%add, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %t = (f32[200]{{0}}, u32[]) custom-call(%r), custom_call_target="AsyncCollectiveStart"
}}

%end (p.1: f32[200]) -> f32[200] {{
  %p.1 = f32[200]{{0}} parameter(0)
  %r.1 = f32[200]{{0}} all-reduce(%p.1), {ALL}, to_apply=%add, backend_config={{"async_collective_fusion_config":{{}}}}
  ROOT %t.1 = f32[200]{{0}} custom-call(%r.1), custom_call_target="AsyncCollectiveDone"
}}
""",
  ),
}


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("dots", [0, 1, 2])
def test_an_asynchronous_collective_hides_behind_what_is_between(form, dots):
  start, done, computations = PAIRS[form]
  between = [f"%d{i} = f32[8,8]{{1,0}} {DOT}" for i in range(dots)]
  step = walk("\n  ".join([start, *between, done]), computations)
  c = one(step)
  assert (c.collective.kind, c.collective.bytes) == ("all-reduce", 800)
  assert ns(c.seconds) == 1400
  assert ns(c.exposed) == max(0, 1400 - 1024 * dots)
  assert c.window.flops == 1024 * dots
  assert c.window.instructions[-dots:] == tuple(
    f"d{i}" for i in range(dots)
  ) or (dots == 0)
  assert ns(step.seconds) == max(1400, 1024 * dots) + COPY
  assert not step.unknown


def test_a_start_that_the_gpu_waits_for_at_once_is_synchronous():
  start, done, _ = PAIRS["start and done"]
  start += ', backend_config={"collective_backend_config":{"is_sync":true}}'
  step = walk("\n  ".join([start, f"%d = f32[8,8]{{1,0}} {DOT}", done]))
  assert one(step).window is None
  assert ns(one(step).exposed) == 1400


def test_a_start_without_operands_only_prepares():
  both, done, computations = PAIRS["SparseCore with an update"]
  start, update = both.split("\n")
  dot = f"%d = f32[8,8]{{1,0}} {DOT}"
  c = one(walk("\n".join([start, dot, update, done]), computations))
  assert (ns(c.exposed), c.window.flops) == (1400, 0)


def test_two_collectives_share_the_link():
  a, done_a, _ = PAIRS["start and done"]
  b, done_b = a.replace("%s ", "%s2 "), done_a.replace("%s", "%s2")
  b, done_b = b, done_b.replace("%c ", "%c2 ")
  dot = f"%d = f32[8,8]{{1,0}} {DOT}"
  step = walk("\n  ".join([a, b, dot, done_a, done_b]))
  assert [ns(c.exposed) for c in step.communication] == [376, 1400]
  assert ns(step.seconds) == 2800 + COPY


LOOP = """
%body (p: (s32[], f32[8,8], f32[200])) -> (s32[], f32[8,8], f32[200]) {
  %p = (s32[], f32[8,8]{1,0}, f32[200]{0}) parameter(0)
  %w = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %g = f32[200]{0} get-tuple-element(%p), index=2
  %i = s32[] get-tuple-element(%p), index=0
  INSIDE
  ROOT %t = (s32[], f32[8,8]{1,0}, f32[200]{0}) tuple(%i, %w, %g)
}

%condition (q: (s32[], f32[8,8], f32[200])) -> pred[] {
  %q = (s32[], f32[8,8]{1,0}, f32[200]{0}) parameter(0)
  ROOT %no = pred[] constant(false)
}
"""
WHILE = """%z = s32[] constant(0)
  %init = (s32[], f32[8,8]{1,0}, f32[200]{0}) tuple(%z, %w, %g)
  %loop = (s32[], f32[8,8]{1,0}, f32[200]{0}) while(%init), condition=%condition, body=%body"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


def test_a_loop_multiplies_what_is_in_it():
  start, done, _ = PAIRS["start and done"]
  inside = "\n  ".join([start, f"%d = f32[8,8]{{1,0}} {DOT}", done])
  step = walk(WHILE + KNOWN, LOOP.replace("INSIDE", inside))
  c = one(step)
  assert (c.runs, ns(c.seconds), ns(c.exposed)) == (5, 1400, 376)
  assert step.flops == {"f32": 5 * 1024}
  assert ns(step.seconds) == 5 * 1400 + COPY
  assert ns(step.compute_seconds) == 5 * 1024 + COPY
  sent = [e for e in step.events if e.stream == "communication"]
  assert ns(sum(e.seconds for e in sent)) == 5 * 1400


def test_a_loop_can_hide_what_runs_beside_it():
  start, done, _ = PAIRS["start and done"]
  inside = LOOP.replace("INSIDE", f"%d = f32[8,8]{{1,0}} {DOT}")
  step = walk(f"{start}\n  {WHILE}{KNOWN}\n  {done}", inside)
  assert ns(one(step).exposed) == 0
  assert one(step).window.flops == 5 * 1024
  assert one(step).window.instructions == ("loop",)


def test_a_loop_without_a_known_count_is_named():
  inside = f"%c = f32[200]{{0}} all-reduce(%g), {ALL}, to_apply=%add"
  step = walk(WHILE, LOOP.replace("INSIDE", inside))
  assert one(step).runs == 1
  assert "how often the loop loop runs" in step.unknown[0]


def test_a_done_may_wait_for_the_start_of_the_iteration_before():
  inside = "\n  ".join(
    [
      "%c = f32[200]{0} all-reduce-done(%g)",
      f"%d = f32[8,8]{{1,0}} {DOT}",
      f"%s = f32[200]{{0}} all-reduce-start(%g), {ALL}, to_apply=%add",
      f"%d2 = f32[8,8]{{1,0}} {DOT}",
    ]
  )
  step = walk(WHILE + KNOWN, LOOP.replace("INSIDE", inside))
  c = one(step)
  assert c.runs == 5
  assert ns(c.exposed) == 376
  assert ns(c.window.seconds) == 1024


def test_of_a_conditional_the_dearest_branch_counts():
  branch = """
%NAME (b: f32[200]) -> f32[200] {
  %b.NAME = f32[200]{0} parameter(0)
  LINE
}
"""
  small = "ROOT %r1 = f32[200]{0} bitcast(%b.one)"
  large = f"ROOT %r2 = f32[200]{{0}} all-reduce(%b.two), {ALL}, to_apply=%add"
  step = walk(
    """%p = pred[] constant(true)
  %c = f32[200]{0} conditional(%p, %g, %g), true_computation=%one, false_computation=%two""",
    branch.replace("NAME", "one").replace("LINE", small)
    + branch.replace("NAME", "two").replace("LINE", large),
  )
  assert one(step).collective.kind == "all-reduce"
  assert ns(step.seconds) == 1400 + COPY


def test_an_all_reduce_that_a_fusion_scatters_counts_as_a_reduce_scatter():
  step = walk(
    "%c = f32[25]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter",
    f"""
%all-reduce-scatter (p: f32[200]) -> f32[25] {{
  %p = f32[200]{{0}} parameter(0)
  %r = f32[200]{{0}} all-reduce(%p), {ALL}, to_apply=%add
  %me = u32[] partition-id()
  ROOT %mine = f32[25]{{0}} dynamic-slice(%r, %me), dynamic_slice_sizes={{25}}
}}
""",
  )
  c = one(step).collective
  assert (c.kind, c.wire_bytes, c.sliced) == ("reduce-scatter", 700, False)


@pytest.mark.parametrize(
  ("line", "named"),
  [
    ("%s = (f32[200]{0}, u32[], token[]) send(%g, %g), channel_id=1", "send"),
    ('%k = f32[200]{0} custom-call(%g), custom_call_target="mine"', "mine"),
    (
      "%c = f32[200]{0} all-reduce(%g), replica_groups=stars{1}, to_apply=%add",
      "unknown notation",
    ),
    ("%c = f32[200]{0} ragged-all-to-all(%g, %g)", "ragged-all-to-all"),
    ("%c = f32[200]{0} all-gather-done(%g)", "no start"),
  ],
)
def test_unknown_forms_are_named_never_zero(line, named):
  (unknown,) = walk(line).unknown
  assert named in unknown


def test_asynchronous_copies_are_waited_for_like_collectives():
  pair = """%s = (f32[200]{0:S(1)}, f32[200]{0}, u32[]) copy-start(%g)
  BETWEEN
  %c = f32[200]{0:S(1)} copy-done(%s)"""
  assert ns(walk(pair.replace("BETWEEN", "")).copies_exposed) == 800
  dot = f"%d = f32[8,8]{{1,0}} {DOT}"
  assert ns(walk(pair.replace("BETWEEN", dot)).copies_exposed) == 0


def test_only_the_slice_of_an_update_in_place_moves():
  step = walk(
    """%u = f32[4]{0} slice(%g), slice={[0:4]}
  %f = f32[200]{0} fusion(%g, %u), kind=kLoop, calls=%update""",
    """
%update (p: f32[200], q: f32[4]) -> f32[200] {
  %p = f32[200]{0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %n = f32[4]{0} negate(%q)
  %at = s32[] constant(8)
  ROOT %r = f32[200]{0} dynamic-update-slice(%p, %n, %at)
}
""",
  )
  assert ns(step.seconds) == 32 + 32 + COPY


def test_a_synchronous_collective_waits_for_the_link():
  start, done, _ = PAIRS["start and done"]
  now = f"%n = f32[200]{{0}} all-reduce(%g), {ALL}, to_apply=%add"
  step = walk("\n  ".join([start, now, done]))
  waited, first = step.communication
  assert (ns(waited.seconds), ns(waited.exposed)) == (1400, 2800)
  assert ns(first.exposed) == 0
  assert ns(step.seconds) == 2800 + COPY


def test_products_in_asynchronous_calls_and_beside_collectives_count():
  inside = f"""
%wrapped (p: f32[8,8]) -> f32[8,8] {{
  %w = f32[8,8]{{1,0}} parameter(0)
  ROOT %d = f32[8,8]{{1,0}} {DOT}
}}

%both (p: f32[8,8], q: f32[200]) -> (f32[8,8], f32[200]) {{
  %w = f32[8,8]{{1,0}} parameter(0)
  %q = f32[200]{{0}} parameter(1)
  %d.1 = f32[8,8]{{1,0}} {DOT}
  %r = f32[200]{{0}} all-reduce(%q), {ALL}, to_apply=%add
  ROOT %t = (f32[8,8]{{1,0}}, f32[200]{{0}}) tuple(%d.1, %r)
}}
"""
  step = walk(
    """%s = ((f32[8,8]{1,0}), f32[8,8]{1,0}, u32[]) async-start(%w), calls=%wrapped
  %e = f32[8,8]{1,0} async-done(%s)
  %f = (f32[8,8]{1,0}, f32[200]{0}) fusion(%w, %g), kind=kCustom, calls=%both""",
    inside,
  )
  assert step.flops == {"f32": 2 * 1024}
  assert one(step).collective.kind == "all-reduce"
  assert not step.unknown


def test_an_all_reduce_of_a_slice_is_no_reduce_scatter():
  step = walk(
    "%c = bf16[200]{0} fusion(%g), kind=kCustom, calls=%reduced",
    f"""
%reduced (p: f32[200]) -> bf16[200] {{
  %p = f32[200]{{0}} parameter(0)
  %i = s32[] constant(0)
  %mine = f32[200]{{0}} dynamic-slice(%p, %i), dynamic_slice_sizes={{200}}
  %r = f32[200]{{0}} all-reduce(%mine), {ALL}, to_apply=%add
  ROOT %h = bf16[200]{{0}} convert(%r)
}}
""",
  )
  c = one(step).collective
  assert (c.kind, c.wire_bytes) == ("all-reduce", 1400)


@pytest.mark.parametrize(
  "lines",
  [
    """%s = ((), (), ()) call-start(), to_apply=%add
  %d = f32[200]{0} call-done(%s)""",
    """%s = ((f32[200]{0}), f32[200]{0}, u32[]) async-start(%g), calls=%ragged
  %d = f32[200]{0} async-done(%s)""",
  ],
)
def test_asynchronous_forms_without_a_rule_are_named(lines):
  ragged = """
%ragged (p: f32[200]) -> f32[200] {
  %p = f32[200]{0} parameter(0)
  ROOT %r = f32[200]{0} ragged-all-to-all(%p, %p)
}
"""
  step = walk(lines, ragged)
  assert step.unknown
  assert not step.communication


def test_a_loop_s_first_bar_is_its_own():
  gap = f"%c = f32[200]{{0}} all-reduce(%g), {ALL}, to_apply=%add"
  dot = f"%d = f32[8,8]{{1,0}} {DOT}"
  inside = LOOP.replace("INSIDE", f"{dot}\n  {gap}")
  before = f"%b = f32[8,8]{{1,0}} {DOT}"
  step = walk(f"{before}\n  {WHILE}{KNOWN}", inside)
  products = [e for e in step.events if e.kind == "matrix products"]
  assert ns(sum(e.seconds for e in products)) == 6 * 1024
  starts = [ns(e.start) for e in products]
  assert starts == [0] + [1024 + i * 2424 for i in range(1, 5)]


def test_without_peaks_the_dearest_branch_is_that_of_most_bytes():
  free = CHIP._replace(
    flops=dict.fromkeys(PEAKS, float("inf")), memory_bandwidth=float("inf")
  )
  branches = f"""
%idle (b: f32[200]) -> f32[200] {{
  ROOT %b = f32[200]{{0}} parameter(0)
}}

%busy (b: f32[200]) -> f32[200] {{
  %b = f32[200]{{0}} parameter(0)
  ROOT %r = f32[200]{{0}} all-reduce(%b), {ALL}, to_apply=%add
}}
"""
  text = MODULE.replace("COMPUTATIONS", branches).replace(
    "LINES",
    """%i = s32[] constant(0)
  %c = f32[200]{0} conditional(%i, %g, %g), branch_computations={%idle, %busy}""",
  )
  step = schedule.walk(hlo.parse(text), free, lambda c: float("inf"))
  assert one(step).collective.wire_bytes == 1400
