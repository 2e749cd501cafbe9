"""Reports of real programs, compiled for TPUs and GPUs that are not here.

Expected numbers come from the model's sizes and the formulas of ring
algorithms, not from the compiler.
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
from distrain_jax.inspect import compiling

pytestmark = pytest.mark.core

N, ROWS, LENGTH = 8, 32, 128
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "h100:8")
METHODS = {"ddp": dj.ddp, "zero1": dj.zero1}
KEY = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)


@functools.cache
def llama():
  model = dj.models.create("llama", preset="tiny", vocab=256)
  tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  example = {"tokens": tokens, "targets": tokens}
  return dj.models.task(model, "language_model", example)


def abstract_params():
  return jax.eval_shape(llama().init, KEY).params


@functools.cache
def report(name, topology):
  method = METHODS[name](llama().loss_fn, optax.adamw(1e-3), clip_norm=1.0)
  run = dj.distribute(method, dj.inspect.mesh(topology, {"data": -1}))
  rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  batch = {"tokens": rows, "targets": rows}
  state = run.abstract(KEY, abstract_params())
  return dj.inspect.compile(run, state, batch, KEY)


def parameter_bytes():
  leaves = jax.tree.leaves(abstract_params())
  return sum(math.prod(x.shape) * 4 for x in leaves)


def matrix_flops():
  """Forward and backward of one worker's share, by hand."""
  embed, heads, kv, width, hidden, vocab, layers = 128, 4, 2, 32, 352, 256, 4
  tokens = ROWS // N * LENGTH
  block = embed * width * (2 * heads + 2 * kv) + 3 * embed * hidden
  products = 2 * tokens * (layers * block + embed * vocab)
  attention = layers * 2 * 2 * tokens * LENGTH * heads * width
  return 3 * (products + attention)


by_case = pytest.mark.parametrize(
  ("name", "topology"), [(m, t) for t in TOPOLOGIES for m in METHODS]
)


@by_case
def test_bytes_on_the_wire_are_the_analytic_ones(name, topology):
  found = report(name, topology)
  expected = 2 * (N - 1) / N * parameter_bytes()
  assert found.wire_bytes == pytest.approx(expected, rel=0.02)
  kinds = {k: v for k, v in found.wire_by_kind().items() if v > 1000}
  if name == "ddp":
    assert set(kinds) == {"all-reduce"}
  else:
    assert set(kinds) == {"reduce-scatter", "all-gather"}
  assert not any(c.collective.sliced for c in found.step.communication)


@by_case
def test_flops_are_those_of_the_matrix_products(name, topology):
  flops = report(name, topology).flops
  assert flops == pytest.approx(matrix_flops(), rel=0.05)


@by_case
def test_bytes_of_the_state_are_exact(name, topology):
  state = report(name, topology).memory.state
  moments = 2 * parameter_bytes() + 4
  if name == "zero1":  # every leaf of the tiny Llama divides by the workers
    moments = 2 * parameter_bytes() // N + 4
  expected = {"params": parameter_bytes(), "opt_state": moments, "step": 4}
  assert state == expected


@by_case
def test_nothing_in_them_is_unknown(name, topology):
  found = report(name, topology)
  assert not found.step.unknown
  m = found.memory
  assert m.padding >= 0
  assert m.arguments == sum(m.state.values()) + m.batch + m.padding
  assert 0 < found.utilisation < 1
  assert found.step.seconds >= found.exposed_seconds


def sharded(mesh, *shape, spec=None):
  where = NamedSharding(mesh, spec or P())
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


