"""Global batches depend on seed and step alone; nothing is lost or doubled."""

import asyncio
import itertools
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from distrain_jax.data import (
  Arrays,
  ArrayStream,
  Info,
  Subset,
  Windows,
  eval_batches,
  in_memory,
  train_iterator,
)

AUGMENT = ("pad_crop:1", "flip")


def make_images(n=23, shape=(4, 5, 3)):
  image = np.arange(n * np.prod(shape)).reshape(n, *shape).astype(np.uint8)
  info = Info("made", "image", 0, shape, n, (100.0,), (50.0,))
  return Arrays(info, image=image, label=np.arange(n, dtype=np.int32))


def make_text(n=23, length=4):
  info = Info("made", "text", 0, vocab_size=256, end_token=0)
  return Windows(ArrayStream(np.arange(n * length + 1) % 251), info, length)


class OnDisk:
  """The same images as `make_images`, of two sizes, read one by one."""

  in_memory = False

  def __init__(self, n=23):
    self.info = make_images(n).info
    self._source = make_images(n)

  def __len__(self):
    return self.info.count

  def gather(self, indices):
    batch = self._source.gather(indices)
    image = [
      np.repeat(x, 2, axis=1) if i % 2 else x
      for i, x in zip(indices, batch["image"])
    ]
    return batch | {"image": image}


SOURCES = {"images": make_images, "text": make_text, "on_disk": OnDisk}


def augment_of(name):
  return {
    "images": AUGMENT,
    "text": (),
    "on_disk": ("random_resized_crop", "flip"),
  }[name]


def take(iterator, count):
  batches = list(itertools.islice(iterator, count))
  if hasattr(iterator, "close"):
    iterator.close()
  return batches


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def join(parts):  # processes of batches of dicts -> global batches
  return [
    {k: np.concatenate([b[k] for b in batch]) for k in batch[0]}
    for batch in zip(*parts)
  ]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", SOURCES)
def test_processes_together_make_the_batches_of_one(name, processes):
  make = lambda **kw: train_iterator(
    SOURCES[name](), batch_size=12, seed=3, augment=augment_of(name), **kw
  )
  one = take(make(), 5)
  parts = [
    take(make(process_index=p, process_count=processes, threads=0), 5)
    for p in range(processes)
  ]
  assert_equal(join(parts), one)


