"""Token shards: whole or absent, and read back token for token."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax import data
from distrain_jax.data import preparing, splits, token_shards

TEXTS = [f"Document {i}: " + "many words, " * (i % 7) for i in range(60)]
SHARES = {"validation": 0.2, "test": 0.2}


def parts_of(texts):
  parts = {"train": [], "validation": [], "test": []}
  for text in texts:
    parts[splits.part(text.encode(), **SHARES)].append(text)
  return parts


def prepare(texts, out, tokenizer=None, **options):
  tokenizer = tokenizer or data.byte_tokenizer()
  return data.prepare(texts, out, tokenizer, **SHARES | options)


def stream(source):
  return source.stream.read(np.asarray([0]), len(source.stream))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("made") / "data"
  prepare(TEXTS, folder, chunk=50, shard_tokens=300)
  return folder


def test_every_document_is_in_its_part_once_in_order_and_closed(folder):
  d = data.load("tokens", folder=folder, length=16)
  for name, texts in parts_of(TEXTS).items():
    want = b"".join(t.encode() + b"\0" for t in texts)
    assert stream(getattr(d, name)).tobytes() == want
  info = d.info
  assert (info.vocab_size, info.end_token, info.length) == (256, 0, 16)
  raw = sum(len(t) for t in parts_of(TEXTS)["train"])
  tokens = raw + len(parts_of(TEXTS)["train"])
  assert info.bytes_per_token == pytest.approx(raw / tokens)


def test_metadata_counts_what_the_files_hold(folder):
  metadata = token_shards.read_metadata(folder)
  for name, texts in parts_of(TEXTS).items():
    split = metadata.splits[name]
    assert split.documents == len(texts)
    assert split.tokens == sum(len(t) + 1 for t in texts)
    assert len(split.shards) == -(-split.tokens // 300)
  named = {s["file"] for p in metadata.splits.values() for s in p.shards}
  files = {p.name for p in folder.iterdir()}
  assert files == named | {"dataset.json"}
  assert json.loads((folder / "dataset.json").read_text())["dtype"] == "<u1"


@settings(deadline=None, max_examples=30)
@given(
  start=st.lists(st.integers(0, 900), min_size=1), width=st.integers(1, 130)
)
def test_any_window_is_the_slice_of_the_stream(folder, start, width):
  d = data.load("tokens", folder=folder, length=16)
  whole = stream(d.train)
  got = d.train.stream.read(np.asarray(start), width)
  np.testing.assert_array_equal(got, [whole[s : s + width] for s in start])


def test_training_batches_come_from_the_shards(folder):
  d = data.load("tokens", folder=folder, length=16)
  batches = list(data.eval_batches(d.train, batch_size=4))
  rows = [t for b in batches for t, w in zip(b["targets"], b["weight"]) if w]
  targets = np.concatenate(rows)
  np.testing.assert_array_equal(targets, stream(d.train)[1 : len(targets) + 1])
  it = data.train_iterator(d.train, batch_size=4, seed=0)
  assert next(it)["tokens"].shape == (4, 16)
  it.close()


def test_equal_documents_never_lie_on_both_sides(tmp_path):
  prepare([t for t in TEXTS for _ in range(3)], tmp_path / "x")
  d = data.load("tokens", folder=tmp_path / "x", length=8)
  documents = [set(stream(p).tobytes().split(b"\0")[:-1]) for p in d[1:4]]
  assert sum(map(len, documents)) == len(set().union(*documents)) == len(TEXTS)


def test_blank_documents_and_nul_characters_are_left_out(tmp_path):
  texts = [*TEXTS, "", " \n", "with\0nul"]
  metadata = prepare(texts, tmp_path / "x")
  count = sum(s.documents for s in metadata.splits.values())
  assert count == len(TEXTS) + 1
  d = data.load("tokens", folder=tmp_path / "x", length=8)
  together = b"".join(stream(p).tobytes() for p in d[1:4])
  assert together.count(b"\0") == count and b"withnul" in together


def test_a_failing_run_leaves_nothing(tmp_path):
  def failing():
    yield from TEXTS
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    prepare(failing(), tmp_path / "x")
  assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from distrain_jax import data

def documents():
  yield from (f"document {i} " + "x" * 100_000 for i in range(100))
  os.kill(os.getpid(), signal.SIGKILL)

data.prepare(documents(), sys.argv[1], data.byte_tokenizer(), validation=0.1)
"""


