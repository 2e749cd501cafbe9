"""Messages as permutations: everything arrives, and no row is wasted."""

import itertools

import numpy as np
import pytest

from distrain_jax.methods.sdp import assignments, exchange, routing

pytestmark = pytest.mark.core

N = 8


def delivered(found, n):
  """(sender, receiver) -> what came."""
  out = {pair: [] for pair in itertools.product(range(n), repeat=2)}
  for to, rows in found.items():
    assert sorted(to) == list(range(n))
    for w, row in enumerate(rows):
      out[w, to[w]] += row
  return out


def rows_sent(found):
  return sum(max(map(len, rows)) for rows in found.values())


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_everything_arrives_in_as_few_rows_as_can_be(seed, even):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(2, 8))
  counts = rng.integers(0, 4, size=(n, n)) * (1 - np.eye(n, dtype=int))
  sent = [
    [[(w, v, i) for i in range(c)] for v, c in enumerate(row)]
    for w, row in enumerate(counts)
  ]
  found = routing.routes(sent, even)
  came = delivered(found, n)
  for w, v in came:
    assert sorted(came[w, v]) == sent[w][v]
  by_distance = sum(
    max(counts[w, (w + d) % n] for w in range(n)) for d in range(1, n)
  )
  if even:
    assert rows_sent(found) == max(*counts.sum(0), *counts.sum(1))
  else:
    assert rows_sent(found) == by_distance


@pytest.mark.parametrize("holders", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("units", [4, 12, 20])
def test_units_that_workers_do_not_divide_cost_no_more(units, holders):
  """Holders less one of N times what a worker owns, as where they do."""
  plan = exchange.make_plan(assignments.neurons(1, units, N, holders / N))
  rows = sum(shift.places.shape[1] for shift in plan.shifts)
  assert rows == (holders - 1) * plan.total // N
