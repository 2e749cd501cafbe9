"""The command there and back, and what it says of bad input."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distrain_jax.models import weights

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "convert_weights.py"
CONFIG = {
  "model_type": "llama",
  "hidden_size": 8,
  "intermediate_size": 6,
  "num_attention_heads": 2,
  "num_hidden_layers": 2,
  "tie_word_embeddings": True,
  "vocab_size": 5,
}


@pytest.fixture(scope="module")
def main():
  spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.main


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  shapes = {"model.embed_tokens.weight": (5, 8), "model.norm.weight": (8,)}
  for k in range(2):
    p = f"model.layers.{k}."
    for name in "qkvo":
      shapes[f"{p}self_attn.{name}_proj.weight"] = (8, 8)
    for name, shape in (("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6))):
      shapes[f"{p}mlp.{name}_proj.weight"] = shape
    for name in ("input_layernorm", "post_attention_layernorm"):
      shapes[f"{p}{name}.weight"] = (8,)
  tensors = {
    k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()
  }
  folder = tmp_path / "theirs"
  folder.mkdir()
  save_file(tensors, folder / "model.safetensors", {"format": "pt"})
  (folder / "config.json").write_text(json.dumps(CONFIG))
  return folder


def test_there_and_back_is_the_same(main, folder, tmp_path, capsys):
  file, back = tmp_path / "new" / "ours.safetensors", tmp_path / "back"
  assert main(["import", str(folder), str(file)]) == 0
  assert '"name": "llama"' in capsys.readouterr().out
  assert weights.model_of(file)["kv_heads"] == 2
  assert "blocks/attention/query" in load_file(file)
  assert main(["export", str(file), str(back)]) == 0
  theirs = load_file(folder / "model.safetensors")
  found = load_file(back / "model.safetensors")
  assert found.keys() == theirs.keys()
  for name, x in theirs.items():
    np.testing.assert_array_equal(found[name], x)
  config = json.loads((back / "config.json").read_text())
  assert config | CONFIG == config


def test_nothing_is_replaced_unless_asked_for(main, folder, tmp_path, capsys):
  file = tmp_path / "ours.safetensors"
  file.write_text("precious")
  assert main(["import", str(folder), str(file)]) == 2
  assert "--overwrite" in capsys.readouterr().err
  assert file.read_text() == "precious"
  assert main(["import", str(folder), str(file), "--overwrite"]) == 0
  assert weights.model_of(file)


def test_bad_input_is_explained_and_leaves_nothing(
  main, folder, tmp_path, capsys
):
  out = tmp_path / "out"
  assert main(["import", str(tmp_path / "none"), str(out)]) == 2
  assert "none" in capsys.readouterr().err
  (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 6}))
  assert main(["import", str(folder), str(out)]) == 2
  error = capsys.readouterr().err
  assert "'model.embed_tokens.weight' is (5, 8), but (6, 8)" in error
  weights.save(tmp_path / "x.safetensors", {"x": np.zeros(3, np.float32)})
  assert main(["export", str(tmp_path / "x.safetensors"), str(out)]) == 2
  assert "does not say what model" in capsys.readouterr().err
  assert not out.exists()