@pytest.mark.parametrize(
  ("topology", "shape", "kind"),
  [
    ("v5e:2x4", (N * 100_000,), "all-reduce"),
    ("v5e:2x4", (N, 96, 1024), "reduce-scatter"),
    ("v5p:2x2x2", (N, 96, 1024), "all-reduce"),  # asynchronous there
  ],
)
def test_a_scatter_that_tpus_turn_into_an_all_reduce_is_found(
  topology, shape, kind
):
  mesh = dj.inspect.mesh(topology, {"data": -1})

  def scatter(x):
    tiled = x.ndim == 1
    return jax.lax.psum_scatter(jnp.sin(x), "data", tiled=tiled)

  f = jax.shard_map(
    scatter, mesh=mesh, in_specs=P(), out_specs=P("data"), check_vma=False
  )
  found = dj.inspect.compile(jax.jit(f), sharded(mesh, *shape))
  (c,) = found.step.communication
  assert c.collective.kind == kind
  assert c.collective.sliced == (kind == "all-reduce")
  assert ("would send half" in str(found)) == c.collective.sliced


ROUNDS, MICRO, WIDTH, LAYERS = 4, 2048, 512, 4


def gradient(w, x):
  def loss(w):
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)

  return jax.grad(loss)(w)


def serial(w, x):
  """Gradients of all micro-batches, then their exchange."""
  add = lambda total, x: (total + gradient(w, x), None)
  total, _ = jax.lax.scan(add, jnp.zeros_like(w), x)
  parts = total.reshape(N, -1, 1024)
  mine = jax.lax.psum_scatter(parts, "data", scatter_dimension=0)
  return jax.lax.all_gather(0.1 * mine, "data")


def overlapped(w, x):
  """A slice of another gradient's scatter goes with each micro-batch."""
  slices = w.reshape(ROUNDS, N, -1, 1024)

  def body(carry, now):
    total, store, before = carry
    i, micro, part = now
    # The slice of the iteration before is stored here: its done comes last.
    store = jax.lax.dynamic_update_index_in_dim(
      store, before, jnp.maximum(i - 1, 0), 0
    )
    scattered = jax.lax.psum_scatter(part, "data", scatter_dimension=0)
    return (total + gradient(w, micro), store, scattered), None

  store = jnp.zeros((ROUNDS, *slices.shape[2:]))
  start = (jnp.zeros_like(w), store, store[0])
  (total, store, last), _ = jax.lax.scan(
    body, start, (jnp.arange(ROUNDS), x, slices)
  )
  return total, store.at[-1].set(last)


@pytest.mark.parametrize("topology", ["v6e:2x4", "h100:8"])
def test_an_overlapped_program_is_told_from_a_serial_one(topology):
  mesh = dj.inspect.mesh(topology, {"data": -1})
  found = {}
  for program in (serial, overlapped):
    f = jax.shard_map(
      lambda w, x, p=program: jax.tree.map(lambda y: y[None], p(w, x)),
      mesh=mesh,
      in_specs=(P(), P(None, "data")),
      out_specs=P("data"),
      check_vma=False,
    )
    found[program] = dj.inspect.compile(
      jax.jit(f),
      sharded(mesh, LAYERS, WIDTH, WIDTH),
      sharded(mesh, ROUNDS, N * MICRO, WIDTH, spec=P(None, "data")),
    )
  bare, hidden = found[serial], found[overlapped]
  assert bare.exposed_seconds > 0.9 * bare.communication_seconds > 0
  assert hidden.exposed_seconds < 0.1 * hidden.communication_seconds
  (scatter,) = hidden.step.communication
  assert scatter.runs == ROUNDS
  # The forward and backward loops of a micro-batch are between start and done.
  assert scatter.window.flops >= 6 * LAYERS * MICRO * WIDTH**2


def test_a_run_moves_to_a_topology_of_as_many_devices(mesh):
  method = dj.zero1(llama().loss_fn, optax.adamw(1e-3), clip_norm=1.0)
  rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  batch = {"tokens": rows, "targets": rows}
  expected = report("zero1", "v5e:2x4")
  for run in (dj.distribute(method, mesh(N)), dj.simulate(method, workers=N)):
    state = run.abstract(KEY, abstract_params())
    found = dj.inspect.compile(run, state, batch, KEY, topology="v5e:2x4")
    assert found.memory == expected.memory
    assert found.step == expected.step
    with pytest.raises(ValueError, match=r"256 devices.*inspect\.mesh"):
      dj.inspect.compile(run, state, batch, KEY, topology="v5e:16x16")