def test_a_killed_run_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path):
  killed = subprocess.run(
    [sys.executable, "-c", KILLED, str(tmp_path / "x")], timeout=120
  )
  assert killed.returncode == -signal.SIGKILL
  assert [p.name for p in tmp_path.iterdir()] == ["x.partial"]
  assert list((tmp_path / "x.partial").iterdir())  # it had begun to write
  with pytest.raises(FileNotFoundError, match=r"prepare_data\.py"):
    data.load("tokens", folder=tmp_path / "x", length=8)
  prepare(TEXTS, tmp_path / "x")
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_existing_folder_is_kept_unless_told(tmp_path):
  prepare(TEXTS, tmp_path / "x")
  before = (tmp_path / "x" / "dataset.json").read_text()
  with pytest.raises(FileExistsError, match="--overwrite"):
    prepare(TEXTS[:40], tmp_path / "x")
  with pytest.raises(ValueError, match="each needs one"):
    prepare(TEXTS[:1], tmp_path / "x", overwrite=True)
  assert (tmp_path / "x" / "dataset.json").read_text() == before
  prepare(TEXTS[:40], tmp_path / "x", overwrite=True)
  assert (tmp_path / "x" / "dataset.json").read_text() != before
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_run_killed_while_replacing_loses_nothing(tmp_path):
  prepare(TEXTS, tmp_path / "x")
  (tmp_path / "x").rename(tmp_path / "x.replaced")  # between the two renames
  with pytest.raises(FileExistsError):
    prepare(TEXTS, tmp_path / "x")
  assert data.load("tokens", folder=tmp_path / "x", length=8).info.count > 0


def test_a_trained_bpe_reads_back_as_the_text(tmp_path):
  from tokenizers import Tokenizer

  bpe = data.train_bpe(TEXTS, 300)
  prepare(TEXTS, tmp_path / "x", bpe)
  d = data.load("tokens", folder=tmp_path / "x", length=8)
  assert d.info.vocab_size == 300 and d.info.bytes_per_token > 1.2
  kept = Tokenizer.from_file(str(tmp_path / "x" / "tokenizer.json"))
  for name, texts in parts_of(TEXTS).items():
    ids = stream(getattr(d, name))
    assert ids.dtype == np.uint16
    cuts = np.flatnonzero(ids == d.info.end_token)
    starts = [0, *(cuts[:-1] + 1)]
    got = [kept.decode(ids[a:z].tolist()) for a, z in zip(starts, cuts)]
    assert got == texts


def test_a_tokenizer_file_is_read_and_its_end_token_found(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text(data.train_bpe(TEXTS, 280).json)
  loaded = data.load_tokenizer(str(path))
  assert loaded.name == str(path) and loaded.vocab_size == 280
  assert loaded.end_token == data.load_tokenizer(str(path), "<|endoftext|>")[2]
  with pytest.raises(ValueError, match=r"no token '<end>'.*--end_token"):
    data.load_tokenizer(str(path), "<end>")


def test_bad_tokenizers_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"'byte', or a tokenizer\.json"):
    data.load_tokenizer(str(tmp_path / "none.json"))
  (tmp_path / "bad.json").write_text("{}")
  with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
    data.load_tokenizer(str(tmp_path / "bad.json"))
  with pytest.raises(ValueError, match="at least 257"):
    data.train_bpe(TEXTS, 100)


@pytest.mark.parametrize(
  "vocab_size, dtype", [(2**8, "<u1"), (2**8 + 1, "<u2"), (2**16 + 1, "<u4")]
)
def test_ids_are_stored_as_narrowly_as_they_fit(vocab_size, dtype):
  assert token_shards.dtype_for(vocab_size) == dtype
  assert np.iinfo(dtype).max >= vocab_size - 1


@pytest.fixture
def copy(folder, tmp_path):
  for file in folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  return pathlib.Path(tmp_path)


def test_a_missing_or_cut_shard_is_named(copy):
  shard = copy / "train-00001.array_record"
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-10])
  with pytest.raises(ValueError, match=r"train-00001.* was written with"):
    data.load("tokens", folder=copy, length=8)
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=r"train-00001.*is missing"):
    data.load("tokens", folder=copy, length=8)


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": {}}'])
def test_metadata_of_another_kind_is_refused(copy, text):
  (copy / "dataset.json").write_text(text)
  with pytest.raises(ValueError, match="not what this version writes"):
    data.load("tokens", folder=copy, length=8)


def test_no_folder_and_no_length_are_refused(folder):
  with pytest.raises(ValueError, match=r"--config\.data\.folder=DIR"):
    data.load("tokens", length=8)
  with pytest.raises(ValueError, match=r"--config\.data\.length=256"):
    data.load("tokens", folder=folder)


def test_training_part_is_what_prepare_puts_there():
  got = preparing.training_part(TEXTS, **SHARES)
  assert list(got) == parts_of(TEXTS)["train"]


@pytest.mark.parametrize("share", [{"validation": 0}, {"test": 1.0}])
def test_shares_that_leave_a_part_empty_are_refused(tmp_path, share):
  with pytest.raises(ValueError, match=r"--validation|--test"):
    prepare(TEXTS, tmp_path / "x", **share)
