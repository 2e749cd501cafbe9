"""The weights in the package: there, described, and worth using."""

import importlib.resources

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
