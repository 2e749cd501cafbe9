"""The weights in the package: there, described, and worth using."""

import importlib.resources
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import learned
from distrain_jax.learned import meta, storage

FOLDER = importlib.resources.files("distrain_jax.learned") / "weights"


def test_every_file_has_a_card_and_says_how_it_was_made():
  files = [f for f in FOLDER.iterdir() if f.name.endswith(".safetensors")]
  assert "mulo.safetensors" in {f.name for f in files}
  for file in files:
    theta, metadata = learned.load_theta(str(file))
    assert {"step_mult", "mup", "meta_steps", "tasks"} <= metadata.keys()
    assert all(np.isfinite(x).all() for x in theta.values())
    card = (FOLDER / file.name.replace(".safetensors", ".md")).read_text()
    assert f"{int(metadata['meta_steps']):,} meta-steps" in card


@pytest.mark.parametrize("mup", [True, False])
def test_they_are_made_with_what_mulo_has_by_default(mup):
  _, made = storage.shipped("test", mup)
  assert made.mup is mup
  usual = inspect.signature(learned.scale_by_mulo).parameters
  others = {k: x for k, x in made.options.items() if k != "step_mult"}
  assert others and others == {k: usual[k].default for k in others}


def test_metadata_becomes_options_of_mulo():
  metadata = {"step_mult": "0.5", "exp_mult": "1e-3", "feature_eps": "1e-05"}
  metadata |= {"update_norm": "rms", "eps_scaling": "", "tasks": "x"}
  options = {"step_mult": 0.5, "exp_mult": 0.001, "feature_eps": 1e-5}
  wanted = storage.MadeWith({**options, "update_norm": "rms"}, None)
  assert storage.made_with("x", metadata) == wanted
  metadata |= {"update_norm": "None", "eps_scaling": "fan_in", "mup": "none"}
  wanted = storage.MadeWith({**options, "eps_scaling": "fan_in"}, False)
  assert storage.made_with("x", metadata) == wanted
  assert storage.made_with("x", {}) == storage.MadeWith({}, None)


@pytest.mark.parametrize(
  ("metadata", "says"),
  [
    ({"step_mult": "big"}, "x: its metadata has step_mult='big', wanted a num"),
    ({"mup": "relative"}, "x: its metadata has mup='relative', wanted absolut"),
  ],
)
def test_metadata_that_cannot_be_read_is_refused(metadata, says):
  with pytest.raises(ValueError, match=says):
    storage.made_with("x", metadata)


def test_they_train_a_network_they_never_saw_as_well_as_mup_adam():
  task = meta.mlp_task(meta.teacher_data(), (48, 48))
  steps, key = 150, jax.random.key(0)
  mulo = meta.trained(task, lambda _: learned.mulo(mup=task.mup), steps)
  adam = meta.trained(task, lambda r: learned.mup_adamw(r, task.mup), steps)
  ours = mulo((), task.data, key)[1][-20:].mean()
  rates = (0.03, 0.1, 0.3)
  theirs = [adam(jnp.asarray(r), task.data, key)[1][-20:].mean() for r in rates]
  assert float(ours) < 1.1 * float(min(theirs))


def test_without_mup_the_message_says_what_the_weights_are_for(monkeypatch):
  files = {**storage.SHIPPED, False: "absent.safetensors"}
  monkeypatch.setattr(storage, "SHIPPED", files)
  with pytest.raises(ValueError, match=r"mup=None\).*mup_multipliers\(params"):
    learned.mulo()
