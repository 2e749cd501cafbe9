"""Straight lines, their barriers, and how far members are apart, by oracles."""

import jax
import numpy as np
import pytest

from distrain_jax import soups
from distrain_jax.soups import picture


def test_interpolation_is_that_of_numpy_and_meets_its_ends(trees):
  a, b = trees(2)
  assert soups.interpolate(a, b, 0) is a and soups.interpolate(a, b, 1) is b
  for t in (0.1, 0.5, 0.75):
    found = soups.interpolate(a, b, t)
    x, y, z = (m.params["dense"]["kernel"] for m in (a, b, found))
    np.testing.assert_allclose(z, (1 - t) * x + t * y, rtol=1e-5, atol=1e-6)
    assert found.model_state["count"]["seen"] == 7


def test_between_equal_models_is_that_model_to_the_bit(trees):
  (a,) = trees(1)
  b = jax.tree.map(np.array, a)
  for t in (0, 0.3, 0.7, 1):
    found = soups.interpolate(a, b, t)
    jax.tree.map(np.testing.assert_array_equal, found, a)


def bumpy(model):
  """(w^2 - 1)^2 summed: two minima with a hill between."""
  return float(np.sum((np.asarray(model["w"]) ** 2 - 1) ** 2))


def test_a_path_and_its_barriers_have_the_known_values():
  a, b = {"w": np.array([-1.0])}, {"w": np.array([1.5])}
  along = soups.path(a, b, bumpy, 6)
  t = np.linspace(0, 1, 6)
  wanted = ((-1 + 2.5 * t) ** 2 - 1) ** 2
  np.testing.assert_allclose(along.t, t)
  np.testing.assert_allclose(along.loss, wanted, atol=1e-12)
  end = wanted[-1]
  np.testing.assert_allclose(soups.barrier(along), max(wanted - t * end))
  found = soups.barrier(along, "mean")
  np.testing.assert_allclose(found, max(wanted) - end / 2)
  assert soups.barrier(along) < found


def test_equal_members_have_no_barrier_and_no_distance(trees):
  (a,) = trees(1)
  loss = lambda m: float(np.sum(np.asarray(m.params["dense"]["kernel"]) ** 2))
  assert soups.barrier(soups.path(a, jax.tree.map(np.array, a), loss)) == 0
  found = soups.consensus_distance([a] * 3)
  assert found.total == (0, 0)
  assert all(x == (0, 0) for x in found.by_layer.values())


def test_a_loss_that_falls_on_the_way_has_no_barrier():
  along = soups.Path(np.array([0, 0.5, 1]), np.array([2.0, 1.0, 2.0]))
  assert soups.barrier(along) == 0 == soups.barrier(along, "mean")


def test_the_ends_of_a_path_are_the_models_themselves():
  a, b = {"w": np.zeros(1)}, {"w": np.ones(1)}
  seen = []
  soups.path(a, b, lambda m: seen.append(m) or 0.0, 3)
  assert seen[0] is a and seen[-1] is b
  assert float(seen[1]["w"][0]) == 0.5