@settings(deadline=None, max_examples=25)
@given(
  n=st.integers(1, 40),
  batch_size=st.integers(1, 50),
  seed=st.integers(0, 2**63 - 1),
)
def test_each_epoch_gives_each_record_once_across_batch_borders(
  n, batch_size, seed
):
  it = train_iterator(
    make_images(n), batch_size=batch_size, seed=seed, threads=0
  )
  batches = take(it, -(-3 * n // batch_size))
  labels = np.concatenate([b["label"] for b in batches])[: 3 * n]
  for epoch in labels.reshape(3, n):
    assert sorted(epoch.tolist()) == list(range(n))
  assert all(len(b["label"]) == batch_size for b in batches)  # none partial


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("name", SOURCES)
def test_a_restored_iterator_continues_with_the_same_bits(name, threads):
  make = lambda **kw: train_iterator(
    SOURCES[name](), batch_size=8, seed=1, augment=augment_of(name), **kw
  )
  whole = take(make(), 9)
  first = make(threads=threads)
  before = list(itertools.islice(first, 4))
  state = json.loads(json.dumps(first.get_state()))
  next(first)  # the state is a value: going on does not change it
  first.close()
  second = make(threads=threads)
  next(second)
  second.set_state(state)
  assert_equal(before + take(second, 5), whole)


def test_a_state_of_one_process_restores_in_two():
  make = lambda **kw: train_iterator(
    make_images(), batch_size=8, seed=1, augment=AUGMENT, **kw
  )
  whole = take(make(), 6)
  first = make()
  list(itertools.islice(first, 3))
  state = first.get_state()
  first.close()
  parts = []
  for p in range(2):
    it = make(process_index=p, process_count=2)
    it.set_state(state)
    parts.append(take(it, 3))
  assert_equal(join(parts), whole[3:])


def test_orbax_saves_and_restores_the_iterator(tmp_path):
  make = lambda: train_iterator(make_images(), batch_size=8, seed=1)
  whole = take(make(), 6)
  first = make()
  list(itertools.islice(first, 4))
  ocp.save_checkpointables(tmp_path / "saved", {"data": first})
  first.close()
  second = make()
  ocp.load_checkpointables(tmp_path / "saved", {"data": second})
  assert second.get_state()["next_index"] == 4
  assert_equal(take(second, 2), whole[4:])


def test_orbax_restores_what_another_number_of_processes_saved(tmp_path):
  first = train_iterator(make_images(), batch_size=8, seed=1)
  next(first)
  state = json.dumps(first.get_state())
  first.close()
  (tmp_path / "process_2-of-4.json").write_text(state)
  second = train_iterator(make_images(), batch_size=8, seed=1)

  async def load():
    await (await second.load(pathlib.Path(tmp_path)))

  asyncio.run(load())
  assert second.get_state()["next_index"] == 1
  second.close()


def test_a_state_of_another_run_is_refused():
  make = lambda **kw: train_iterator(
    make_images(), **{"batch_size": 8, "seed": 1} | kw
  )
  state = make().get_state()
  for other in ({"batch_size": 4}, {"seed": 2}):
    with pytest.raises(ValueError, match="resume with the same config"):
      make(**other).set_state(state)


def test_seeds_give_other_orders_and_other_augmentations():
  labels = [
    [b["label"].tolist() for b in take(it, 2)]
    for it in (
      train_iterator(make_images(), batch_size=8, seed=seed) for seed in (0, 1)
    )
  ]
  assert labels[0] != labels[1]
  one = make_images(1)
  a, b = (
    take(train_iterator(one, batch_size=32, seed=s, augment=AUGMENT), 1)[0]
    for s in (0, 1)
  )
  assert not np.array_equal(a["image"], b["image"])
  assert len({x.tobytes() for x in a["image"]}) > 5  # and by position


def test_training_batches_are_what_the_models_read():
  image = take(train_iterator(make_images(), batch_size=6, seed=0), 1)[0]
  assert image["image"].shape == (6, 4, 5, 3)
  assert image["image"].dtype == np.float32
  assert image["label"].dtype == np.int32
  text = take(train_iterator(make_text(), batch_size=6, seed=0), 1)[0]
  assert text["tokens"].shape == text["targets"].shape == (6, 4)
  assert text["tokens"].dtype == text["targets"].dtype == np.int32


@settings(deadline=None, max_examples=25)
@given(
  n=st.integers(1, 30),
  each=st.integers(1, 12),
  processes=st.integers(1, 3),
)
def test_evaluation_gives_every_record_once_in_equally_many_batches(
  n, each, processes
):
  source, batch_size = make_images(n), each * processes
  parts = [
    eval_batches(
      source,
      batch_size=batch_size,
      process_index=p,
      process_count=processes,
      threads=0,
    )
    for p in range(processes)
  ]
  assert {len(p) for p in parts} == {-(-n // batch_size)}
  batches = join([list(p) for p in parts])
  assert len(batches) == len(parts[0])
  label, weight, image = (
    np.concatenate([b[k] for b in batches])
    for k in ("label", "weight", "image")
  )
  assert label[weight == 1].tolist() == list(range(n))
  assert set(weight.tolist()) <= {0, 1} and weight.dtype == np.float32
  assert np.isfinite(image).all()
  assert len(label) == len(batches) * batch_size


@pytest.mark.parametrize("name", SOURCES)
def test_evaluation_can_be_repeated(name):
  batches = eval_batches(SOURCES[name](), batch_size=10)
  assert_equal(list(batches), list(batches))


def test_evaluation_of_many_sizes_is_of_one_shape():
  shapes = {b["image"].shape for b in eval_batches(OnDisk(), batch_size=10)}
  assert shapes == {(10, 4, 5, 3)}


def test_an_error_while_loading_reaches_the_caller():
  class Broken(OnDisk):
    def gather(self, indices):
      raise OSError("disk gone")

  it = train_iterator(Broken(), batch_size=4, seed=0, threads=2)
  with pytest.raises(OSError, match="disk gone"):
    next(it)
  it.close()


def test_subset_is_the_named_records():
  subset = Subset(make_images(), 5, 9)
  assert len(subset) == subset.info.count == 4
  assert subset.gather(np.asarray([3, 0]))["label"].tolist() == [8, 5]
  with pytest.raises(ValueError, match=r"\[5, 50\) of a source of 23"):
    Subset(make_images(), 5, 50)


def test_in_memory_reads_everything_once():
  source = make_text(10)
  source.in_memory = False
  copy = in_memory(source, block=3)
  everything = np.arange(10)
  assert_equal([copy.gather(everything)], [source.gather(everything)])
  assert copy.in_memory and copy.info == source.info
  for block in (1, 23):
    with pytest.raises(ValueError, match="differ in the shape of 'image'"):
      in_memory(OnDisk(), block=block)


def test_arrays_of_different_lengths_are_refused():
  with pytest.raises(ValueError, match=r"one length.*'a': 2"):
    Arrays(make_images().info, a=np.zeros(2), b=np.zeros(3))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
    ({"batch_size": 2.5}, "batch_size=2.5 must be a positive"),
    (
      {"batch_size": 9, "process_count": 4},
      r"multiple of the 4 processes\. Nearest: 8 or 12",
    ),
    ({"process_index": 2, "process_count": 2}, r"process_index=2.*\[0, 2\)"),
    ({"seed": -1}, r"seed=-1 must be an integer in \[0, 2\*\*63\)"),
    ({"seed": 0.5}, "seed=0.5"),
    ({"augment": ("flp",)}, "Did you mean 'flip'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    train_iterator(make_images(), **{"batch_size": 8, "seed": 0} | options)
