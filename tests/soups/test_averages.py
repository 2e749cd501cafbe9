"""Averages against NumPy; the greedy soup's promise; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import soups
from distrain_jax.method import Variables
from distrain_jax.soups import trees as trees_


def wide(x):
  return np.asarray(x).astype(np.float64)


def assert_is(found, leaves_of_models, weights):
  """Against a sum in float64, rounded to the leaf's dtype."""
  for x, *ys in zip(jax.tree.leaves(found), *leaves_of_models):
    assert x.dtype == ys[0].dtype and x.shape == ys[0].shape
    if not jnp.issubdtype(x.dtype, jnp.floating):
      np.testing.assert_array_equal(x, ys[0])
      continue
    wanted = sum(w * wide(y) for w, y in zip(weights, ys))
    eps = float(jnp.finfo(x.dtype).eps)
    scale = max(np.abs(wide(y)).max() for y in ys)
    np.testing.assert_allclose(wide(x), wanted, atol=2 * eps * scale)


@pytest.mark.parametrize(
  "weights", [None, [0.5, 0.25, 0.25], [1, 0, 0], [2, -0.5, -0.5]]
)
def test_a_mean_is_that_of_numpy(trees, weights):
  models = trees(3)
  if weights is None:
    found, weights = soups.uniform(models), [1 / 3] * 3
  else:
    found = soups.weighted(models, weights)
  assert jax.tree.structure(found) == jax.tree.structure(models[0])
  assert_is(found, [jax.tree.leaves(m) for m in models], weights)


def test_low_precision_is_summed_in_float32():
  """256 + 1 is 256 in bfloat16, and a float16 sum would overflow."""
  low = lambda x, dtype: {"w": jnp.full((3,), x, dtype)}
  bfloat = [low(256, "bfloat16")] + [low(260, "bfloat16")] * 3
  assert soups.uniform(bfloat)["w"].tolist() == [260] * 3  # 259, rounded
  floats = [low(60000, "float16")] * 4
  assert soups.uniform(floats)["w"].tolist() == [60000] * 3


@pytest.mark.parametrize("n", [1, 3, 7])
def test_the_mean_of_equal_models_is_that_model_to_the_bit(trees, n):
  (model,) = trees(1)
  found = soups.uniform([model] * n)
  jax.tree.map(np.testing.assert_array_equal, found, model)


def test_float64_stays_as_wide():
  models = [{"w": np.array([1 + 2.0**-40])}, {"w": np.array([1.0])}]
  found = soups.uniform(models)["w"]
  assert found.dtype == np.float64 and found[0] == 1 + 2.0**-41


def scores_of(values):
  """A score that a soup's mean value has, by a table."""
  return lambda model: values[round(float(model["w"]), 6)]


def test_greedy_keeps_only_what_is_strictly_better():
  models = [{"w": np.float32(x)} for x in (0.0, 2.0, 4.0, 6.0)]
  # Alone; then 4 with 2 (equal: left out), 4 with 6 (kept), and with 0.
  values = {0: 0.1, 2: 0.8, 4: 0.9, 6: 0.7, 3: 0.9, 5: 0.95, 3.333333: 0.2}
  found = soups.greedy(models, scores_of(values))
  assert found.chosen == (2, 3) and float(found.model["w"]) == 5
  assert [x.members for x in found.tried] == [
    *[(i,) for i in range(4)],
    *[(2, 1), (2, 3), (2, 3, 0)],
  ]
  assert [x.score for x in found.tried][-3:] == [0.9, 0.95, 0.2]


def test_greedy_is_never_below_the_best_member():
  rng = np.random.default_rng(0)
  for _ in range(30):
    models = [{"w": rng.normal(size=5)} for _ in range(4)]
    goal = rng.normal(size=5)
    # A bumpy score, of which averages may be worse than all members.
    score = lambda m, goal=goal: float(np.sin(9 * (m["w"] - goal)).sum())
    found = soups.greedy(models, score)
    alone = [score(m) for m in models]
    assert score(found.model) >= max(alone)
    assert score(found.model) == max(x.score for x in found.tried)
    kept = soups.uniform([models[i] for i in found.chosen])
    np.testing.assert_allclose(found.model["w"], kept["w"], rtol=1e-12)


def test_greedy_of_one_is_that_model_whatever_the_average():
  model = {"w": np.float32(1)}
  found = soups.greedy([model], lambda m: 0.0, average=lambda ms: 1 / 0)
  assert found.model is model and found.chosen == (0,)


