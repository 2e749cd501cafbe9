"""Whole numbers as options: what counts as one, and who asks."""

import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax.whole import is_whole


@pytest.mark.parametrize(
  "x, least, expected",
  [
    (0, 0, True),
    (0, 1, False),
    (-1, 0, False),
    (np.int32(3), 1, True),
    (np.bool_(True), 0, False),
    (True, 0, False),
    (False, 0, False),
    (1.0, 0, False),
    ("1", 0, False),
    (None, 0, False),
  ],
)
def test_what_is_a_whole_number(x, least, expected):
  assert is_whole(x, least) is expected


MISTAKEN = {
  "accumulate": (dj.ddp, {"accumulate": True}),
  "sync_every": (dj.local_sgd, {"sync_every": True}),
  "delay": (dj.diloco, {"delay": False}),
  "fragments": (dj.diloco, {"fragments": True}),
  "warmup": (dj.acco, {"warmup": False}),
  "slices": (dj.acco, {"slices": False}),
  "period": (dj.wash, {"period": True}),
  "stop_after": (dj.wash, {"stop_after": False}),
  "leave": (dj.wash, {"leave": (False,)}),
  "every": (dj.papa, {"every": True, "tied": False}),
  "joint_steps": (dj.dart, {"joint_steps": False}),
}


@pytest.mark.parametrize("option", MISTAKEN)
def test_a_truth_value_is_no_number(option):
  make, options = MISTAKEN[option]
  with pytest.raises(ValueError, match=f"`{option}`"):
    make(lambda *_: (0.0, {}), optax.sgd(0.1), **options)


def test_nor_a_number_of_workers():
  method = dj.ddp(lambda *_: (0.0, {}), optax.sgd(0.1))
  with pytest.raises(ValueError, match="`workers` is a whole number from 1"):
    dj.simulate(method, workers=True)
