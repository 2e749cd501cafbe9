"""ACCO's promises of overlap, bytes and memory, on compiled programs.

A small scanned network in the default suite; GPT-Neo 125M, which takes minutes
to compile, under the marker `full`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import distrain_jax as dj

N = 8
KEY = jax.eval_shape(lambda: jax.random.key(0))
LOW = {"clip_norm": 1.0, "wire_dtype": "bfloat16", "param_dtype": "bfloat16"}
ADAMW = optax.adamw(1e-3, weight_decay=0.1)
TOPOLOGIES = ("v5e:2x4", "v6e:2x4", "h100:8")
by_topology = pytest.mark.parametrize("topology", TOPOLOGIES)

DEPTH, WIDTH, ROWS, K = 4, 1024, 1024, 8


def network(params, batch, key):
  layer = lambda h, w: (jnp.tanh(h @ w), None)
  h, _ = jax.lax.scan(layer, batch["x"].astype(jnp.bfloat16), params["layers"])
  return jnp.mean(jnp.square(h @ params["out"]).astype(jnp.float32)), {}


def shape(*sizes, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = {"layers": shape(DEPTH, WIDTH, WIDTH), "out": shape(WIDTH, 1000)}
BATCH = {"x": shape(N * 2 * K * ROWS, WIDTH, dtype=jnp.float32)}


def size(params):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def compile_step(method, topology, params, batch):
  run = dj.distribute(method, dj.inspect.mesh(topology, {"data": -1}))
  return dj.inspect.compile(run, run.abstract(KEY, params), batch, KEY)


def make(name, loss_fn, k):
  """With as many micro-batches and updates a step as ACCO's."""
  micro = k if name == "acco" else 2 * k
  return getattr(dj, name)(loss_fn, ADAMW, accumulate=micro, **LOW)


@functools.cache
def small(name, topology):
  return compile_step(make(name, network, K), topology, PARAMS, BATCH)


def parameters_sent(report):
  """Collectives of more than the scalars."""
  return [c for c in report.step.communication if c.collective.bytes > 1000]


def assert_hidden(report, share):
  total = report.communication_seconds
  assert total > 0
  assert report.exposed_seconds <= (1 - share) * total
  assert not report.step.unknown


@pytest.mark.core
@by_topology
def test_the_communication_runs_beside_micro_batches(topology):
  found = small("acco", topology)
  assert_hidden(found, 0.99)
  for c in parameters_sent(found):
    # A product of one layer at least is between its start and its done.
    assert c.window.flops >= 2 * ROWS * WIDTH**2


@pytest.mark.core
@by_topology
def test_a_round_is_two_scatters_and_two_gathers(topology):
  found = small("acco", topology)
  once = 2 * size(PARAMS) * (N - 1) / N  # bfloat16
  kinds = {"all-gather": 0.0, "reduce": 0.0}
  for c in parameters_sent(found):
    gathers = c.collective.kind == "all-gather"
    assert gathers or c.collective.kind in ("reduce-scatter", "all-to-all")
    assert not c.collective.sliced
    kinds["all-gather" if gathers else "reduce"] += (
      c.collective.wire_bytes * c.runs
    )
  assert kinds == pytest.approx(dict.fromkeys(kinds, 2 * once), rel=0.01)
  # K // 2 slices in each half, one message for all leaves.
  assert [c.runs for c in parameters_sent(found)] == [K // 2 * 2] * 2


@pytest.mark.core
def test_zero1_s_communication_is_bare_on_the_same_network():
  found = small("zero1", "v5e:2x4")
  assert found.exposed_seconds > 0.9 * found.communication_seconds


@pytest.mark.core
@by_topology
def test_the_state_is_four_bytes_and_fourteen_over_n(topology):
  state = sum(small("acco", topology).memory.state.values())
  exact = (4 + 14 / N) * size(PARAMS)
  assert exact <= state <= 1.01 * exact
  assert state < (6 + 12 / N) * size(PARAMS)


@pytest.mark.core
def test_a_gpu_s_temporaries_are_zero1_s_and_one_gradient_and_a_slice():
  acco, zero1 = small("acco", "h100:8"), small("zero1", "h100:8")
  gradient = 2 * size(PARAMS)
  limit = zero1.memory.temporaries + gradient + gradient / (K // 2)
  assert acco.memory.temporaries <= limit


# As configs/acco/paper_openwebtext_125m.py has them.
LENGTH, MICRO, HALF, CHUNK = 1024, 6, 4, 128


@functools.cache
def gpt_neo(name, topology):
  model = dj.models.create(
    "gpt_neo",
    preset="125M",
    positions=LENGTH,
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="dots_with_no_batch_dims",
  )
  row = shape(1, LENGTH, dtype=jnp.int32)
  example = {"tokens": row, "targets": row}
  task = dj.models.task(model, "language_model", example, logits_chunk=CHUNK)
  rows = shape(N * 2 * HALF * MICRO, LENGTH, dtype=jnp.int32)
  batch = {"tokens": rows, "targets": rows}
  params = jax.eval_shape(task.init, KEY).params
  method = make(name, task.loss_fn, HALF)
  return params, compile_step(method, topology, params, batch)


@pytest.mark.full
@by_topology
def test_gpt_neo_125m_hides_what_zero1_leaves_bare(topology):
  params, acco = gpt_neo("acco", topology)
  assert_hidden(acco, 0.9)
  sent = sum(c.collective.wire_bytes * c.runs for c in parameters_sent(acco))
  once = 2 * size(params) * (N - 1) / N
  assert sent == pytest.approx(4 * once, rel=0.01)
  _, zero1 = gpt_neo("zero1", topology)
  assert zero1.exposed_seconds > 0.3 * zero1.communication_seconds


@pytest.mark.full
@by_topology
def test_gpt_neo_125m_s_temporaries_are_zero1_s_a_gradient_and_a_slice(
  topology,
):
  (params, acco), (_, zero1) = (gpt_neo(m, topology) for m in ("acco", "zero1"))
  gradient = 2 * size(params)
  limit = gradient + gradient / (HALF // 2)
  assert acco.memory.temporaries - zero1.memory.temporaries <= limit