def test_a_soup_without_a_score_is_not_better():
  models = [{"w": np.float32(x)} for x in (0, 2)]
  score = scores_of({0: 0.1, 2: 0.2, 1: float("nan")})
  assert soups.greedy(models, score).chosen == (1,)
  with pytest.raises(ValueError, match=r"score of models\[1\] is NaN"):
    soups.greedy(models, scores_of({0: 0.1, 2: float("nan")}))


def changed(model, **fields):
  return model._replace(params={**model.params, **fields})


SOUPS = {
  "uniform": soups.uniform,
  "weighted": lambda models: soups.weighted(models, [0.5, 0.5]),
  "greedy": lambda models: soups.greedy(models, lambda m: 1 / 0),
  "interpolate": lambda models: soups.interpolate(*models, 0.5),
  "path": lambda models: soups.path(*models, lambda m: 1 / 0),
  "layer_paths": lambda models: soups.layer_paths(*models, lambda m: 1 / 0),
  "consensus_distance": soups.consensus_distance,
}


@pytest.mark.parametrize("name", SOUPS)
def test_models_that_cannot_be_combined_are_refused_by_name(name, trees):
  a, b = trees(2)
  kernel = b.params["dense"]["kernel"]
  bad = {
    r"models\[1\] is unlike models\[0\]: params/dense/kernel is \(4, 3\) "
    r"float32 in it, but \(3, 4\) float32": {**b.params["dense"]}
    | {"kernel": kernel.T},
    r"params/dense/bias is missing in it": {"kernel": kernel},
    r"params/dense/more is \(4,\) float32 in it, but missing": {
      **b.params["dense"],
      "more": np.zeros(4, np.float32),
    },
    r"params/dense/bias is \(4,\) float64 in it": {
      **b.params["dense"],
      "bias": np.zeros(4),
    },
    r"models\[1\] has 2 of 4 values that are not finite in params/dense/bias": {
      **b.params["dense"],
      "bias": np.array([0, np.nan, np.inf, 1], np.float32),
    },
  }
  for says, dense in bad.items():
    with pytest.raises(ValueError, match=f"(?s)^{name}: .*{says}"):
      SOUPS[name]([a, changed(b, dense=dense)])
  other = b._replace(
    model_state={**b.model_state, "count": {"seen": np.int32(8)}}
  )
  with pytest.raises(
    ValueError, match=f"^{name}: model_state/count/seen is int"
  ):
    SOUPS[name]([a, other])


def test_no_models_or_one_that_is_no_list_are_refused(trees):
  (model,) = trees(1)
  for empty in ([], ()):
    with pytest.raises(ValueError, match="`models` is empty"):
      soups.uniform(empty)
  for one in (model, model.params, np.zeros(3)):
    with pytest.raises(ValueError, match=r"is a list of models.*unstack"):
      soups.uniform(one)
  with pytest.raises(ValueError, match="has other containers"):
    soups.uniform([{"w": [np.zeros(2)]}, {"w": (np.zeros(2),)}])


@pytest.mark.parametrize(
  "weights, says",
  [
    ([0.5, 0.25], "must sum to 1; .* sum to 0.75. Divide each by 0.75"),
    ([1.0], "has 1 numbers for 2 models"),
    ([np.nan, 1.0], "must be finite"),
    ([1.0, -1.0], "sum to 0"),
  ],
)
def test_weights_that_are_none_are_refused(weights, says, trees):
  with pytest.raises(ValueError, match=says):
    soups.weighted(trees(2), weights)


def test_layers_are_modules_with_their_statistics(trees):
  (model,) = trees(1)
  leaves = trees_.named(model)
  names = list(leaves)
  by_layer = {
    layer: {names[i] for i in own} for layer, own in soups.layers(model).items()
  }
  assert by_layer == {
    "dense": {"params/dense/kernel", "params/dense/bias"},
    "block/conv": {"params/block/conv/kernel"},
    "block/norm": {
      "params/block/norm/scale",
      "model_state/batch_stats/block/norm/mean",
    },
    "seen": {"model_state/count/seen"},
  }
  assert set(soups.layers(model, 1)) == {"dense", "block", "seen"}
  with pytest.raises(ValueError, match="`depth` counts keys"):
    soups.layers(model, 0)


def test_stacked_members_come_apart(trees):
  models = trees(3)
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *models)
  apart = soups.unstack(stacked)
  assert isinstance(apart[0], Variables) and len(apart) == 3
  jax.tree.map(np.testing.assert_array_equal, apart, models)
  with pytest.raises(ValueError, match="one leading axis of N members"):
    soups.unstack({"a": np.zeros(2), "b": np.zeros(3)})
