"""What compilers make of a shuffle: one small message, and no copies.

For eight CPU devices, and for a TPU and a GPU topology that need not be there.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import inspect

pytestmark = pytest.mark.core

N, KEY = 8, jax.random.key(0)
SHAPES = {"w": (512, 1024), "stack": (4, 256, 256), "norm": (4, 96)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
TOPOLOGIES = ("cpu", "v5e:2x4", "h100:8")


def loss_fn(params, batch, key):
  del key
  hidden = jnp.tanh(batch["x"] @ params["w"])
  rest = sum((params[name] ** 2).sum() for name in ("stack", "norm"))
  return jnp.mean(hidden**2) + rest, {}


@pytest.fixture(scope="module")
def compiled(mesh):
  """(where, method, options) -> Report."""

  @functools.cache
  def make(where, name="wash", **options):
    tx = optax.sgd(0.1, momentum=0.9)
    method = getattr(dj, name)(loss_fn, tx, **options)
    if where == "cpu":
      devices = jax.devices()[:N]
      made = dj.spmd.make_mesh({method.axis: N}, devices)
    else:
      made = inspect.mesh(where, {method.axis: -1})
    run = dj.distribute(method, made)
    stacked = lambda s: jax.ShapeDtypeStruct((N, *s), jnp.float32)
    params = {name: stacked(shape) for name, shape in SHAPES.items()}
    state = run.abstract(KEY, params, per_worker=True)
    batch = {"x": jax.ShapeDtypeStruct((N * 4, 512), jnp.float32)}
    return inspect.compile(run, state, batch, jax.eval_shape(lambda: KEY))

  return make


def sent(report):
  """Bytes of each collective that are not the metrics' few numbers."""
  found = [c.collective for c in report.step.communication]
  return [(c.kind, c.wire_bytes) for c in found if c.bytes > 4 * (2 * N + 8)]


@pytest.mark.parametrize("where", TOPOLOGIES)
def test_one_all_to_all_of_what_the_rate_asks_for(compiled, where):
  for rate in (0.002, 0.02):
    report = compiled(where, rate=rate, layer_schedule="constant")
    ((kind, wire),) = sent(report)
    assert kind == "all-to-all"
    wanted = rate * SIZE * 4 * (N - 1) / N
    assert wanted <= wire < 1.1 * wanted
  both = compiled(
    where, rate=0.02, layer_schedule="constant", shuffle_optimizer=True
  )
  ((_, twice),) = sent(both)  # weights and momentum, in one message
  np.testing.assert_allclose(twice, 2 * wire)


@pytest.mark.parametrize("where", TOPOLOGIES)
def test_an_ensemble_sends_nothing_but_metrics(compiled, where):
  assert not sent(compiled(where, "ensemble"))
  assert not sent(compiled(where, rate=0.0))


@pytest.mark.parametrize("where", ["h100:8"])
def test_a_shuffle_needs_no_copies_of_the_weights(compiled, where):
  alone = compiled(where, "ensemble").memory
  shuffled = compiled(where, rate=0.02, layer_schedule="constant").memory
  assert shuffled.temporaries - alone.temporaries < 0.05 * SIZE * 4
  assert shuffled.outputs - shuffled.aliased < 4096  # all of it in place


@pytest.mark.parametrize("where", ["cpu"])
def test_the_neighbours_send_as_they_promise(compiled, where):
  ((kind, wire),) = sent(
    compiled(where, "sparta", rate=0.02, layer_schedule="constant")
  )
  assert kind == "all-reduce"
  wanted = 2 * 0.02 * SIZE * 4 * (N - 1) / N
  assert wanted <= wire < 1.1 * wanted
  papa = sent(compiled(where, "papa", every=10, tied=False))
  whole = 2 * SIZE * 4 * (N - 1) / N
  np.testing.assert_allclose(sum(wire for _, wire in papa), whole, rtol=0.01)
