"""What a population cannot be is said before its first step."""

import functools

import jax
import numpy as np
import optax
import pytest

import distrain_jax as dj

N = 4
KEY = jax.random.key(0)
PARAMS = {"w": np.zeros((12, 6), np.float32), "b": np.zeros(6, np.float32)}


def loss_fn(params, batch, key):
  del batch, key
  return params["w"].sum() + params["b"].sum(), {}


def factored():
  return optax.adafactor(0.1, min_dim_size_to_factor=4)


CASES = {
  "moments that cannot follow": (
    functools.partial(dj.wash, shuffle_optimizer=True),
    factored,
    "not part of a tree like the parameters",
  ),
  "few factors": (
    functools.partial(dj.ensemble, learning_rates=(1.0, 2.0)),
    lambda: optax.sgd(0.1),
    "has 2 factors, but the population has 4",
  ),
  "too much of a layer": (
    functools.partial(dj.wash, rate=0.9, equal_volume=True),
    lambda: optax.sgd(0.1),
    "of some layer. Lower the rate to",
  ),
  "who was never there": (
    functools.partial(dj.dart, leave=(1, 7)),
    lambda: optax.sgd(0.1),
    r"leave=\(1, 7\), but with 4 members there, numbers go to 5: \[7\] cannot",
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_when_a_state_is_only_planned(case):
  make, tx, message = CASES[case]
  run = dj.simulate(make(loss_fn, tx()), workers=N)
  with pytest.raises(ValueError, match=message):
    run.abstract(KEY, PARAMS)


def test_moments_that_stay_may_be_of_any_shape():
  run = dj.simulate(dj.wash(loss_fn, factored()), workers=N)
  run.abstract(KEY, PARAMS)
