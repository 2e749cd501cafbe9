"""A tree of parameters in a file, and what differs when it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax.models import weights


@pytest.fixture
def file(tmp_path):
  return tmp_path / "x.safetensors"


def tree(rows=2, **more):
  kernel = jnp.arange(3.0 * rows).reshape(rows, 3).astype(jnp.bfloat16)
  return {"dense": {"kernel": kernel, "bias": np.zeros(3, np.float32)}, **more}


def test_a_tree_comes_back_with_its_structure_values_and_dtypes(file):
  given = tree()
  weights.save(file, given, {"name": "mlp", "widths": [3]})
  found = weights.load(file, jax.eval_shape(lambda: given))
  assert jax.tree.structure(found) == jax.tree.structure(given)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(given)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.array(), b)
  assert weights.model_of(file) == {"name": "mlp", "widths": [3]}


def test_a_file_need_not_say_what_it_is_of(file):
  weights.save(file, tree())
  assert weights.model_of(file) is None


def test_any_pytree_has_names(file):
  given = (np.zeros(1, np.float32), [np.ones(2, np.float32)])
  weights.save(file, given)
  found = weights.load(file, given)
  np.testing.assert_array_equal(found[1][0].array(), np.ones(2))
  assert list(weights.names(given)) == ["0", "1/0"]


@pytest.mark.parametrize(
  "like, message",
  [
    (tree(rows=4), r"'dense/kernel' is \(2, 3\), but \(4, 3\) in the model"),
    (
      {"dense": {"bias": np.zeros(3)}},
      r"'dense/kernel', \(2, 3\), is not a parameter of the model",
    ),
    (
      tree(more=np.zeros(1)),
      r"no 'more', which the model has, \(1,\)\.$",
    ),
    (
      {"layer": tree()["dense"]},
      "no 'layer/bias', .* It has 'dense/bias', 'dense/kernel' instead",
    ),
  ],
)
def test_the_first_difference_is_named(like, message, file):
  weights.save(file, tree())
  with pytest.raises(ValueError, match=message):
    weights.load(file, like)


def test_whole_numbers_are_no_parameters(file):
  weights.save(file, {"x": np.zeros(3, np.int32)})
  with pytest.raises(ValueError, match="'x' is int32, no float"):
    weights.load(file, {"x": np.zeros(3)})