def test_a_simulated_run_is_compiled_for_one_device_or_one_a_worker(mesh):
  def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"]) ** 2), {}

  method = dj.local_sgd(loss_fn, optax.sgd(0.1), sync_every=2)
  params = {"w": jax.ShapeDtypeStruct((256, 128), jnp.float32)}
  batch = {"x": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
  on_one = dj.simulate(method, workers=4, mesh=mesh(1))
  for run in (on_one, dj.simulate(method, workers=4)):
    state = run.abstract(KEY, params)
    of = functools.partial(dj.inspect.compile, run, state, batch, KEY)
    alone = of(topology="v5e:1x1")
    assert alone.devices == 1 and alone.wire_bytes == 0
    assert alone.memory.state["params"] == 4 * 256 * 128 * 4
    apart = of(topology="v5e:2x2")
    assert apart.devices == 4 and apart.wire_bytes > 0
    assert apart.memory.state["params"] == 256 * 128 * 4
  here = dj.inspect.compile(on_one, on_one.abstract(KEY, params), batch, KEY)
  assert here.memory.state == alone.memory.state


def test_members_that_share_a_device_still_do_with_other_options(mesh):
  def loss_fn(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"]) ** 2), {}

  method = dj.ensemble(loss_fn, optax.sgd(0.1), axis="data", inner="member")
  run = dj.distribute(method, mesh(2), per_device=2)
  state = run.abstract(KEY, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
  batch = {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
  options = {"xla_cpu_enable_fast_math": False}
  for more in ({}, {"compiler_options": options}):
    found = dj.inspect.compile(run, state, batch, KEY, **more)
    assert found.memory.state["params"] == 2 * 8 * 8 * 4


def test_a_report_is_of_the_run_s_own_program(mesh):
  method = dj.ddp(llama().loss_fn, optax.sgd(0.1))
  rows = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
  batch = {"tokens": rows, "targets": rows}
  for donate in (True, False):
    run = dj.distribute(method, mesh(2), donate=donate)
    state = run.abstract(KEY, abstract_params())
    aliased = dj.inspect.compile(run, state, batch, KEY).memory.aliased
    assert (aliased >= parameter_bytes()) == donate


def test_here_a_report_has_bytes_but_no_times(mesh):
  method = dj.ddp(llama().loss_fn, optax.sgd(0.1))
  run = dj.distribute(method, mesh(2))
  rows = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
  state = run.abstract(KEY, abstract_params())
  found = dj.inspect.compile(run, state, {"tokens": rows, "targets": rows}, KEY)
  assert found.chip is None
  assert found.wire_bytes == pytest.approx(parameter_bytes(), rel=0.01)
  assert found.step.seconds == 0
  assert "no times" in str(found)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((lambda x: x, jnp.ones(2)), "jax.jit"),
    ((jax.jit(lambda x: x), jax.ShapeDtypeStruct((2,), "float32")), "sharding"),
  ],
)
def test_what_cannot_be_compiled_is_refused_before(arguments, message):
  with pytest.raises((TypeError, ValueError), match=message):
    compiling.compile(*arguments, topology="v5e:2x4")


def test_a_run_needs_the_arguments_of_its_step():
  run = dj.simulate(dj.ddp(llama().loss_fn, optax.sgd(0.1)), workers=2)
  with pytest.raises(ValueError, match=r"state, batch, key"):
    dj.inspect.compile(run, abstract_params())
  state = run.abstract(KEY, abstract_params())
  with pytest.raises(ValueError, match="simulated"):
    dj.inspect.compile(run, state, {}, KEY)