def test_only_one_layer_moves(trees):
  a, b = trees(2)
  seen = []
  loss = lambda m: float(seen.append(m) or len(seen))
  found = soups.layer_paths(a, b, loss, (0, 0.5, 1))
  assert list(found) == list(soups.layers(a))
  assert len(seen) == 1 + 2 * len(found)  # a itself once
  assert seen[0] is a
  numbers = soups.layers(a)
  leaves = lambda m: [np.asarray(x) for x in jax.tree.leaves(m)]
  x, y = leaves(a), leaves(b)
  for k, (name, along) in enumerate(found.items()):
    assert along.loss.tolist() == [1, 2 * k + 2, 2 * k + 3]
    end = leaves(seen[2 * k + 2])
    for i, value in enumerate(end):
      wanted = y[i] if i in numbers[name] else x[i]
      np.testing.assert_array_equal(value, wanted)
    half = leaves(seen[2 * k + 1])
    for i in set(range(len(x))) - set(numbers[name]):
      np.testing.assert_array_equal(half[i], x[i])


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
def test_what_lies_beyond_the_models_is_refused(t, trees):
  a, b = trees(2)
  never = lambda model: 1 / 0
  with pytest.raises(ValueError, match=r"t is in \[0, 1\].*weighted\("):
    soups.interpolate(a, b, t)
  for walk in (soups.path, soups.layer_paths):
    with pytest.raises(ValueError, match=r"t is in \[0, 1\]"):
      walk(a, b, never, [0, t])
    for points in (1, 2.5):
      with pytest.raises(ValueError, match="`points` is a whole number from 2"):
        walk(a, b, never, points)
    with pytest.raises(ValueError, match="`points` is empty"):
      walk(a, b, never, [])


def test_a_barrier_needs_both_ends_and_a_known_definition():
  along = soups.Path(np.array([0, 0.5]), np.zeros(2))
  with pytest.raises(ValueError, match="both ends"):
    soups.barrier(along)
  with pytest.raises(ValueError, match="one of line, mean; got 'max'"):
    soups.barrier(along, "max")


def test_the_consensus_distance_is_that_of_numpy(trees):
  models = trees(3)
  found = soups.consensus_distance(models)
  wide = lambda x: np.asarray(x).astype(np.float64)
  own = {
    "dense": lambda p: [p["dense"]["kernel"], p["dense"]["bias"]],
    "block/conv": lambda p: [p["block"]["conv"]["kernel"]],
    "block/norm": lambda p: [p["block"]["norm"]["scale"]],
  }
  assert found.by_layer.keys() == own.keys()  # no running statistics
  total = norm = 0
  for name, of in own.items():
    w = [
      np.concatenate([wide(x).ravel() for x in of(m.params)]) for m in models
    ]
    mean = sum(w) / 3
    apart = sum(np.sum((x - mean) ** 2) for x in w) / 3
    size = sum(np.sum(x**2) for x in w) / 3
    np.testing.assert_allclose(
      found.by_layer[name], (apart, (apart / size) ** 0.5), rtol=1e-12
    )
    total, norm = total + apart, norm + size
  np.testing.assert_allclose(
    found.total, (total, (total / norm) ** 0.5), rtol=1e-12
  )
  assert set(soups.consensus_distance(models, depth=1).by_layer) == {
    "dense",
    "block",
  }


def test_a_shuffle_among_members_keeps_the_distance(trees):
  """WASH moves values between members: mean and distance stay."""
  models = [m.params for m in trees(4)]
  rng = np.random.default_rng(1)
  stacked = jax.tree.map(lambda *xs: np.stack(xs), *models)
  shuffled = jax.tree.map(lambda x: rng.permuted(x, axis=0), stacked)
  before, after = (
    soups.consensus_distance(m) for m in (models, soups.unstack(shuffled))
  )
  np.testing.assert_allclose(after.total, before.total, rtol=1e-12)


def test_pictures_have_a_panel_for_each_thing(trees, tmp_path):
  a, b = trees(2)
  loss = lambda m: float(np.sum(np.asarray(m.params["dense"]["kernel"])))
  apart = soups.consensus_distance([a, b])
  paths = {f"{i}": soups.path(a, b, loss, 3) for i in range(12)}
  layers = soups.layer_paths(a, b, loss, 2)
  for i, given in enumerate(
    [
      {"paths": paths},
      {"layers": layers, "consensus": apart},
      {"paths": paths, "layers": layers, "consensus": {"x": apart, "y": apart}},
    ]
  ):
    picture.draw(tmp_path / f"{i}.png", title="t", **given)
    assert (tmp_path / f"{i}.png").stat().st_size > 5000
  with pytest.raises(ValueError, match="nothing to draw"):
    picture.draw(tmp_path / "none.png")
