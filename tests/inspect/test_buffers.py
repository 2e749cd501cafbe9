"""Temporaries by XLA's buffer assignment: of texts by hand, and of programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import inspect
from distrain_jax.inspect import buffers

# `one` and `two` live together; `view` lies within the first. `fast` is in
# another memory, and what XLA tells of the peak is no value of its own.
PROGRAM = """HloModule m, is_scheduled=true

ENTRY %main (x: f32[100]) -> f32[10] {
  %x = f32[100]{0} parameter(0)
  %one = f32[100]{0} negate(%x), metadata={op_name="jit(f)/fill/neg"}
  %two = f32[50]{0} slice(%x), slice={[0:50]}, metadata={op_name="jit(f)/s"}
  %same = f32[50]{0} bitcast(%two), metadata={op_name="jit(f)/read/b"}
  %fast = f32[50]{0:S(1)} copy(%same), metadata={op_name="jit(f)/fill/c"}
  %view = f32[50]{0} slice(%one), slice={[0:50]}, metadata={op_name="jit(f)/transpose(jvp(far))/v"}
  %copy = f32[50]{0} copy(%two)
  ROOT %out = f32[10]{0} add(%copy, %view), metadata={op_name="jit(f)/read/a"}
}
"""
ASSIGNED = """BufferAssignment:
allocation 0: size 400, parameter 0, shape |f32[100]| at ShapeIndex {}:
 value: <1 x @0> (size=400,offset=0): f32[100]{0}
allocation 1: size 900, preallocated-temp:
 value: <2 one @0> (size=400,offset=0): f32[100]{0}
 value: <3 two{0} @0> (size=200,offset=512): f32[50]{0}
 value: <4 view @0> (size=200,offset=0): f32[50]{0}
 value: <5 copy (phi) @0> (size=200,offset=700): f32[50]{0}
allocation 2: size 200, color 1, preallocated-temp:
 value: <6 fast @0> (size=200,offset=0): f32[50]{0:S(1)}

Total bytes used: 1500
"""
RANGES = """HloLiveRange (max 8):
  InstructionSequence:
    0:x
    1:one
    2:two
    3:same
    4:fast
    5:view
    6:copy
    7:out
  BufferLiveRange:
    x{}:0-8
    one{}:1-5
    two{0}:2-6
    fast{}:4-7
    view{}:5-7
    copy{}:6-7
  Live ranges at 2 (peak):
    one{}: 400 bytes (cumulative: 400 bytes)
"""


@pytest.fixture
def written(tmp_path):
  for name, text in (
    ("", PROGRAM),
    ("-live-range", RANGES),
    ("-buffer-assignment", ASSIGNED),
  ):
    (tmp_path / f"module_1.after_optimizations{name}.txt").write_text(text)
  return tmp_path


def test_sizes_and_times_are_those_of_the_texts(written):
  found = buffers.read(written)
  assert found.bytes == 900
  assert [(x.name, x.bytes, x.first, x.last) for x in found.values] == [
    ("one", 400, 1, 5),
    ("two", 200, 2, 6),
    ("view", 200, 5, 7),
    ("copy", 200, 6, 7),
  ]
  assert found.most() == 600  # at 5: view lies in one


def test_a_scope_counts_what_lives_at_its_instructions(written):
  found = buffers.read(written)
  assert found.during("fill") == 600  # at 4
  assert found.during("read") == 400  # at 7; at 3 nothing is computed
  assert found.during("v") == 600
  assert found.during("far") == 600  # at 5, where it is transposed
  assert found.during("fil") is None


def test_several_heaps_are_refused(written):
  file = written / "module_1.after_optimizations-buffer-assignment.txt"
  file.write_text(ASSIGNED.replace(" color 1,", ""))
  with pytest.raises(ValueError, match="2 heaps of temporaries"):
    buffers.read(written)


def test_a_folder_without_a_program_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"0 files .* compilation cache"):
    buffers.read(tmp_path)


@pytest.mark.core
@pytest.mark.parametrize("where", ["cpu", "v5e:2x4", "h100:8"])
def test_of_a_compiled_program(where, mesh):
  """Products live together in the first scope, and none in the last."""
  made = mesh(8) if where == "cpu" else inspect.mesh(where, {"data": -1})
  n = 8192  # one does not fit into a TPU's fast memory

  def f(x):
    with jax.named_scope("wide"):
      products = [x @ (x + i) for i in range(4)]
      y = functools.reduce(jnp.matmul, products)[0]
    with jax.named_scope("narrow"):
      return jnp.cumsum(y)

  everywhere = NamedSharding(made, P())
  x = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=everywhere)
  report = inspect.compile(jax.jit(f), x, with_buffers=True)
  found, square = report.buffers, 4 * n * n
  # Four of them; a TPU keeps three, in bfloat16.
  assert 1.5 * square <= found.during("wide") == found.most() <= found.bytes
  assert found.bytes <= report.memory.temporaries
  assert (found.during("narrow") or 0) < square / 1000  # or it is all fused
  assert found.during("elsewhere") is None
  assert inspect.compile(jax.jit(f), x).buffers is None
