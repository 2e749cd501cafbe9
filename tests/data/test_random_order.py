"""The training order and the random words are functions of position alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax.data import random_order

SEEDS = st.integers(0, 2**63 - 1)


def mix(x):  # Python integers, no code shared with random_order
  for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
    x = (x ^ (x >> 33)) * factor % 2**64
  return x ^ (x >> 33)


def oracle(index, n, keys):
  low = max(2, (n - 1).bit_length()) // 2
  high = max(2, (n - 1).bit_length()) - low
  while True:
    a, b = index >> low, index % 2**low
    for even, odd in zip(keys[::2], keys[1::2]):
      a ^= mix((b + even) % 2**64) % 2**high
      b ^= mix((a + odd) % 2**64) % 2**low
    index = (a << low) + b
    if index < n:
      return index


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 600), seed=SEEDS)
def test_permute_is_the_oracle_and_a_permutation(n, seed):
  keys = random_order.words(seed, 0, 0, 1, 8)[0]
  got = random_order.permute(np.arange(n), n, keys)
  assert got.tolist() == [oracle(i, n, keys.tolist()) for i in range(n)]
  assert sorted(got.tolist()) == list(range(n))


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 200), start=st.integers(0, 400), seed=SEEDS)
def test_every_epoch_visits_every_record_once(n, start, seed):
  epochs = np.arange(start, start + 3) * n
  for epoch in epochs:
    records = random_order.order(seed, epoch + np.arange(n), n)
    assert sorted(records.tolist()) == list(range(n))


@settings(deadline=None, max_examples=50)
@given(
  n=st.integers(1, 50),
  start=st.integers(0, 10**12),
  count=st.integers(1, 200),
  cut=st.integers(0, 200),
  seed=SEEDS,
)
def test_a_slice_of_positions_gets_the_slice_of_order_and_words(
  n, start, count, cut, seed
):
  cut = min(cut, count)
  positions = start + np.arange(count)
  whole = random_order.order(seed, positions, n)
  rest = random_order.order(seed, positions[cut:], n)
  np.testing.assert_array_equal(whole[cut:], rest)
  whole = random_order.words(seed, 3, start, count, 8)
  rest = random_order.words(seed, 3, start + cut, count - cut, 8)
  np.testing.assert_array_equal(whole[cut:], rest)


def test_seeds_epochs_and_streams_differ():
  n = 1000
  first = random_order.order(0, np.arange(n), n)
  assert np.mean(first == random_order.order(1, np.arange(n), n)) < 0.01
  assert np.mean(first == random_order.order(0, n + np.arange(n), n)) < 0.01
  # Not the same orders one epoch later, which seed + epoch would give.
  later = random_order.order(0, n + np.arange(n), n)
  assert np.mean(later == random_order.order(1, np.arange(n), n)) < 0.01
  a, b = (random_order.words(0, stream, 0, 100, 4) for stream in (1, 2))
  assert not (a == b).any()


def test_order_is_as_random_as_numpys():
  n, batch = 20_000, 100
  correlations, spreads = [], []
  for seed in range(5):
    records = random_order.order(seed, np.arange(n), n)
    correlations.append(np.corrcoef(records[:-1], records[1:])[0, 1])
    labels = (records * 10 // n).reshape(-1, batch)  # as if sorted by class
    counts = np.stack([(labels == k).sum(1) for k in range(10)])
    spreads.append(counts.var())
  assert abs(np.mean(correlations)) < 4 / np.sqrt(5 * n)
  np.testing.assert_allclose(np.mean(spreads), batch * 0.1 * 0.9, rtol=0.1)


def test_uniform_is_uniform_in_the_half_open_interval():
  top = np.asarray([0, 2**64 - 1], np.uint64)
  low, high = random_order.uniform(top)
  assert low == 0 and 1 - 2**-52 < high < 1
  u = random_order.uniform(random_order.words(0, 1, 0, 10_000, 4))
  assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / u.size)
