"""VeLO's theta from the authors' layout."""

import collections

import jax
import numpy as np
import pytest

from distrain_jax import learned

# Inputs of an element by group: the gradient, the same cut, the parameter, ...
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
State = collections.namedtuple("State", ["hidden", "cell"])


def make_tree():
  """Random numbers in their layout, h = 5 and k = 2."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype("f4")
  layer = lambda rows, cols: {"w": draw(rows, cols), "b": draw(cols)}
  bank = {f"w0__{i}": draw(2, n, 4) for i, n in enumerate(GROUPS)}
  bank |= {"b0": draw(2, 4), "w1": draw(2, 4, 4), "b1": draw(2, 4)}
  bank |= {"w2": draw(2, 4, 3), "b2": draw(2, 3)}
  layers = {
    "linear": layer(30, 5),
    "linear_1": layer(30, 5),
    "linear_2": layer(30, 5),
    "rnn/linear": layer(10, 20),
    "rnn_to_controls": layer(5, 2),
    "step_size": layer(5, 1),
  }
  return {
    "lstm_init_state": State(draw(1, 5), draw(1, 5)),
    "rnn_params": layers,
    "ff_mod_stack": {"~": bank},
  }


def test_every_number_is_in_its_place():
  tree = make_tree()
  theta = learned.velo_theta_from_haiku(tree)
  assert learned.check_velo_theta("test", theta) == (5, 2)
  total = sum(x.size for x in jax.tree.leaves(tree))
  assert sum(x.size for x in theta.values()) == total
  equal = np.testing.assert_array_equal
  equal(theta["start_cell"], tree["lstm_init_state"].cell[0])
  equal(theta["pool_w"], tree["rnn_params"]["linear_1"]["w"])
  equal(theta["own_b"], tree["rnn_params"]["linear_2"]["b"])
  equal(theta["lstm_w"], tree["rnn_params"]["rnn/linear"]["w"])
  bank = tree["ff_mod_stack"]["~"]
  equal(theta["bank_w0"][:, 7:10], bank["w0__5"])  # momenta over sqrt(v)
  equal(theta["bank_w0"][:, 27:], bank["w0__13"])
  learned.velo(theta, num_steps=10)
  # As it is read from a file: pairs have become mappings.
  as_file = {**tree, "lstm_init_state": tree["lstm_init_state"]._asdict()}
  as_file["lstm_init_state"] = dict(
    reversed(as_file["lstm_init_state"].items())
  )
  jax.tree.map(equal, learned.velo_theta_from_haiku(as_file), theta)


def test_what_is_missing_or_misshapen_is_named():
  tree = make_tree()
  del tree["rnn_params"]["step_size"]
  with pytest.raises(ValueError, match=r"no rnn_params\.step_size\.w; where"):
    learned.velo_theta_from_haiku(tree)
  tree = make_tree()
  tree["rnn_params"]["linear"]["w"] = np.ones((31, 5))
  with pytest.raises(ValueError, match=r"'unused_w'.*\(31, 5\), wanted \(30,"):
    learned.velo_theta_from_haiku(tree)
  with pytest.raises(ValueError, match=r"lstm_init_state holds 3 arrays"):
    learned.velo_theta_from_haiku({**tree, "lstm_init_state": (1, 2, 3)})
