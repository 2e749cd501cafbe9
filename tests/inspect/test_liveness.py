"""Which values live at the peak, counted by hand on small schedules."""

from distrain_jax.inspect import hlo
from distrain_jax.inspect.liveness import at_peak

HEAD = "HloModule m, is_scheduled=true\n\n"


def sizes(text):
  return sorted(a.bytes for a in at_peak(hlo.parse(HEAD + text)))


def test_a_value_lives_from_its_maker_to_its_last_reader():
  # a (400) dies at b; b (40) and c (800) live together; out is no temporary.
  assert sizes("""ENTRY %main (x: f32[100]) -> f32[10] {
  %x = f32[100]{0} parameter(0)
  %a = f32[100]{0} negate(%x)
  %b = f32[10]{0} slice(%a), slice={[0:10]}
  %c = f32[200]{0} broadcast(%x), dimensions={0}
  %d = f32[10]{0} slice(%c), slice={[0:10]}
  ROOT %out = f32[10]{0} add(%b, %d)
}
""") == [40, 40, 800]


def test_views_keep_their_buffer_alive():
  # Through the bitcast and the tuple, a lives until the end.
  assert sizes("""ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %a = f32[100]{0} negate(%x)
  %v = f32[10,10]{1,0} bitcast(%a)
  %t = (f32[10,10]{1,0}, f32[100]{0}) tuple(%v, %x)
  %b = f32[200]{0} broadcast(%x), dimensions={0}
  %c = f32[10]{0} slice(%b), slice={[0:10]}
  %w = f32[10,10]{1,0} get-tuple-element(%t), index=0
  ROOT %out = f32[100]{0} custom-call(%w, %c), custom_call_target="f"
}
""") == [40, 400, 800]


def test_elements_of_a_tuple_die_by_themselves():
  assert sizes("""ENTRY %main (x: f32[100]) -> f32[10] {
  %x = f32[100]{0} parameter(0)
  %two = (f32[1000]{0}, f32[10]{0}) custom-call(%x), custom_call_target="f"
  %small = f32[10]{0} get-tuple-element(%two), index=1
  %large = f32[2000]{0} broadcast(%x), dimensions={0}
  %cut = f32[10]{0} slice(%large), slice={[0:10]}
  ROOT %out = f32[10]{0} add(%small, %cut)
}
""") == [40, 40, 8000]


def test_an_update_in_place_makes_no_second_buffer():
  assert sizes("""ENTRY %main (x: f32[100], i: s32[]) -> f32[10] {
  %x = f32[100]{0} parameter(0)
  %i = s32[] parameter(1)
  %store = f32[500]{0} broadcast(%x), dimensions={0}
  %new = f32[500]{0} dynamic-update-slice(%store, %x, %i)
  ROOT %out = f32[10]{0} slice(%new), slice={[0:10]}
}
""") == [2000]


def test_what_a_loop_holds_inside_adds_to_what_lives_outside():
  assert sizes("""%body (p: (s32[], f32[100])) -> (s32[], f32[100]) {
  %p = (s32[], f32[100]{0}) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %y = f32[100]{0} get-tuple-element(%p), index=1
  %big = f32[700]{0} broadcast(%y), dimensions={0}
  %z = f32[100]{0} slice(%big), slice={[0:100]}
  ROOT %r = (s32[], f32[100]{0}) tuple(%j, %z)
}

%condition (q: (s32[], f32[100])) -> pred[] {
  %q = (s32[], f32[100]{0}) parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %i = s32[] constant(0)
  %a = f32[100]{0} negate(%x)
  %t = (s32[], f32[100]{0}) tuple(%i, %a)
  %w = (s32[], f32[100]{0}) while(%t), condition=%condition, body=%body
  %g = f32[100]{0} get-tuple-element(%w), index=1
  ROOT %out = f32[100]{0} negate(%g)
}
""") == [400, 2800]


def test_what_is_kept_on_the_chip_is_not_counted():
  assert (
    sizes("""ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  %a = f32[100]{0:S(1)} negate(%x)
  ROOT %out = f32[100]{0} negate(%a)
}
""")
    == []
  )


def test_one_buffer_may_be_several_results():
  assert (
    sizes("""ENTRY %main (x: f32[100]) -> (f32[100], f32[100]) {
  %x = f32[100]{0} parameter(0)
  %a = f32[100]{0} negate(%x)
  ROOT %out = (f32[100]{0}, f32[100]{0}) tuple(%a, %a)
}
""")
    == []
  )
