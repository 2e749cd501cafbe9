"""Train, validation and test never share a record, and never move."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain_jax import data
from distrain_jax.data import splits, stdlib_source


def rows(source):
  batch = source.gather(np.arange(len(source)))
  first = batch["image" if source.info.kind == "image" else "tokens"]
  return [row.tobytes() for row in first]


@given(st.binary(), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_more_validation_takes_from_train_only(content, test, validation):
  less = splits.part(content, validation=validation / 2, test=test)
  more = splits.part(content, validation=validation, test=test)
  assert (less, more) in {
    ("train", "train"),
    ("train", "validation"),
    ("validation", "validation"),
    ("test", "test"),
  }


def test_part_gives_the_asked_shares():
  parts = collections.Counter(
    splits.part(str(i).encode(), validation=0.2, test=0.1)
    for i in range(10_000)
  )
  assert abs(parts["test"] - 1000) < 4 * np.sqrt(900)
  assert abs(parts["validation"] - 2000) < 4 * np.sqrt(1600)


def test_the_hash_is_the_same_everywhere():
  # BLAKE2b of the empty string with 8 bytes of output (RFC 7693 parameters).
  assert splits.hash64(b"") == int.from_bytes(
    bytes.fromhex("e4a6a0577479b2b4"), "little"
  )


@pytest.mark.parametrize("fraction", [None, 0.1, 0.5])
def test_digits_parts_are_disjoint_and_complete(fraction):
  from sklearn.datasets import load_digits

  parts = data.digits(validation_fraction=fraction)
  everything = [row for part in parts for row in rows(part)]
  original = load_digits().images.astype(np.uint8)[..., None]
  assert sorted(everything) == sorted(x.tobytes() for x in original)
  assert len(set(everything)) == len(everything) == 1797  # no equal images
  assert len(parts.test) == 400
  if fraction is None:
    assert len(parts.train) == 1200


def test_digits_test_part_does_not_depend_on_the_fraction():
  a, b = (data.digits(validation_fraction=f).test for f in (0.1, 0.5))
  assert rows(a) == rows(b)


def test_digits_labels_belong_to_their_images():
  from sklearn.datasets import load_digits

  bunch = load_digits()
  label = {
    x.astype(np.uint8).tobytes(): y for x, y in zip(bunch.images, bunch.target)
  }
  train = data.digits().train
  batch = train.gather(np.arange(len(train)))
  assert [label[r] for r in rows(train)] == batch["label"].tolist()
  assert train.info.mean[0] == pytest.approx(batch["image"].mean(), abs=1e-3)
  assert train.info.std[0] == pytest.approx(batch["image"].std(), abs=1e-3)


def test_stdlib_text_parts_hold_each_file_once_and_whole():
  parts = data.stdlib_text(length=64, max_bytes=200_000)
  documents = []
  for part in parts:
    stream = part.stream.tokens
    assert stream[-1] == stdlib_source.END
    documents += stream.tobytes().split(b"\0")[:-1]
  import sysconfig
  from pathlib import Path

  original = {}
  for name, text in stdlib_source.files(Path(sysconfig.get_path("stdlib"))):
    original.setdefault(text, []).append(name)
  assert set(documents) <= set(original)
  named = collections.Counter(d for d in documents if d)
  assert all(count <= len(original[d]) for d, count in named.items())
  assert sum(map(len, documents)) >= 200_000


def test_stdlib_text_is_the_same_twice_and_text():
  one, two = (data.stdlib_text(length=32, max_bytes=50_000) for _ in range(2))
  for a, b in zip(one, two):
    np.testing.assert_array_equal(a.stream.tokens, b.stream.tokens)
    assert a.stream.tokens.tobytes().decode().isprintable() is False
  info = one.train.info
  assert (info.vocab_size, info.end_token, info.bytes_per_token) == (256, 0, 1)
  assert len(one.train) > len(one.validation) and len(one.train) > len(one.test)


def test_stdlib_text_leaves_out_tests_packages_and_tables(tmp_path):
  kept = ["a.py", "email/b.py"]
  left = [
    "site-packages/c.py",
    "email/test/d.py",
    "encodings/e.py",
    "_sysconfigdata_x.py",
    "notes.txt",
  ]
  for name in kept + left:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x = 1\r\n")
  (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
  assert dict(stdlib_source.files(tmp_path)) == dict.fromkeys(kept, b"x = 1\n")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_outside_the_interval_is_refused(fraction):
  with pytest.raises(ValueError, match=r"data\.validation_fraction.*0\.1"):
    data.digits(validation_fraction=fraction)


def test_a_python_without_sources_says_what_to_use(monkeypatch, tmp_path):
  monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"prepare_data\.py"):
    data.stdlib_text(length=8)


def test_no_part_is_empty_however_few_bytes_are_asked_for():
  parts = data.stdlib_text(length=8, max_bytes=1)
  assert all(len(part) > 0 for part in parts)
