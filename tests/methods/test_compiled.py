"""What the compiler made of a step: collectives, memory, donation.

Eight CPU devices. XLA for CPU adds up bfloat16 in float32, so dtypes on the
wire are read before it, from the lowered program.
"""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd

pytestmark = pytest.mark.core

N, ROWS = 8, 48
KEY = jax.random.key(0)
ADAMW = optax.adamw(1e-3)
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")
KINDS += ("collective-permute",)
# Not multiples of 8 in every leaf, and large beside scalars and padding.
SHAPES = {"w": (61, 128), "b": (127,), "v": (128, 33), "gain": ()}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
WHOLE = 127 + 1  # elements of the leaves that N divides no dimension of
PADDED = sum(-(-math.prod(shape) // N) * N for shape in SHAPES.values())


def make_params(dtype=jnp.float32):
  return {k: jax.ShapeDtypeStruct(s, dtype) for k, s in SHAPES.items()}


def mixed_params():
  half = jax.ShapeDtypeStruct(SHAPES["w"], jnp.bfloat16)
  return {**make_params(), "w": half}


def loss_fn(params, batch, key):
  del key
  hidden = jnp.tanh(batch["x"] @ params["w"].astype(jnp.float32))
  hidden += jnp.pad(params["b"].astype(jnp.float32), (0, 1))[None]
  out = hidden @ params["v"].astype(jnp.float32)
  error = params["gain"].astype(jnp.float32) * out - batch["y"]
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


BATCH = {
  "x": jax.ShapeDtypeStruct((ROWS, 61), jnp.float32),
  "y": jax.ShapeDtypeStruct((ROWS, 33), jnp.float32),
}
BATCH_BYTES = ROWS // N * (61 + 33) * 4


class Collective(NamedTuple):
  kind: str
  sizes: tuple[int, ...]  # elements of each operand's result
  in_entry: bool  # neither in a loop nor in a branch


def collectives(text):
  """Every collective of an HLO module."""
  found, entry = [], False
  for line in text.splitlines():
    if line and not line[0].isspace():
      entry = line.startswith("ENTRY")
    op = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if op:
      shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", op[1])
      sizes = [math.prod(map(int, s.split(","))) if s else 1 for s in shapes]
      found.append(Collective(op[2], tuple(sorted(sizes)), entry))
  return found


class Compiled(NamedTuple):
  state: object
  lowered: str
  collectives: list[Collective]
  memory: object

  def of(self, kind):
    return [c for c in self.collectives if c.kind == kind]


@pytest.fixture(scope="module")
def compiled(mesh):
  """(method name, params name, accumulate, other options) -> Compiled."""

  @functools.cache
  def make(name, params="float32", accumulate=1, **options):
    params = mixed_params() if params == "mixed" else make_params(params)
    factory = getattr(dj, name)
    method = factory(loss_fn, ADAMW, accumulate=accumulate, **options)
    run = dj.distribute(method, mesh(N))
    state = run.abstract(KEY, params)
    lowered = run.step.lower(state, BATCH, KEY)
    built = lowered.compile()
    found = collectives(built.as_text())
    return Compiled(state, lowered.as_text(), found, built.memory_analysis())

  return make


def test_the_parser_finds_collectives_and_their_place():
  text = """
%body (p: f32[4]) -> f32[4] {
  %r = f32[4]{0} all-reduce(%x), replica_groups={}
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %a = (f32[2,3]{1,0}, /*index=1*/bf16[]) all-reduce-start(%x, %y), to_apply=%s
  %u = f32[8]{0} fusion(%all-reduce.1), calls=%f
}
"""
  assert collectives(text) == [
    Collective("all-reduce", (4,), False),
    Collective("all-reduce", (1, 6), True),
  ]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ddp_speaks_once_a_step_outside_the_microbatches(
  accumulate, clip_norm, compiled
):
  (only,) = compiled(
    "ddp", accumulate=accumulate, clip_norm=clip_norm
  ).collectives
  assert only.kind == "all-reduce"
  # Every gradient, the loss and its one metric.
  sizes = [math.prod(shape) for shape in SHAPES.values()]
  assert only.sizes == tuple(sorted([*sizes, 1, 1]))
  assert only.in_entry


def test_statistics_travel_with_ddps_gradients(mesh):
  def fn(params, stats, batch, key):
    loss, aux = loss_fn(params, batch, key)
    return loss, (aux, {"mean": 0.9 * stats["mean"] + batch["x"].mean(0)})

  run = dj.distribute(dj.ddp(dj.stateful(fn), ADAMW), mesh(N))
  stats = {"mean": jax.ShapeDtypeStruct((61,), jnp.float32)}
  state = run.abstract(KEY, dj.Variables(make_params(), stats))
  text = run.step.lower(state, BATCH, KEY).compile().as_text()
  (only,) = collectives(text)
  assert 61 in only.sizes
  assert sum(only.sizes) == SIZE + 61 + 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_zero1_scatters_once_and_gathers_once(accumulate, compiled):
  step = compiled("zero1", accumulate=accumulate, clip_norm=1.0)
  (scatter,), (gather,) = step.of("reduce-scatter"), step.of("all-gather")
  assert scatter.sizes[0] * N == gather.sizes[0]
  # Nothing but the padding travels beside the parameters.
  assert PADDED <= gather.sizes[0] < PADDED + N * 1024
  scalars = step.of("all-reduce")
  assert len(scalars) + 2 == len(step.collectives)
  assert all(set(c.sizes) == {1} for c in scalars)
  assert all(c.in_entry for c in step.collectives)


def test_zero1_speaks_once_for_each_dtype(compiled):
  step = compiled("zero1", "mixed")
  assert len(step.of("reduce-scatter")) == len(step.of("all-gather")) == 2


def test_fsdp_scatters_each_gradient_and_sums_the_rest_at_once(compiled):
  step = compiled("fsdp", clip_norm=1.0)
  cut = {math.prod(SHAPES["w"]), math.prod(SHAPES["v"])}
  scattered = {N * size for c in step.of("reduce-scatter") for size in c.sizes}
  assert scattered == cut
  assert {size for c in step.of("all-gather") for size in c.sizes} == cut
  (rest,) = step.of("all-reduce")
  # Whole leaves, the loss, its one metric and the norm.
  assert rest.sizes == (1, 1, 1, 1, 127)


@pytest.mark.parametrize("name", ["local_sgd", "diloco"])
def test_models_travel_at_once_in_a_branch_and_else_only_metrics(
  name, compiled
):
  step = compiled(name, "mixed", accumulate=3, clip_norm=1.0)
  assert not any(c.in_entry for c in step.collectives)
  alone, exchange = sorted(step.collectives, key=lambda c: sum(c.sizes))
  assert alone.kind == exchange.kind == "all-reduce"
  metrics = (1, 1, 1)  # loss, mae, norm
  assert alone.sizes == metrics
  sizes = [math.prod(shape) for shape in SHAPES.values()]
  assert exchange.sizes == tuple(sorted([*sizes, *metrics]))


def test_every_fragment_of_diloco_has_a_branch_of_its_own(compiled):
  step = compiled("diloco", fragments=2, delay=1, mix=0.5)
  assert not any(c.in_entry for c in step.collectives)
  ordered = sorted(step.of("all-reduce"), key=lambda c: sum(c.sizes))
  metrics, first, second = ordered
  assert metrics.sizes == (1, 1, 1)
  assert sum(first.sizes) + sum(second.sizes) == SIZE + 2 * 3
  assert max(sum(first.sizes), sum(second.sizes)) < 0.51 * SIZE


def wires(lowered, op):
  """Dtypes of what an op of the lowered program sends."""
  blocks = re.findall(
    rf"stablehlo\.{op}.*?-> tensor<[\dx]*x(\w+)>", lowered, re.S
  )
  return set(blocks)


def test_what_travels_is_in_the_dtype_that_was_asked_for(compiled):
  plain = compiled("zero1", clip_norm=1.0).lowered
  wire = compiled("zero1", wire_dtype="bfloat16").lowered
  low = compiled("zero1", param_dtype="bfloat16").lowered
  assert wires(plain, "reduce_scatter") == wires(plain, "all_gather") == {"f32"}
  assert wires(wire, "reduce_scatter") == {"bf16"}
  assert wires(wire, "all_gather") == {"f32"}
  assert wires(low, "reduce_scatter") == wires(low, "all_gather") == {"bf16"}


def local_bytes(state):
  """Of one device, by the shardings."""

  def one(x):
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(map(one, jax.tree.leaves(state)))


SCALARS = 64  # step counts, the key

# (params, optimizer and masters) bytes a parameter on each worker.
FORMULAS = [
  ("ddp", {}, 4 + 8),
  ("zero1", {}, 4 + 8 / N),
  ("zero1", {"param_dtype": "bfloat16"}, 2 + (8 + 4) / N),
  ("fsdp", {}, (4 + 8) / N),
  ("dpu", {"param_dtype": "bfloat16"}, 2 + 2 + (8 + 4) / N),
  ("weight_prediction", {"wire_dtype": None}, 4 + 4 + (8 + 4) / N),
  ("local_sgd", {}, 4 + 8),
  ("diloco", {}, (4 + 8) + (4 + 4)),
  ("diloco", {"delay": 1, "wire_dtype": "bfloat16"}, (4 + 8) + (4 + 4) + 2),
]


@pytest.mark.parametrize(("name", "options", "bytes_each"), FORMULAS)
def test_persistent_memory_is_what_the_formula_says(
  name, options, bytes_each, compiled
):
  memory = compiled(name, **options).memory
  held = memory.argument_size_in_bytes - BATCH_BYTES
  formula = bytes_each * SIZE
  if name == "fsdp":
    formula += (12 - bytes_each) * WHOLE
  # Beside it: the padding of the pieces, at most 12 bytes for N - 1 elements
  # of each leaf on all workers together, and scalars.
  padding = 12 * len(SHAPES)
  assert formula <= held <= formula + padding + SCALARS


@pytest.mark.parametrize(("name", "options", "bytes_each"), FORMULAS)
def test_a_step_reuses_the_memory_of_the_whole_state(
  name, options, bytes_each, compiled
):
  step = compiled(name, **options)
  assert step.memory.alias_size_in_bytes == local_bytes(step.state)
  assert local_bytes(step.state) > bytes_each * SIZE


def init_memory(method, mesh):
  """Bytes beside the params that making a state takes on each device."""
  runner = spmd.mesh_runner(mesh, "data")
  fn = runner(method.init, (P(), P()), method.specs)
  lowered = jax.jit(fn).lower(KEY, make_params())
  memory = lowered.compile().memory_analysis()
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


def test_init_never_holds_the_whole_optimizer_on_a_device(mesh):
  zero1 = init_memory(dj.zero1(loss_fn, ADAMW), mesh(N))
  # The parameters and 1/N of the moments: they are cut with no copy made.
  assert zero1 < (4 + 8 / N) * SIZE * 1.05
  # What that is compared with: DDP's whole moments do not fit in it.
  assert init_memory(dj.ddp(loss_fn, ADAMW), mesh(N)) >= (4 + 8) * SIZE


def test_a_simulated_step_has_no_collective(compiled):
  run = dj.simulate(dj.zero1(loss_fn, ADAMW), workers=2)
  state = run.abstract(KEY, make_params())
  built = run.step.lower(state, BATCH, KEY).compile()
  assert collectives(built.as_text()) == []
  memory = built.memory_analysis()
  total = sum(
    np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)
  )
  assert memory.alias_size_in_bytes == total
