import ast
import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import models


def test_an_unknown_model_names_the_nearest_and_all():
  with pytest.raises(ValueError, match=r"'resnet8' .* Did you mean 'resnet18'"):
    models.create("resnet8")
  with pytest.raises(
    ValueError,
    match="Valid: gpt_neo, llama, mlp, resnet18, resnet34, resnet50, rev_llama, "
    "rev_mlp, rev_vit, revnet18, revnet34, revnet50, vit",
  ):
    models.create("transformer")


@pytest.mark.parametrize(
  "name",
  [
    "mlp",
    "resnet18",
    "resnet50",
    "vit",
    "llama",
    "gpt_neo",
    "rev_mlp",
    "revnet18",
    "revnet50",
    "rev_vit",
    "rev_llama",
  ],
)
def test_every_valid_option_is_accepted_at_its_default(name):
  model = models.create(name)
  fields = getattr(model, "config", model)
  options = models.valid_options(name)
  values = {n: getattr(fields, n) for n in options if n != "preset"}
  assert models.create(name, **values) == model


def test_options_go_before_the_preset_and_head_dim_follows_them():
  config = models.create("llama", preset="134M", heads=8, kv_heads=8).config
  assert (config.head_dim, config.mlp, config.layers) == (96, 2048, 12)
  config = models.create("llama", preset="134M", layers=2).config
  preset = models.PRESETS["134M"]
  assert config == dataclasses.replace(preset, layers=2)


def test_a_list_of_widths_from_a_config_file_is_a_tuple():
  assert models.create("mlp", widths=[8, 8]) == models.create(
    "mlp", widths=(8, 8)
  )


def test_init_depends_on_the_key_alone():
  model = models.create("mlp", widths=())
  small, large = jnp.zeros((1, 8, 8, 1)), jnp.ones((3, 64))
  start = lambda seed, x: models.init(model, jax.random.key(seed), x).params
  new = start(0, small)
  jax.tree.map(np.testing.assert_array_equal, new, start(0, large))
  other = start(1, small)["output"]["kernel"]
  assert (other != new["output"]["kernel"]).any()


def test_importing_models_starts_no_backend_and_no_tensorflow():
  code = """
import sys
import distrain_jax.models
from jax._src import xla_bridge
print([xla_bridge.backends_are_initialized(), "tensorflow" in sys.modules,
       "equinox" in sys.modules])
"""
  command = [sys.executable, "-c", code]
  out = subprocess.run(command, check=True, capture_output=True, text=True)
  assert ast.literal_eval(out.stdout) == [False, False, False]
