"""The coordinate check: flat under muP, growing without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import learned
from distrain_jax.learned import meta

KEY = jax.random.key(0)


def build(make_tx, mup):
  def probe(width, key):
    net = meta.MLP(64, (width,) * 3, 10, mup)
    loss = lambda p, b: meta.cross_entropy(net.apply(p, b["x"]), b["y"])
    layers = lambda p, b: {
      f"layer {i}": x for i, x in enumerate(net.hidden(p, b["x"])[:-1])
    }
    tx = make_tx(net.multipliers())
    return learned.Probe(jax.jit(net.init)(key), loss, layers, tx)

  return probe


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 64)).astype(np.float32)
  return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, 10, 64))}


@pytest.mark.full  # half a minute of compiling
def test_a_learned_rule_moves_all_widths_alike_under_mup_only(batch):
  theta = jax.jit(learned.init_theta)(KEY)
  made = lambda size: (
    lambda mup: learned.mulo(theta, mup=mup, step_mult=size, tile=10**6)
  )
  flat = learned.coord_check(build(made(0.01), True), (32, 256), batch, steps=6)
  grown = learned.coord_check(
    build(made(0.001), False), (32, 256), batch, steps=6
  )
  for ratio in flat.growth().values():
    assert 1 / 1.3 < ratio < 1.3
  assert grown.growth()["layer 2"] > 5
  assert flat.moved["layer 0"].shape == (2, 6)


@pytest.fixture(scope="module")
def adam(batch):
  mup = lambda mup: learned.mup_adamw(0.02, mup)
  return learned.coord_check(build(mup, True), (32, 256), batch, steps=6)


def test_adam_moves_all_widths_alike_under_mup_only(adam, batch):
  sp = lambda mup: optax.adam(1e-3)
  grown = learned.coord_check(build(sp, False), (32, 256), batch, steps=6)
  for ratio in adam.growth().values():
    assert 1 / 1.3 < ratio < 1.3
  assert grown.growth()["layer 2"] > 2


def test_a_picture_of_it(adam, tmp_path):
  path = tmp_path / "coordinates.png"
  learned.draw_coordinates({"muP": adam, "again": adam}, path)
  assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("widths", [(64,), (64, 32), (64, 64)])
def test_widths_that_show_nothing_are_refused(widths):
  with pytest.raises(ValueError, match=r"two or more, ascending"):
    learned.coord_check(None, widths, None)
