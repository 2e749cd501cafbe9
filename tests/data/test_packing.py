"""Packing loses nothing but the tail and shifts targets by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax.data import ArrayStream, Info, Windows, pack

INFO = Info("made", "text", 0, vocab_size=9, end_token=0)
DOCUMENTS = st.lists(
  st.lists(st.integers(1, 8), max_size=12), min_size=1, max_size=12
)


def stream_of(documents):
  return pack([np.asarray(d, np.uint8) for d in documents], 0)


@given(DOCUMENTS)
def test_pack_closes_every_document(documents):
  text = stream_of(documents).tobytes()
  assert text.split(b"\0") == [bytes(d) for d in documents] + [b""]


@settings(deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_every_token_but_the_first_is_a_target_once_and_only_a_tail_is_lost(
  documents, length
):
  stream = stream_of(documents)
  if len(stream) <= length:
    return
  source = Windows(ArrayStream(stream), INFO, length)
  batch = source.gather(np.arange(len(source)))
  targets = batch["targets"].ravel()
  np.testing.assert_array_equal(targets, stream[1 : 1 + len(targets)])
  assert len(stream) - 1 - len(targets) < length
  np.testing.assert_array_equal(batch["tokens"].ravel(), stream[: len(targets)])
  assert source.info.count == len(source) == len(batch["tokens"])


def test_windows_come_in_any_order():
  source = Windows(ArrayStream(np.arange(13)), INFO, 3)
  batch = source.gather(np.asarray([3, 0]))
  assert batch["tokens"].tolist() == [[9, 10, 11], [0, 1, 2]]
  assert batch["targets"].tolist() == [[10, 11, 12], [1, 2, 3]]
  assert batch["tokens"].dtype == batch["targets"].dtype == np.int32


def test_a_memory_mapped_stream_reads_the_same(tmp_path):
  tokens = np.arange(100, dtype=np.uint16)
  tokens.tofile(tmp_path / "tokens")
  mapped = np.memmap(tmp_path / "tokens", np.uint16, "r")
  got = ArrayStream(mapped).read(np.asarray([90, 5]), 10)
  np.testing.assert_array_equal(got, [tokens[90:], tokens[5:15]])


@pytest.mark.parametrize("length", [0, -3, None, 2.5])
def test_a_bad_length_is_refused(length):
  with pytest.raises(ValueError, match=r"data\.length=.*positive integer"):
    Windows(ArrayStream(np.arange(9)), INFO, length)


def test_too_short_a_stream_says_what_would_fit():
  with pytest.raises(ValueError, match=r"needs 10 tokens.*at most 8"):
    Windows(ArrayStream(np.arange(9)), INFO, 9)
