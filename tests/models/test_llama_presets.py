"""Sizes of the presets, and options that cannot be."""

import jax
import jax.numpy as jnp
import pytest

from distrain_jax import models


def count(config):
  """From the architecture's description alone."""
  e, d, m = config.embed, config.head_dim, config.mlp
  attention = 2 * e * config.heads * d + 2 * e * config.kv_heads * d
  block = attention + 3 * e * m + 2 * e
  tables = (1 if config.tied else 2) * config.vocab * e
  return config.layers * block + e + tables


def size(model):
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  params = models.abstract(model, tokens).params
  return sum(x.size for x in jax.tree.leaves(params))


TOTALS = {
  "tiny": 803_968,
  "134M": 134_105_856,
  "500M": 501_007_872,
  "1B": 1_104_218_112,
}


@pytest.mark.parametrize("preset", TOTALS)
def test_presets_have_their_stated_number_of_parameters(preset):
  assert models.PRESETS.keys() == TOTALS.keys()
  for options in ({}, {"tied": True}, {"scan": False, "kv_heads": 1}):
    model = models.create("llama", preset=preset, **options)
    assert size(model) == count(model.config)
  assert count(models.PRESETS[preset]) == TOTALS[preset]


def test_the_1b_blocks_are_those_of_llama_3_2():
  model = models.create("llama", preset="1B", vocab=128_256, tied=True)
  assert size(model) == 1_235_814_400  # as published


@pytest.mark.parametrize(
  "options, message",
  [
    ({"heads": 6, "kv_heads": 4, "embed": 12}, "multiple of kv_heads=4"),
    ({"embed": 130}, "embed=130 is not a multiple of heads=4"),
    ({"head_dim": 5}, "head_dim=5 .* must be even"),
    ({"layers": 0}, "`layers` must be a whole number above 0; got 0"),
    ({"mlp": 2.5}, "`mlp` must be a whole number above 0; got 2.5"),
    ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\); got 1.0"),
    ({"remat": "dot"}, "remat='dot' is not known. Did you mean 'dots'"),
    ({"attention": "flash"}, "attention='flash' .* Valid: cudnn, xla"),
    ({"dtype": "bf16"}, "dtype='bf16' is not known. Did you mean 'bfloat16'"),
    ({"preset": "1b"}, "preset='1b' is not known. Did you mean '1B'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.create("llama", **options)
