"""Taking and putting, as it is done for TPUs: in parts, by a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.population import coordinates, swapping

pytestmark = pytest.mark.core

N, AXIS = 4, "population"
SHAPES = {"a": (16, 12), "b": (3, 8, 5), "c": (24,), "d": (9,), "e": (11,)}
RATES = [np.asarray(rate) for rate in (0.6, (0.6, 0.3, 0.0), 0.7, 0.5, 0.5)]


@pytest.mark.parametrize("how", ["vmap", "mesh"])
@pytest.mark.parametrize("parts", [2, 100], ids=["a loop", "parts"])
def test_a_tpus_form_is_the_other_to_the_bit(monkeypatch, mesh, how, parts):
  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=(N, *shape)).astype(np.float32)
  tree = {name: draw(shape) for name, shape in SHAPES.items()}
  tree["c"] = tree["c"].astype(jnp.bfloat16)
  if how == "vmap":
    run = spmd.vmap_runner(AXIS, N)
  else:
    made = spmd.make_mesh({AXIS: N}, jax.devices()[:N])
    run = spmd.mesh_runner(made, AXIS, None)
  part = functools.partial(swapping.shuffle_parts, axes=AXIS)

  def step(one, two, key):
    found = swapping.exchange_chosen([one, two], RATES, key, part, AXIS)
    return tuple(found)

  form = lambda: jax.jit(run(step, (P(AXIS), P(AXIS), P()), (P(AXIS),) * 2))
  given = tree, {name: -x for name, x in tree.items()}, jax.random.key(3)
  plain = form()(*given)
  with monkeypatch.context() as m:
    m.setattr(coordinates, "_AT_ONCE", 7)  # 116 are chosen of the largest
    m.setattr(coordinates, "_PARTS", parts)
    m.setattr(swapping, "_CHUNK", 5)
    tpu = lambda *args, tpu, default: tpu(*args)
    m.setattr(jax.lax, "platform_dependent", tpu)
    made = form()
    text = str(jax.make_jaxpr(made)(*given))
    assert "while[" in text
    assert (text.count("scatter[") > 20) == (parts == 100)
    in_parts = made(*given)
  jax.tree.map(np.testing.assert_array_equal, plain, in_parts)
  moved = jax.tree.map(lambda x, y: (x != y).any(), plain[0], tree)
  assert all(moved.values())
