"""Memory of a compiled program on one device, and whose it is.

The totals are the compiler's own (`memory_analysis`). What the arguments are
is known exactly, from the state's fields. What the temporaries are is told by
shape from the values that live at the peak of the schedule: those shaped as a
parameter are gradients (or copies of parameters), the rest activations and
workspace.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from distrain_jax.inspect.hlo import Module
from distrain_jax.inspect.liveness import at_peak
from distrain_jax.inspect.traffic import bytes_held


class Memory(NamedTuple):
  """Bytes on the fullest device."""

  arguments: int
  outputs: int
  aliased: int  # outputs that reuse the arguments' memory (donation)
  temporaries: int
  code: int
  peak: int  # arguments + outputs - aliased + temporaries
  state: dict[str, int]  # by field; {} where the program is no method's step
  batch: int  # the other arguments, those that the program reads
  padding: int  # that the hardware's tiles add to the arguments
  gradient_like: int  # of the temporaries at the peak, shaped as parameters
  activations: int  # the rest of the temporaries


def state_fields(state: Any) -> dict[str, int]:
  """Bytes a device holds of a method's state, by field.

  A state that wraps another one (`guard`'s) is unwrapped.
  """
  if hasattr(state, "inner"):
    rest = {k: v for k, v in state._asdict().items() if k != "inner"}
    return state_fields(state.inner) | {"guard": bytes_held(rest)}
  fields = state._asdict() if hasattr(state, "_asdict") else {"state": state}
  held = {name: bytes_held(value) for name, value in fields.items()}
  return {name: size for name, size in held.items() if size}


def measure(
  compiled: Any, module: Module, state: Any | None, arguments: Any
) -> Memory:
  """Reads a compiled program.

  Args:
    compiled: what `.compile()` returned.
    module: its text, parsed.
    state: the method's state as shapes with shardings; None: not a step.
    arguments: all arguments, as shapes with shardings.
  """
  m = compiled.memory_analysis()
  fields = state_fields(state) if state is not None else {}
  held = sum(fields.values())
  others = m.argument_size_in_bytes - held
  batch = min(others, bytes_held(arguments) - held)
  parameters = _parameter_shapes(state if state is not None else arguments)
  live = at_peak(module)
  like = sum(a.bytes for a in live if (a.dtype, _key(a.dims)) in parameters)
  total = sum(a.bytes for a in live)
  temporaries = m.temp_size_in_bytes
  share = like / total if total else 0.0
  return Memory(
    arguments=m.argument_size_in_bytes,
    outputs=m.output_size_in_bytes,
    aliased=m.alias_size_in_bytes,
    temporaries=temporaries,
    code=m.generated_code_size_in_bytes,
    peak=m.argument_size_in_bytes
    + m.output_size_in_bytes
    - m.alias_size_in_bytes
    + temporaries,
    state=fields,
    batch=batch,
    padding=others - batch,
    gradient_like=round(temporaries * share),
    activations=temporaries - round(temporaries * share),
  )


def _parameter_shapes(tree: Any) -> set:
  """Of everything large in it: moments have their parameters' shapes."""
  found = set()
  for x in jax.tree.leaves(tree):
    if hasattr(x, "sharding") and x.sharding is not None:
      shape = x.sharding.shard_shape(x.shape)
    else:
      shape = np.shape(x)
    if len([d for d in shape if d > 1]) > 1:
      found.add((_dtype(x.dtype), _key(shape)))
  return found


def _dtype(dtype) -> str:
  """NumPy's name -> XLA's: float32 -> f32, bfloat16 -> bf16."""
  name = str(dtype)
  pairs = (("float8_", "f8"), ("float", "f"), ("uint", "u"), ("int", "s"))
  for long, short in pairs:
    name = name.replace(long, short)
  return name


def _key(dims) -> tuple[int, ...]:
  """A shape up to the order of its axes: XLA transposes at will."""
  return tuple(sorted(d for d in dims if d > 1))
