"""Members of a population: each has its own order of all records."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax.data import Arrays, Info, augment, members, random_order
from distrain_jax.data import train_iterator as make_iterator

N, EACH = 4, 6


class Source(Arrays):
  """Images that say which record they are."""

  def __init__(self, n=23):
    shape = (3, 4, 1)
    image = np.arange(n * 12).reshape(n, *shape).astype(np.uint8)
    info = Info("made", "image", 0, shape, n)
    super().__init__(info, image=image, label=np.arange(n, dtype=np.int32))


def train_iterator(records=23, **options):
  options = {"batch_size": N * EACH, "seed": 3, "threads": 0} | options
  options = {"augment": ("pad_crop:1", "flip")} | options
  return make_iterator(Source(records), **options)


def take(iterator, count):
  """`count` batches as one dict of (count, b, ...)."""
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return {k: np.stack([b[k] for b in batches]) for k in batches[0]}


def of(batches, place, n=N):
  """One member's share of each batch."""
  return {k: np.split(x, n, axis=1)[place] for k, x in batches.items()}


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


def test_one_member_is_the_stream_there_always_was():
  t, n = 9, 23
  labels = take(train_iterator(), t)["label"].ravel()
  wanted = np.arange(t * N * EACH)
  np.testing.assert_array_equal(labels, random_order.order(3, wanted, n))
  # Words by key and counter, as written before there were members.
  plain = np.random.Philox(key=[3, 2], counter=5 * 4 // 4)
  words = random_order.words(3, 2, 5, 3, 4)
  np.testing.assert_array_equal(words, plain.random_raw(12).reshape(3, 4))


def test_each_row_is_a_position_of_its_members_order():
  batches, source = take(train_iterator(members=(2, 0)), 5), Source()
  ways = augment.parse(("pad_crop:1", "flip"), source.info)
  for place, m in enumerate((2, 0)):
    each = N * EACH // 2
    own = of(batches, place, 2)
    for t, r in itertools.product(range(5), range(each)):
      position = t * each + r
      record = random_order.order(3, np.asarray([position]), 23, m)
      row = source.gather(record)
      for stream, way in enumerate(ways, start=1):
        words = random_order.words(3, stream, position, 1, 4, m)
        row = way.apply(row, words, source.info)
      row = augment.normalise(row, source.info)
      assert own["label"][t, r] == row["label"][0]
      np.testing.assert_array_equal(own["image"][t, r], row["image"][0])


def test_a_member_sees_what_it_would_see_alone():
  population = take(train_iterator(members=N), 9)
  first = take(train_iterator(batch_size=EACH), 9)
  assert_equal(of(population, 0), first)  # one, with no word of members
  for m in range(N):
    alone = take(train_iterator(batch_size=EACH, members=[m]), 9)
    assert_equal(of(population, m), alone)


@settings(deadline=None, max_examples=20)
@given(
  records=st.integers(1, 30),
  each=st.integers(1, 40),
  n=st.integers(1, 5),
  seed=st.integers(0, 2**63 - 1),
)
def test_each_member_sees_each_record_once_an_epoch(records, each, n, seed):
  it = train_iterator(records, batch_size=n * each, seed=seed, members=n)
  batches = take(it, -(-3 * records // each))
  for m in range(n):
    labels = of(batches, m, n)["label"].ravel()[: 3 * records]
    for epoch in labels.reshape(3, records):
      assert sorted(epoch.tolist()) == list(range(records))


def test_members_orders_and_augmentations_are_unrelated():
  orders = [random_order.order(3, np.arange(5000), 5000, m) for m in range(6)]
  related = np.corrcoef(orders) - np.eye(6)
  assert np.abs(related).max() < 4 / 5000**0.5
  words = [random_order.words(3, 1, 0, 2000, 4, m) for m in range(6)]
  assert len(np.unique(words)) == 6 * 2000 * 4
  # Nor is one member's order another stream, or another seed, of member 0.
  others = {
    random_order.words(s, k, 0, 1, 4).tobytes()
    for s, k in [(3, 0), (3, 1), (4, 0), (4, 1)]
  }
  assert random_order.words(3, 0, 0, 1, 4, 1).tobytes() not in others


@pytest.mark.parametrize("processes", [2, 3, 8])  # one, many, part of a member
def test_processes_together_make_the_batches_of_one(processes):
  parts = [
    take(train_iterator(members=N, process_index=p, process_count=processes), 5)
    for p in range(processes)
  ]
  joined = {
    k: np.concatenate([part[k] for part in parts], axis=1) for k in parts[0]
  }
  assert_equal(joined, take(train_iterator(members=N), 5))


def saved(batches, **options):
  it = train_iterator(**options)
  take(it, batches)
  return json.loads(json.dumps(it.get_state()))


def resumed(state, count, **options):
  it = train_iterator(**options)
  it.set_state(state)
  return take(it, count)


def test_a_population_goes_on_where_it_was():
  state = saved(4, members=N)
  assert state["members"] == [0, 1, 2, 3] and state["batch_size"] == N * EACH
  whole = take(train_iterator(members=N), 7)
  rest = {k: x[4:] for k, x in whole.items()}
  assert_equal(resumed(state, 3, members=N), rest)


def test_who_stays_goes_on_undisturbed_when_another_leaves():
  state, whole = saved(4, members=N), take(train_iterator(members=N), 9)
  three = {"members": (0, 2, 3), "batch_size": 3 * EACH}
  rest = resumed(state, 3, **three)
  for place, m in enumerate(three["members"]):
    own = {k: x[4:7] for k, x in of(whole, m).items()}
    assert_equal(of(rest, place, 3), own)
  # Later its place is taken: by a new one, whose order starts there.
  it = train_iterator(**three)
  it.set_state(state)
  take(it, 3)
  back = resumed(it.get_state(), 2, members=N)
  assert_equal(back, {k: x[7:] for k, x in whole.items()})


def test_a_state_from_before_there_were_members_is_of_one():
  old = {"next_index": 4, "batch_size": EACH, "seed": 3, "records": 23}
  whole = take(train_iterator(members=N), 6)
  alone = resumed(old, 2, batch_size=EACH)
  assert_equal(alone, {k: x[4:] for k, x in of(whole, 0).items()})
  with pytest.raises(ValueError, match="resume with the same config"):
    resumed(old, 1, members=N, batch_size=EACH * 2)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"members": 3}, "'batch_size of a member': 6.*: 8, .*grows or shrinks"),
    ({"members": 1}, "'batch_size of a member': 6.*: 24, "),
    ({"members": N, "seed": 4}, "resume with the same config"),
  ],
)
def test_a_state_of_other_members_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    resumed(saved(2, members=N), 1, **options)


