"""New Vision Transformers: their sizes, weights, and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models
from distrain_jax.models import vit


def test_param_dtype_is_the_dtype_of_new_parameters():
  model = models.create("vit", param_dtype="bfloat16")
  params = models.abstract(model, jnp.zeros((1, 8, 8, 1))).params
  dtypes = {x.dtype for x in jax.tree.leaves(params)}
  assert dtypes == {jnp.dtype("bfloat16")}


def test_new_weights_are_glorot_s_and_predict_nothing():
  model, images = models.create("vit"), np.ones((2, 28, 28, 1), np.float32)
  params = models.init(model, jax.random.key(0), images).params
  bound = lambda fans: np.sqrt(6 / fans)
  stacked = params["blocks"]["attention"] | params["blocks"]["feed_forward"]
  widths = {"up": 64 + 128, "down": 64 + 128}
  for name, x in stacked.items():
    if "bias" in name:
      assert (x == 0).all()
    else:
      limit = bound(widths.get(name, 64 + 64))
      assert 0.99 * limit < np.abs(x).max() <= limit
      np.testing.assert_allclose(x.std(), limit / np.sqrt(3), rtol=0.02)
      assert (x[0] != x[1]).mean() > 0.999
  patch = np.abs(params["patch"]).max()
  assert 0.98 * bound(16 + 64) < patch <= bound(16 + 64)
  np.testing.assert_allclose(params["position"].std(), 0.02, rtol=0.05)
  logits = jax.jit(model.apply)({"params": params}, images)
  assert (logits == 0).all()


def count(c, patches, channels):
  """From the architecture's description alone."""
  e, m = c.embed, c.mlp
  attention = 4 * (e * e + e)
  feed_forward = 2 * e * m + m + e
  block = attention + feed_forward + 2 * 2 * e  # two norms
  stem = c.patch**2 * channels * e + e + patches * e
  return stem + c.layers * block + 2 * e + (e + 1) * c.classes


TOTALS = {  # of images of this side and so many channels
  "tiny": (28, 1, 138_890),
  "S/16": (224, 3, 22_049_896),
  "B/16": (224, 3, 86_566_120),
}


@pytest.mark.parametrize("preset", TOTALS)
def test_presets_have_their_stated_number_of_parameters(preset):
  assert vit.PRESETS.keys() == TOTALS.keys()
  side, channels, total = TOTALS[preset]
  images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
  for options in ({}, {"scan": False, "layers": 2}, {"positions": "sincos"}):
    model = models.create("vit", preset=preset, **options)
    c, params = model.config, models.abstract(model, images).params
    learned = (side // c.patch) ** 2 * (c.positions == "learned")
    wanted = count(c, learned, channels)
    assert sum(x.size for x in jax.tree.leaves(params)) == wanted
    assert options or wanted == total


@pytest.mark.parametrize(
  "options, message",
  [
    ({"embed": 66}, "embed=66 is not a multiple of heads=4"),
    (
      {"embed": 66, "heads": 3, "positions": "sincos"},
      "embed=66 must be a multiple of 4 for positions='sincos'",
    ),
    ({"positions": "sine"}, "positions='sine' .* Valid: learned, sincos"),
    ({"patch": 0}, "`patch` must be a whole number above 0; got 0"),
    ({"layers": 2.5}, "`layers` must be a whole number above 0; got 2.5"),
    ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\); got 1.0"),
    ({"remat": "dot"}, "remat='dot' is not known. Did you mean 'dots'"),
    ({"attention": "flash"}, "attention='flash' .* Valid: cudnn, xla"),
    ({"dtype": "bf16"}, "dtype='bf16' is not known. Did you mean 'bfloat16'"),
    ({"preset": "s/16"}, "preset='s/16' is not known. Did you mean 'S/16'"),
    ({"kv_heads": 2}, "vit has no option 'kv_heads'. Did you mean 'heads'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("vit", **options)
