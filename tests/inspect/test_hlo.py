"""The parser, on text in XLA's grammar written by hand."""

import jax
import jax.numpy as jnp
import pytest

from distrain_jax.inspect import hlo

TEXT = r"""HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%beside (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %same = f32[4]{0} copy(%p)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,128], y: s32[]) -> (f32[8,128], f32[]) {
  %y = s32[]{:T(128)} parameter(1)
  %x = f32[8,128]{1,0:T(8,128)S(1)} parameter(0), sharding={replicated}, metadata={op_name="params[\'w\']"}
  %c = f32[2]{0} constant({1, -2.5})
  %long = (f32[8,128]{1,0}, s32[], /*index=2*/(token[], u8[3]{0})) custom-call(%x, /*index=1*/%y), custom_call_target="a(b{,", backend_config={"n":{"m":"]}, =\" ("}}
  %zero = f32[] constant(0)
  %r = f32[] reduce(%x, %zero), dimensions={0,1}, to_apply=%add
  ROOT %out = (f32[8,128]{1,0}, f32[]) tuple(%x, %r)
}
"""


def test_computations_keep_their_order_and_entry():
  module = hlo.parse(TEXT)
  assert module.name == "jit_f"
  assert module.attributes["is_scheduled"] == "true"
  assert module.devices == 8
  assert list(module.computations) == ["add", "beside", "main"]
  assert module.entry.name == "main"
  assert module.computations["beside"].thread == "sparsecore"
  names = list(module.entry.instructions)
  assert names == ["y", "x", "c", "long", "zero", "r", "out"]
  assert [p.name for p in module.entry.parameters()] == ["x", "y"]
  assert module.entry.root.name == "out"


def test_an_instruction_has_shape_operands_and_attributes():
  entry = hlo.parse(TEXT).entry
  long = entry.instructions["long"]
  assert long.opcode == "custom-call"
  assert long.operands == ("x", "y")
  assert long.target == "a(b{,"
  assert long.config() == {"n": {"m": ']}, =" ('}}
  assert [a.dtype for a in long.shape.arrays()] == ["f32", "s32", "token", "u8"]
  assert long.shape.bytes == 8 * 128 * 4 + 4 + 3
  assert entry.instructions["r"].called("to_apply") == ("add",)
  assert entry.instructions["x"].shape.memory_space == 1
  assert entry.instructions["x"].op_name == r"params[\'w\']"
  assert entry.instructions["c"].operands == ()
  assert [u.name for u in entry.users()["x"]] == ["long", "r", "out"]


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("f32[]", 4),
    ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
    ("s4[7]{0:E(4)}", 3),
    ("pred[9]", 9),
    ("f8e4m3fn[2,2]", 4),
    ("f32[<=8]", 32),
    ("c64[2]", 16),
    ("token[]", 0),
    ("()", 0),
    ("(f32[2]{0}, (u32[], s32[]))", 16),
  ],
)
def test_bytes_of_a_shape(text, size):
  assert hlo.parse_shape(text).bytes == size


def test_called_computations_in_braces():
  line = (
    "%c = f32[] conditional(%i, %a, %b), branch_computations={%one, %two.1}"
  )
  x = hlo.parse_instruction(line)
  assert x.called("branch_computations") == ("one", "two.1")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("module @jit_f {", "compiled.as_text"),
    ("HloModule m\n", "no ENTRY"),
    (
      "HloModule m\nENTRY %e () -> f32[] {\n  what is this\n}\n",
      "what is this",
    ),
  ],
)
def test_what_is_no_compiled_program_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    hlo.parse(text)


def test_a_program_of_this_machine_is_read_whole():
  def f(x):
    return jax.lax.fori_loop(0, 5, lambda i, x: jnp.sin(x @ x), x).sum()

  text = jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()
  module = hlo.parse(text)
  lines = [x for x in text.splitlines() if x.startswith("  ") and " = " in x]
  read = sum(len(c.instructions) for c in module.computations.values())
  assert read == len(lines)
  assert module.entry.root.shape == hlo.parse_shape("f32[]")
