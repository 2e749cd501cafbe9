"""IDX files: read exactly, refused when damaged, named when missing."""

import gzip
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distrain_jax import data
from distrain_jax.data import idx_source

CODES = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}


def idx_bytes(array, code=8):
  head = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
  return head + array.tobytes()


def make_folder(folder, train=40, test=10, test_name="t10k"):
  rng = np.random.default_rng(0)
  written = {}
  for part, n in (("train", train), (test_name, test)):
    image = rng.integers(0, 256, (n, 6, 5), dtype=np.uint8)
    label = (np.arange(n) % 3).astype(np.uint8)
    raw = gzip.compress(idx_bytes(image))
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(raw)
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(label))
    written[part] = image, label
  return written


@given(st.data())
def test_read_idx_returns_what_was_written(tmp_path_factory, draw):
  dtype = draw.draw(st.sampled_from(sorted(CODES)))
  shape = draw.draw(hnp.array_shapes(max_dims=3, max_side=4))
  array = draw.draw(hnp.arrays(dtype, shape))
  raw = idx_bytes(array, CODES[dtype])
  path = tmp_path_factory.mktemp("idx") / "file"
  path.write_bytes(gzip.compress(raw) if draw.draw(st.booleans()) else raw)
  got = data.read_idx(path)
  assert got.dtype == array.dtype.newbyteorder("=")
  np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda raw: raw[:-1], "promises 12 bytes.*holds 11"),
    (lambda raw: raw + b"\0", "promises 12 bytes.*holds 13"),
    (lambda raw: raw[:9], "cut short inside its header"),
    (lambda raw: b"", "not an IDX file: it starts with nothing"),
    (lambda raw: b"\x89PNG" + raw, "not an IDX file: it starts with 89504e47"),
    (lambda raw: b"\0\0\x07\x01" + raw, "not an IDX file"),
    (lambda raw: gzip.compress(raw)[:-9], "damaged gzip"),
  ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, damage, message):
  path = tmp_path / "broken-file"
  path.write_bytes(damage(idx_bytes(np.zeros((3, 4), np.uint8))))
  with pytest.raises(ValueError, match=message) as error:
    data.read_idx(path)
  assert "broken-file" in str(error.value)


@pytest.mark.parametrize("test_name", ["t10k", "test"])
def test_a_folder_is_split_by_file_and_by_position(tmp_path, test_name):
  written = make_folder(tmp_path, test_name=test_name)
  train, validation, test = data.idx(tmp_path, validation_fraction=0.25)
  image, label = written["train"]
  both = [p.gather(np.arange(len(p))) for p in (train, validation)]
  together = np.concatenate([b["image"] for b in both])
  np.testing.assert_array_equal(together[..., 0], image)
  labels = np.concatenate([b["label"] for b in both])
  np.testing.assert_array_equal(labels, label)
  assert (len(train), len(validation), len(test)) == (30, 10, 10)
  got = test.gather(np.arange(10))
  np.testing.assert_array_equal(got["image"][..., 0], written[test_name][0])
  info = train.info
  assert (info.shape, info.num_classes, info.count) == ((6, 5, 1), 3, 30)
  assert info.mean[0] == pytest.approx(image[:30].mean(), abs=1e-3)
  assert info.std[0] == pytest.approx(image[:30].std(), abs=1e-3)


def test_missing_fashion_mnist_names_the_commands_that_get_it(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    data.fashion_mnist(tmp_path)
  for words in ("apt-get install dataset-fashion-mnist", str(tmp_path)):
    assert words in str(error.value)
  assert "--config.data.folder" in str(error.value)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
  make_folder(tmp_path)
  monkeypatch.setenv("FASHION_MNIST_FOLDER", str(tmp_path))
  assert data.fashion_mnist().test.info.name == "fashion_mnist"
  assert len(data.fashion_mnist().test) == 10


def test_two_sets_in_one_folder_are_refused(tmp_path):
  make_folder(tmp_path)
  file = tmp_path / "train-images-idx3-ubyte.gz"
  (tmp_path / "letters-train-images-idx3-ubyte.gz").write_bytes(
    file.read_bytes()
  )
  with pytest.raises(ValueError, match="more than one set"):
    data.idx(tmp_path)


@pytest.mark.parametrize(
  "name, array, message",
  [
    ("train-images-idx3-ubyte.gz", np.zeros((4, 4), np.uint8), "want images"),
    ("train-labels-idx1-ubyte", np.zeros(39, np.uint8), "each of 40 images"),
  ],
)
def test_files_that_do_not_match_are_refused(tmp_path, name, array, message):
  make_folder(tmp_path)
  (tmp_path / name).write_bytes(idx_bytes(array))
  with pytest.raises(ValueError, match=message):
    data.idx(tmp_path)


@pytest.mark.skipif(
  not os.path.isdir(idx_source.DEBIAN),
  reason="Fashion-MNIST is not here: apt-get install dataset-fashion-mnist",
)
def test_fashion_mnist_is_the_published_data(monkeypatch):
  monkeypatch.delenv("FASHION_MNIST_FOLDER", raising=False)
  train, validation, test = data.fashion_mnist()
  assert (len(train), len(validation), len(test)) == (54_000, 6_000, 10_000)
  label = test.gather(np.arange(10_000))["label"]
  np.testing.assert_array_equal(np.bincount(label), [1000] * 10)
  # 0.2860 and 0.3530 of 255 are the values quoted for all 60,000.
  assert train.info.mean[0] / 255 == pytest.approx(0.2860, abs=1e-3)
  assert train.info.std[0] / 255 == pytest.approx(0.3530, abs=1e-3)
  assert train.info.shape == (28, 28, 1) and train.info.num_classes == 10
