"""What SDP holds and sends, by the formulas and as compiled for hardware."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

import distrain_jax as dj
from distrain_jax import inspect

pytestmark = pytest.mark.core

N = 8
KEY = jax.eval_shape(lambda: jax.random.key(0))
ADAMW = optax.adamw(1e-3, weight_decay=0.1)
TOPOLOGIES = ("v5e:2x4", "h100:8")
by_topology = pytest.mark.parametrize("topology", TOPOLOGIES)

DEPTH, WIDTH, HIDDEN, ROWS = 4, 256, 1024, 512  # rows of a worker
NAMES = {
  "up": ("layers", "embed", "mlp"),
  "down": ("layers", "mlp", "embed"),
  "out": ("embed", None),
}


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


PARAMS = {
  "up": shape(DEPTH, WIDTH, HIDDEN),
  "down": shape(DEPTH, HIDDEN, WIDTH),
  "out": shape(WIDTH, 128),
}
SAMPLED, SHARED = 2 * DEPTH * WIDTH * HIDDEN, WIDTH * 128
BATCH = {"x": shape(N * ROWS, WIDTH)}


def network(params, batch, key):
  def layer(h, p):
    return h + jnp.tanh(h @ p["up"]) @ p["down"], None

  x = batch["x"].astype(params["out"].dtype)
  h, _ = jax.lax.scan(layer, x, {k: params[k] for k in ("up", "down")})
  return jnp.mean(jnp.square(h @ params["out"]).astype(jnp.float32)), {}


def method(**options):
  return dj.sdp(network, ADAMW, names=NAMES, shapes=PARAMS, **options)


@functools.cache
def compiled(topology, **options):
  mesh = inspect.mesh(topology, {"data": -1})
  run = dj.distribute(method(**options), mesh)
  return inspect.compile(run, run.abstract(KEY, PARAMS), BATCH, KEY)


# Bytes on the wire of a worker: the sampled gradients to their owners and back,
# and an all-reduce of the shared ones.
def expected_bytes(coverage, itemsize):
  holders = round(coverage * N)
  ring = 2 * (holders - 1) / N * SAMPLED
  return itemsize * (ring + 2 * (N - 1) / N * SHARED)


@by_topology
def test_no_activation_is_ever_sent(topology):
  """All bytes on the wire are those of gradients, and a few scalars."""
  report = compiled(topology, coverage=0.5, clip_norm=1.0)
  found = [c.collective for c in report.step.communication]
  runs = [c.runs for c in report.step.communication]
  sent = sum(c.wire_bytes * n for c, n in zip(found, runs))
  exact = expected_bytes(0.5, 4)
  activation = 4 * ROWS * min(HIDDEN // 2, WIDTH)
  assert activation > 0.05 * exact
  assert abs(sent - exact) < 0.01 * exact
  assert {c.kind for c in found} == {"collective-permute", "all-reduce"}
  assert set(runs) == {1}  # none inside of a layer
  assert not report.step.unknown


@by_topology
def test_arguments_are_the_state_of_what_a_worker_holds(topology):
  memory = compiled(topology, coverage=0.5, clip_norm=1.0).memory
  # Parameters and two moments; with the gradient, a temporary, 16 bytes.
  exact = 12 * (0.5 * SAMPLED + SHARED)
  state = sum(memory.state.values())
  assert exact <= state <= 1.01 * exact
  assert memory.arguments <= 1.01 * (exact + 4 * ROWS * WIDTH)
  # Masks on whole arrays would have as much as DDP has.
  mesh = inspect.mesh(topology, {"data": -1})
  run = dj.distribute(dj.ddp(network, ADAMW, clip_norm=1.0), mesh)
  ddp = inspect.compile(run, run.abstract(KEY, PARAMS), BATCH, KEY).memory
  assert state < 0.6 * sum(ddp.state.values())
  assert memory.peak < 0.8 * ddp.peak


def test_owners_and_low_precision_as_compiled():
  options = {"param_dtype": "bfloat16", "wire_dtype": "bfloat16"}
  memory = compiled(
    "v5e:2x4", coverage=0.25, shard_optimizer=True, **options
  ).memory
  # Two bytes of what a worker holds, twelve of what it owns.
  exact = 2 * (SAMPLED / 4 + SHARED) + 12 / N * (SAMPLED + SHARED)
  state = sum(memory.state.values())
  assert exact <= state <= 1.01 * exact


ONLY = {"w": shape(64, 32)}


def squares(params, rows, key):
  return jnp.mean((rows["x"].sum() * params["w"]) ** 2), {}


def sent(method, mesh):
  run = dj.distribute(method, mesh(N))
  rows = {"x": shape(N, 4)}
  return inspect.bytes_sent(run, run.abstract(KEY, ONLY), rows, KEY)


@pytest.mark.parametrize("assignment", ["cyclic", "shuffled"])
@pytest.mark.parametrize("holders", [1, 2, 4, 8])
def test_a_step_sends_holders_less_one_parts_of_an_all_reduce(
  holders, assignment, mesh
):
  size = 4 * math.prod(ONLY["w"].shape)
  of_ddp = sent(dj.ddp(squares, optax.sgd(0.1)), mesh)["psum"]
  assert size * 2 * (N - 1) / N <= of_ddp < size * 2 * (N - 1) / N + 20
  for shard in (False, True):
    found = sent(
      dj.sdp(
        squares,
        optax.sgd(0.1),
        names={"w": ("hidden", None)},
        shapes=ONLY,
        coverage=holders / N,
        assignment=assignment,
        shard_optimizer=shard,
      ),
      mesh,
    )
    share = (holders / N * N - 1) / (N - 1)
    assert found.get("ppermute", 0) == share * size * 2 * (N - 1) / N
    assert found["psum"] < 20  # loss and norm
    assert found.keys() <= {"ppermute", "psum"}


@pytest.mark.parametrize("holders", [1, 4])
def test_backward_masking_sends_every_worker_the_whole_model(holders, mesh):
  size = 4 * math.prod(ONLY["w"].shape)
  found = sent(
    dj.sdp(
      squares,
      optax.sgd(0.1),
      names={"w": ("hidden", None)},
      shapes=ONLY,
      coverage=holders / N,
      masking="backward",
      shard_optimizer=True,
    ),
    mesh,
  )
  assert found["all_gather"] == (N - 1) / N * size
  assert found.get("ppermute", 0) == (holders - 1) / N * size
