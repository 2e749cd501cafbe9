"""Reports made by hand: every number is known without a compiler."""

from distrain_jax.inspect.collectives import Collective
from distrain_jax.inspect.hardware import CHIPS
from distrain_jax.inspect.memory import Memory
from distrain_jax.inspect.report import Report
from distrain_jax.inspect.schedule import Communication, Event, Step, Window

MIB = 1 << 20


def collective(kind, wire_bytes, sliced=False):
  groups = ((0, 1, 2, 3),)
  return Collective(
    "c", kind, "f32", 4 * MIB, groups, 4, wire_bytes, "", sliced
  )


def memory(state, *, batch=0, padding=0, gradients=0, activations=0, outputs=0):
  arguments = sum(state.values()) + batch + padding
  temporaries = gradients + activations
  return Memory(
    arguments=arguments,
    outputs=outputs,
    aliased=0,
    temporaries=temporaries,
    code=0,
    peak=arguments + outputs + temporaries,
    state=state,
    batch=batch,
    padding=padding,
    gradient_like=gradients,
    activations=activations,
  )


# 10 ms: an all-gather runs from 2 to 6 ms beside compute up to 5 ms, and an
# all-reduce stops the device from 7 to 9 ms.
EVENTS = (
  Event("compute", "matrix products", 0.0, 0.004),
  Event("communication", "all-gather", 0.002, 0.004),
  Event("compute", "other compute", 0.004, 0.001),
  Event("memory", "copies", 0.006, 0.001),
  Event("communication", "all-reduce", 0.007, 0.002),
  Event("compute", "matrix products", 0.009, 0.001),
)
WINDOW = Window(0.003, 1e9, ("dot",))
SPEAKS = (
  Communication(collective("all-gather", 3 * MIB), 1, 0.004, 0.001, WINDOW),
  Communication(collective("all-reduce", 6 * MIB), 1, 0.002, 0.002, None),
)
STEP = Step(0.01, 0.006, {"bf16": 197e9}, SPEAKS, 0.001, EVENTS, ())
MEMORY = memory(
  {"step": 4, "params": 64 * MIB, "opt_state": 128 * MIB},
  batch=MIB,
  gradients=32 * MIB,
  activations=16 * MIB,
)


def report(name="ddp", *, chip="v5e", step=STEP, memory=MEMORY):
  known = CHIPS[chip] if chip else None
  hardware = f"{chip}:2x2" if chip else "cpu"
  return Report(name, hardware, 4, known, memory, step, 1.0)
