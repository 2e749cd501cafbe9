"""Which coordinates an exchange moves: distinct, and as often as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.population import selection

pytestmark = pytest.mark.core

N = 4
RATE = np.asarray


def plan(shapes, rates, members=N):
  return selection.make_plan(shapes, [RATE(r) for r in rates], members)


def drawn(made, count=2000, start=0):
  """`count` choices: (count, K) flat indices, by piece, and what is moved."""
  keys = jax.random.split(jax.random.key(start), count)
  return jax.jit(jax.vmap(lambda k: selection.choose(made, k)))(keys)


def test_places_are_distinct_and_equally_likely():
  n, draws = 103, 20_000
  made = plan([(n,)], [0.4])
  (piece,) = made.pieces
  assert piece.count == 44  # the multiple of 4 above 41.2
  where = np.asarray(drawn(made, draws).where[0][0])  # (draws, 44)
  assert all(len(set(row)) == piece.count for row in where[:200])
  counts = np.bincount(where.ravel(), minlength=n)
  expected = draws * piece.count / n
  # Each is Binomial(draws, 44/103): five deviations, for 103 of them.
  deviation = np.sqrt(expected * (1 - piece.count / n))
  assert np.abs(counts - expected).max() < 5 * deviation


def test_every_coordinate_of_a_rate_moves_with_exactly_that_rate():
  """In large leaves, in layers of one, and in small ones that are pooled."""
  shapes, rates = (
    [(500,), (3, 90), (7,), (2, 2)],
    [0.11, (0.2, 0.1, 0.0), 0.15, 0.3],
  )
  made = plan(shapes, rates, members=2)
  assert made.pooled == (2, 3) and len(made.pieces) == 4
  draws = 20_000
  chosen = drawn(made, draws)
  flat = [x for leaf in chosen.where for x in leaf] + [chosen.pool]
  ends = np.cumsum([p.count for p in made.pieces])[:-1]
  moved = np.split(np.asarray(chosen.moved), ends, axis=1)
  expected = [0.11] * 500, [0.2] * 90, [0.1] * 90, [0.15] * 7 + [0.3] * 4
  for where, mask, probability in zip(flat, moved, expected):
    where, probability = np.asarray(where), np.array(probability)
    counts = np.bincount(where[mask], minlength=len(probability))
    deviation = np.sqrt(draws * probability * (1 - probability))
    assert np.abs(counts - draws * probability).max() < 5 * deviation.max()


def test_what_is_moved_is_not_rounded_where_it_need_not_be():
  made = plan([(128,), (128,)], [0.5, 0.25])
  assert [p.count for p in made.pieces] == [64, 32]
  assert selection.choose(made, jax.random.key(0)).moved is None


@pytest.mark.parametrize("rate", [0.0, 0.013, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 64, 1001])
def test_counts_are_multiples_that_fit(rate, size):
  made = plan([(size,)], [rate])
  assert made.count % N == 0 and made.count <= size
  if rate == 0 or size < N:
    assert made.count == 0
  elif rate == 1:
    assert made.count == size // N * N


def test_leaves_that_rounding_would_leave_out_are_pooled():
  """Of stacked layers, or a size that N does not divide, at high rates."""
  for shapes, rates in (
    [[(64, 3), (64, 3)], [(1.0,) * 64] * 2],
    [[(10,), (10,), (4,)], [1.0] * 3],
  ):
    made = plan(shapes, rates)
    assert made.count == sum(np.prod(s) for s in shapes) // N * N


def test_a_rate_near_one_still_turns():
  """What rounding leaves out differs from step to step."""
  made = plan([(41,)], [1.0])
  where = np.asarray(drawn(made, 400).pool)
  left = {tuple(sorted(set(range(41)) - set(row))) for row in where}
  assert len(left) > 30


def test_few_more_than_asked_for_travel():
  """ResNet-50's leaves, by size: pooled, they cost no multiple of N each."""
  shapes = [(64,)] * 100 + [(512,)] * 60 + [(1, 1, 64, 256)] * 6
  shapes += [(3, 3, 256, 256)] * 20 + [(2048, 1000)]
  total = sum(np.prod(s) for s in shapes)
  for rate in (0.001, 0.01):
    made = plan(shapes, [rate] * len(shapes), members=8)
    assert rate * total <= made.count < 1.02 * rate * total


def test_the_choice_is_the_keys_alone():
  made = plan([(300,), (5, 40)], [0.3, 0.2])
  once, again = (drawn(made, 3, start) for start in (7, 7))
  other = drawn(made, 3, 8)
  jax.tree.map(np.testing.assert_array_equal, once, again)
  assert np.any(np.asarray(once.where[0][0]) != np.asarray(other.where[0][0]))
  assert np.any(
    np.asarray(once.where[0][0][0]) != np.asarray(once.where[0][0][1])
  )


def test_a_leaf_beyond_int32_is_refused():
  with pytest.raises(ValueError, match=r"exchanges count up to 2\*\*31"):
    plan([(2**16, 2**15)], [0.5])


def test_indices_do_not_overflow():
  at = jnp.asarray([2**31 - 5], jnp.int32)
  assert selection._wrapped(at, jnp.int32(10), 2**31 - 2).tolist() == [7]
