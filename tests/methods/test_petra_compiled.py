"""PETRA's promises of messages, memory and compute, on compiled programs.

A chain of equal reversible stages between a stem and a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import stages
from distrain_jax.pipelining import plan as plans

KEY = jax.eval_shape(lambda: jax.random.key(0))
SGD = optax.sgd(0.1, momentum=0.9)
TOPOLOGIES = ("v5e:2x4", "h100:8")
TWICE = {"v5e:2x4": "v5e:4x4", "h100:8": "h100:2x8"}  # with 16 devices
by_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
pytestmark = pytest.mark.core

ROWS, WIDTH, INPUTS, K = 512, 512, 128, 2
STREAM = 4 * ROWS * WIDTH  # bytes
STEM_ENTRY = 4 * ROWS * INPUTS  # what the stem keeps of a micro-batch
FORWARD = 2 * 2 * ROWS * WIDTH**2  # FLOPs of a coupling's pass
STAGE = 4 * 2 * WIDTH**2  # bytes of a coupling's parameters


def branch(params, model_state, x, key):
  return jnp.tanh(x @ params["a"]) @ params["b"], model_state


def stem(params, model_state, x, key):
  h = x @ params["w"]
  return (h, h), model_state


def head(params, model_state, streams, targets, key):
  x, r = streams
  y = (x + r) @ params["w"]
  loss = jnp.mean(jnp.square(y - targets[:, None]))
  return loss, ({}, model_state)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def network(count):
  """(blocks, shapes of the parameters), a block a stage."""
  names = [f"block_{i}" for i in range(count - 2)]
  square = shape(WIDTH, WIDTH)
  params = {name: {"a": square, "b": square} for name in names}
  params |= {
    "stem": {"w": shape(INPUTS, WIDTH)},
    "head": {"w": shape(WIDTH, 8)},
  }
  couplings = [stages.coupling(name, branch, kind="branch") for name in names]
  blocks = [stages.plain("stem", stem), *couplings, stages.last("head", head)]
  return blocks, params


def batch(micro_batches):
  rows = ROWS * micro_batches
  return shape(rows, INPUTS), shape(rows)


def plan(count, buffer):
  blocks, params = network(count)
  told = {"shapes": params, "example": batch(1), "inputs": None}
  return plans.make_plan(blocks, mode=plans.BUFFERS[buffer], **told)


@functools.cache
def small(topology, *, method="petra", k=K, **options):
  """The report of a step, whose batch is whole on every device."""
  mesh = dj.inspect.mesh(topology, {"stage": -1})
  blocks, params = network(mesh.size)
  options |= {"shapes": params, "example": batch(1), "accumulate": k}
  run = dj.distribute(getattr(dj, method)(blocks, SGD, **options), mesh)
  everywhere = NamedSharding(mesh, P())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
  state = run.abstract(KEY, params)
  arguments = state, *jax.tree.map(place, (batch(k), KEY))
  compiled = run.step.lower(*arguments).compile()
  devices = list(mesh.devices.flat)
  return dj.inspect.read(compiled, arguments, devices, state=state)


def messages(report):
  """(those up, those down): all that neighbours send each other."""
  sent = [
    c
    for c in report.step.communication
    if c.collective.kind == "collective-permute"
  ]
  up = [c for c in sent if (0, 1) in c.collective.groups]
  down = [c for c in sent if (1, 0) in c.collective.groups]
  assert len(up) + len(down) == len(sent)
  return up, down


def arrays(sent, ticks):
  """Shapes of what is sent in a tick."""
  assert all(c.runs == ticks for c in sent)
  return sorted(s for c in sent for s in c.collective.shapes)


def without_batch(report):
  """Peak memory but for the micro-batches of the step."""
  return report.memory.peak - report.memory.batch


@by_topology
def test_a_tick_sends_two_streams_up_and_four_down(topology):
  up, down = messages(small(topology))
  stream, targets = (ROWS, WIDTH), (ROWS,)
  # Not a header beside them: the micro-batch's number is known on all stages.
  assert arrays(up, K) == [targets, stream, stream]
  assert arrays(down, K) == [stream] * 4


@by_topology
def test_messages_run_beside_the_passes(topology):
  found = small(topology)
  up, down = messages(found)
  assert not found.step.unknown
  assert all(c.window is not None for c in up + down)
  assert all(c.window.flops >= FORWARD for c in down)
  # Computed once more, for the gradients of the input and of the parameters.
  # Of a switch `inspect` follows the branch that it takes to be the longest:
  # with some versions of XLA for TPU that is the head's at this size.
  if topology == "h100:8":
    assert all(c.window.flops >= 3 * FORWARD for c in up)


def test_messages_of_1f1b_run_beside_the_passes():
  up, down = messages(small("h100:8", method="pipeline", k=4))
  assert all(c.window is not None for c in up + down)
  assert all(c.window.flops >= FORWARD for c in up + down)


def test_a_reversible_stage_costs_four_passes_forward():
  assert small("h100:8").flops == K * 4 * FORWARD


def test_only_the_stem_keeps_micro_batches():
  kept = plan(8, "none").entries
  assert kept.used == (STEM_ENTRY, *[0] * 7)
  assert not jax.tree.leaves(kept.alike)
  assert plan(8, "input").entries.used[1:7] == (2 * STREAM,) * 6


@by_topology
def test_memory_does_not_grow_with_the_stages(topology):
  eight, sixteen = small(topology), small(TWICE[topology])
  grown = without_batch(sixteen) - without_batch(eight)
  # The stem's FIFO: 2 more rows a stage. One program: all have room for it.
  assert grown <= 2 * 8 * STEM_ENTRY + 0.01 * without_batch(eight)
  state = [sum(r.memory.state.values()) for r in (eight, sixteen)]
  assert state[1] - state[0] <= 2 * 8 * STEM_ENTRY + 1000


def test_kept_inputs_grow_with_the_stages():
  eight, sixteen = (small(t, buffer="input") for t in ("h100:8", "h100:2x8"))
  grown = without_batch(sixteen) - without_batch(eight)
  assert grown == pytest.approx(2 * 8 * 2 * STREAM, rel=0.02)


@by_topology
def test_memory_does_not_grow_with_accumulation(topology):
  two, eight = small(topology), small(topology, k=8)
  grown = without_batch(eight) - without_batch(two)
  assert grown <= 0.01 * without_batch(two)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_memory_of_synchronous_pipelines_grows_with_micro_batches(schedule):
  options = {"method": "pipeline", "schedule": schedule}
  eight, twelve = (small("h100:8", k=k, **options) for k in (8, 12))
  grown = without_batch(twelve) - without_batch(eight)
  assert grown >= 0.98 * 4 * 2 * STREAM


@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:2x8"])
def test_what_is_kept_is_not_copied(topology):
  found = small(topology, buffer="input")
  rows = 2 * (found.devices - 1)
  assert found.memory.temporaries < rows * 2 * STREAM / 2


@by_topology
def test_one_copy_of_the_parameters(topology):
  held = small(topology).memory.state["params"]
  assert 0 <= held - STAGE < 4096  # whole tiles
  longest = max(
    sum(4 * math.prod(x.shape) for x in jax.tree.leaves(tree))
    for tree in network(8)[1].values()
  )
  assert longest == STAGE
