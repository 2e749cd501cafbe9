"""Who holds what: the tables alone, judged by counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain_jax.methods.sdp import assignments, rings

pytestmark = pytest.mark.core

WORKERS = (1, 2, 3, 4, 8)
# Of 8 workers with r of 8 groups each: second-smallest eigenvalue of the walk
# worker -> group -> worker, taken from 1.
GAPS = {1: 0, 2: 0.146, 3: 0.352, 4: 0.573, 5: 0.767, 6: 0.905, 8: 1}


def places(seed):
  if seed is None:
    return assignments.IN_ORDER
  return assignments.Places(np.random.default_rng(seed))


def judge(holding, workers, holders, even=True, rounds=1):
  """What every balanced table keeps; even: one that leaves no place empty."""
  held, owners = holding.held, holding.owners  # (N, cells), (cells, F)
  assert len(held) == workers
  assert set(held.sum(0)) == {holders}  # each cell; so all are covered
  assert np.ptp(held.sum(1)) <= (0 if even else rounds)  # each worker
  if rounds == 1:
    assert holding.cells.shape[1] == held.sum(1).max()  # no more places
  np.testing.assert_allclose(holding.coverage, holders / workers)
  for cell, of_cell in enumerate(owners):
    assert all(held[w, cell] for w in of_cell)
  owned = np.bincount(owners.ravel(), minlength=workers)
  assert not even or len(set(owned)) == 1


@st.composite
def neuron_tables(draw):
  workers = draw(st.sampled_from(WORKERS))
  units = draw(st.integers(2, 24))
  holders = draw(st.integers(1, workers))
  layers = draw(st.integers(1, 5))
  return layers, units, workers, holders, draw(st.sampled_from([None, 0, 7]))


@settings(deadline=None, max_examples=200)
@given(neuron_tables())
def test_units_are_held_and_owned_evenly(table):
  layers, units, workers, holders, seed = table
  found = assignments.neurons(
    layers, units, workers, holders / workers, places(seed)
  )
  even = units * holders % workers == 0
  judge(found, workers, holders, even, rounds=layers)
  for layer in range(layers):  # and in each layer by itself
    held = found.held.reshape(workers, layers, -1)[:, layer].sum(1)
    assert np.ptp(held) <= (0 if even else 1)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("layers", [8, 16, 12])
def test_layers_are_held_and_owned_evenly(layers, workers, seed):
  for holders in range(1, workers + 1):
    coverage = holders / workers
    found = assignments.blocks(layers, workers, coverage, places(seed))
    judge(found, workers, holders, layers * holders % workers == 0)
    for row in found.lanes:  # in order of depth, then what is empty
      assert (np.diff(row[row < layers]) > 0).all()
      assert (np.diff(row == layers) >= 0).all()


def test_three_of_eight_workers_hold_each_of_twelve_heads():
  found = assignments.neurons(1, 12, 8, 0.375)
  assert sorted(found.held.sum(1)) == [4, 4, 4, 4, 5, 5, 5, 5]
  assert found.groups.shape == (8, 1, 5)


@pytest.mark.parametrize("coverage", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("units", [8, 24, 64])
def test_nested_workers_hold_the_first_units_fewer_each(units, coverage):
  found = assignments.neurons(2, units, 8, coverage, first_units=True)
  counts = found.held.sum(1)
  assert counts[0] == found.held.shape[1]  # all of them
  assert (np.diff(counts) <= 0).all() and counts[-1] > 0
  assert abs(found.coverage - coverage) < 0.07
  by_layer = found.held.reshape(8, 2, -1)
  assert (np.diff(by_layer.astype(int), axis=2) <= 0).all()  # the first ones
  assignments.check("mlp", found)


def test_layers_go_round_the_ring_as_the_docstring_says():
  found = assignments.blocks(16, 8, 0.5)
  assert found.lanes[2].tolist() == [2, 3, 4, 5, 10, 11, 12, 13]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("layers", [8, 16])
@pytest.mark.parametrize("coverage", [(0.5, 0.5), (0.5, 1.0), (1.0, 0.25)])
def test_both_levels_are_held_and_owned_evenly(coverage, layers, seed):
  holders = round(8 * coverage[0] * coverage[1])
  found = assignments.both(layers, 16, 8, coverage, places(seed))
  judge(found, 8, holders)
  alone = assignments.blocks(layers, 8, coverage[0], places(seed))
  np.testing.assert_array_equal(found.lanes, alone.lanes)
  np.testing.assert_array_equal(
    assignments.both(layers, 1, 8, coverage, places(seed)).held, alone.held
  )


def walk(held):
  """Eigenvalues of worker -> cell -> worker, the largest first."""
  to_cell = held / held.sum(1, keepdims=True)
  to_worker = held / held.sum(0)
  return np.sort(np.linalg.eigvals(to_cell @ to_worker.T).real)[::-1]


def components(held):
  """Sets of workers that are joined by what they hold."""
  reach = (held.astype(int) @ held.T > 0).astype(int)
  for _ in range(len(held)):
    reach = (reach @ reach > 0).astype(int)
  return len({tuple(row) for row in reach})


@pytest.mark.parametrize(("holders", "gap"), GAPS.items())
def test_the_spectral_gap_of_the_ring_is_the_known_one(holders, gap):
  held = assignments.neurons(1, 64, 8, holders / 8).held.astype(float)
  values = walk(held)
  np.testing.assert_allclose(values[0], 1)
  np.testing.assert_allclose(1 - values[1], gap, atol=6e-4)


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("workers", [3, 4, 8])
def test_workers_are_connected_from_two_holders_on(workers, seed):
  for holders in range(1, workers + 1):
    coverage = holders / workers
    held = assignments.neurons(1, 24, workers, coverage, places(seed)).held
    if 24 % workers == 0:
      assert components(held) == (workers if holders == 1 else 1)


@pytest.mark.parametrize("holders", range(1, 9))
def test_two_workers_overlap_by_their_distance_on_the_ring(holders):
  n = 8
  held = assignments.neurons(1, 8, n, holders / n).held.astype(int)
  for i in range(n):
    for j in range(n):
      d = min((i - j) % n, (j - i) % n)
      common = max(0, holders - d) + max(0, holders - (n - d))
      assert held[i] @ held[j] == (holders if d == 0 else common)


def test_shuffled_layers_have_windows_of_their_own_and_the_same_each_time():
  a, b, c = (assignments.neurons(8, 16, 8, 0.25, places(s)) for s in (0, 0, 1))
  np.testing.assert_array_equal(a.held, b.held)
  assert not np.array_equal(a.held, c.held)
  by_layer = a.held.reshape(8, 8, 8)
  assert len({by_layer[:, k].tobytes() for k in range(8)}) > 1
  # What joins the workers: over all layers any two have something in common.
  assert (
    walk(a.held.astype(float))[1]
    < walk(assignments.neurons(8, 16, 8, 0.25).held.astype(float))[1]
  )


def test_what_is_one_unit_cannot_be_cut():
  assert assignments.neurons(4, 1, 8, 0.5) is None
  assert assignments.blocks(1, 8, 0.5) is None


@pytest.mark.parametrize(
  ("workers", "coverage", "says"),
  [
    (
      8,
      0.3,
      r"0\.3 on 8 workers .* 2\.4 holders.* Nearest: 0\.25 or 0\.375\.$",
    ),
    (8, 0.01, r"Nearest: 0\.125\.$"),
    (3, 0.5, r"Nearest: 0\.333333 \(1/3\) or 0\.666667 \(2/3\)\.$"),
    (1, 0.5, r"Nearest: 1\.$"),
  ],
)
def test_a_coverage_of_no_whole_holders_is_refused_with_the_nearest(
  workers, coverage, says
):
  with pytest.raises(ValueError, match=says):
    rings.holders(workers, coverage)


def test_thirds_may_be_written_in_three_digits():
  assert rings.holders(3, 0.333) == 1
  assert rings.holders(3, 0.667) == 2


def test_what_nobody_holds_or_a_stranger_owns_is_refused():
  good = assignments.neurons(2, 4, 4, 0.5)
  bad = good._replace(groups=np.zeros_like(good.groups))
  with pytest.raises(ValueError, match="no worker holds group 1 of 'mlp' in l"):
    assignments.check("mlp", bad)
  bad = good._replace(owners=(good.owners + 1) % 4)
  with pytest.raises(ValueError, match="an owner of 'mlp' is not among the"):
    assignments.check("mlp", bad)
