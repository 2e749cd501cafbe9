"""Safetensors files: the format's own library reads ours, and we read its."""

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from distrain_jax.models import tensor_files
from distrain_jax.models.tensor_files import Tensor

GIVEN = {
  "half": np.arange(3).astype(ml_dtypes.bfloat16),
  "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
  "scalar": np.array(2.5, np.float64),
  "whole": np.arange(4, dtype=np.int64),
  "empty": np.zeros((0, 3), np.float16),
}


def assert_same(found):
  assert found.keys() == GIVEN.keys()
  for name, x in GIVEN.items():
    assert found[name].dtype == x.dtype
    np.testing.assert_array_equal(found[name], x)


@pytest.fixture
def file(tmp_path):
  return tmp_path / "x.safetensors"


def test_the_library_reads_what_is_written(file):
  tensor_files.write_file(file, GIVEN, {"k": "v"})
  assert_same(load_file(file))
  with safe_open(file, "np") as opened:
    assert opened.metadata() == {"k": "v"}
  # The format's advice: values start at a multiple of 8 bytes.
  assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
  assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_what_the_library_writes_is_read_in_place(file):
  save_file(GIVEN, file, {"k": "v"})
  tensors, metadata = tensor_files.open_file(file)
  assert_same({name: x.array() for name, x in tensors.items()})
  assert metadata == {"k": "v"}
  assert isinstance(tensors["matrix"].array(), np.memmap)


def test_no_more_than_two_parts_are_in_memory(file):
  made = []  # weak references

  def parts():
    for k in range(5):
      part = np.full((3,), k, np.float32)
      made.append(weakref.ref(part))
      assert sum(ref() is not None for ref in made) <= 2
      yield part

  lazy = Tensor((5, 3), np.dtype("float32"), parts)
  tensor_files.write_file(file, {"x": lazy})
  assert load_file(file)["x"].tolist() == [[float(k)] * 3 for k in range(5)]


@pytest.mark.parametrize(
  "tensor, message",
  [
    (np.zeros(2, np.complex64), "'x' is complex64; known: F64"),
    (
      Tensor((4,), np.dtype("float32"), lambda: [np.zeros(3, np.float32)]),
      r"x: its parts do not make up \(4,\)",
    ),
    (
      Tensor((3,), np.dtype("float32"), lambda: [np.zeros(3)]),
      "x: a part of float64, not float32",
    ),
  ],
)
def test_a_file_that_fails_leaves_nothing(tensor, message, file):
  with pytest.raises(ValueError, match=message):
    tensor_files.write_file(file, {"x": tensor})
  assert not list(file.parent.iterdir())


def header(**entry):
  text = json.dumps({"x": entry}).encode()
  return lambda data: len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda data: data[:-1],
      r"has \d+ bytes, but its header describes \d+\. Copy",
    ),
    (lambda data: data[:5], "its header would have"),
    (lambda data: b"\xff" * 8 + data[8:], "its header would have"),
    (lambda data: (2).to_bytes(8, "little") + b"xx", "is not a safetensors"),
    (
      header(dtype="F8_E4M3", shape=[8], data_offsets=[0, 8]),
      "dtype F8_E4M3, known are",
    ),
    (
      header(dtype="F32", shape=[3], data_offsets=[0, 8]),
      r"8 bytes for a F32 of \(3,\)",
    ),
    (header(dtype="F32", shape=[2]), "is not a safetensors file"),
  ],
)
def test_a_broken_file_is_refused(change, message, file):
  tensor_files.write_file(file, {"x": GIVEN["matrix"], "y": GIVEN["whole"]})
  file.write_bytes(change(file.read_bytes()))
  with pytest.raises(ValueError, match=message):
    tensor_files.open_file(file)


def test_a_folders_files_are_one_set_of_names(tmp_path):
  for name in ("a", "b"):
    x = {name: GIVEN["matrix"]}
    tensor_files.write_file(tmp_path / f"{name}.safetensors", x)
  assert tensor_files.open_all(tmp_path).keys() == {"a", "b"}
  index = tmp_path / tensor_files.INDEX
  index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
  assert tensor_files.open_all(tmp_path).keys() == {"a"}
  index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
  with pytest.raises(ValueError, match=r"'a' is not in b\.safetensors"):
    tensor_files.open_all(tmp_path)
  index.write_text("[]")
  with pytest.raises(ValueError, match=r"wanted an object, got '\[\]'"):
    tensor_files.open_all(tmp_path)
  index.unlink()
  (tmp_path / "c.safetensors").write_bytes(
    (tmp_path / "a.safetensors").read_bytes()
  )
  with pytest.raises(ValueError, match="'a' is in another file"):
    tensor_files.open_all(tmp_path)