def test_who_joins_while_another_leaves_has_a_number_of_its_own():
  state, whole = saved(4, members=N), take(train_iterator(members=N), 6)
  rest = resumed(state, 2, members=(0, 1, 3, 4))
  for place, m in enumerate((0, 1, 3)):
    own = {k: x[4:6] for k, x in of(whole, m).items()}
    assert_equal(of(rest, place), own)
  five = take(train_iterator(members=N + 1, batch_size=(N + 1) * EACH), 6)
  own = {k: x[4:6] for k, x in of(five, N, N + 1).items()}
  assert_equal(of(rest, 3), own)
  state = saved(2, members=(0, 2, 3), batch_size=3 * EACH)
  with pytest.raises(
    ValueError,
    match=r"members=\[0, 2, 3\]; this one has members=\[0, 1, 2\].*above",
  ):
    resumed(state, 1, members=(0, 1, 2), batch_size=3 * EACH)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "2", (), (0, 0), (0, -1)])
def test_bad_members_are_refused(bad):
  with pytest.raises(ValueError, match=r"members=.* is how many members a pop"):
    train_iterator(members=bad)


@pytest.mark.parametrize("n, near", [(5, "20 or 25"), (50, "50 or 50")])
def test_members_that_do_not_divide_the_batch_are_refused(n, near):
  message = f"batch_size=24 .* multiple of the {n} members. Nearest: {near}"
  with pytest.raises(ValueError, match=message):
    train_iterator(members=n)


@given(each=st.integers(1, 5), n=st.integers(1, 5), data=st.data())
def test_parts_are_the_rows_by_member(each, n, data):
  ends = sorted(data.draw(st.lists(st.integers(0, n * each), min_size=2)))
  rows = range(ends[0], ends[1])
  numbers = list(range(10, 10 + n))
  found = [
    (m, first + i)
    for m, first, count in members.parts(rows, each, numbers)
    for i in range(count)
  ]
  assert found == [(numbers[r // each], r % each) for r in rows]
