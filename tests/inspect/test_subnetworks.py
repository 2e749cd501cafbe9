"""Operations of subnetworks, against the products that they need; pictures."""

import jax
import numpy as np
import pytest
from PIL import Image

from distrain_jax.inspect import subnetworks
from distrain_jax.methods.sdp import alone

N, IN, UNITS, OUT, ROWS = 2, 4, 8, 4, 6
NAMES = {"up": ("embed", "mlp"), "down": ("mlp", "embed")}
SHAPES = {
  "up": jax.ShapeDtypeStruct((IN, UNITS), np.float32),
  "down": jax.ShapeDtypeStruct((UNITS, OUT), np.float32),
}


def loss_fn(params, rows, key):
  del key
  out = (rows["x"] @ params["up"]) ** 2 @ params["down"]
  return (out**2).mean(), {}


def products(units):
  """Forward, and by the weights and the hidden units; inputs need none."""
  return 2 * ROWS // N * units * (2 * IN + 3 * OUT)


@pytest.mark.parametrize(
  ("options", "units"),
  [
    ({"coverage": 0.5}, UNITS // 2),
    # The whole gradient is computed, then what is not held left out of it.
    ({"coverage": 0.5, "masking": "backward"}, UNITS),
  ],
)
def test_flops_are_those_of_the_units_that_are_there(options, units):
  each = alone(loss_fn, workers=N, names=NAMES, shapes=SHAPES, **options)
  batch = {"x": jax.ShapeDtypeStruct((ROWS, IN), np.float32)}
  found, dense = subnetworks.flops(each, batch, jax.random.key(0))
  assert found.tolist() == [products(units)] * N
  assert dense == products(UNITS)


def test_workers_with_other_blocks_are_counted_each():
  names = {k: {"w": ("embed", "embed")} for k in ("one", "two")}
  shapes = {
    "one": {"w": jax.ShapeDtypeStruct((IN, IN), np.float32)},
    "two": {"w": jax.ShapeDtypeStruct((IN, 3), np.float32)},
  }

  def loss_fn(params, rows, key):
    del key
    return sum(((rows["x"] @ p["w"]) ** 2).mean() for p in params.values()), {}

  how = {"level": "block", "blocks": ("one", "two"), "coverage": 0.5}
  each = alone(loss_fn, workers=N, names=names, shapes=shapes, **how)
  batch = {"x": jax.ShapeDtypeStruct((ROWS, IN), np.float32)}
  found, dense = subnetworks.flops(each, batch, jax.random.key(0))
  assert found.tolist() == [4 * ROWS // N * IN * m for m in (IN, 3)]
  assert dense == found.sum()


def test_the_picture_has_a_panel_a_point(tmp_path):
  numbers = {
    c: {"cosine": [0.5, 0.7], "norm_ratio": [1, 1], "cosine_to_mean": 0.4}
    for c in ("0.75", "0.5")
  }
  variants = dict.fromkeys(subnetworks.COLOURS, numbers)
  widths = []
  for found in ({"start": variants}, {"start": variants, "later": variants}):
    subnetworks.draw(found, tmp_path / "a.png", title="toy")
    with Image.open(tmp_path / "a.png") as image:
      image.load()
      widths.append(image.size[0])
  assert widths[1] > 1.5 * widths[0]
