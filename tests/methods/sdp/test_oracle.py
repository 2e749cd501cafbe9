"""SDP against plain loops over dense arrays with masks."""

import numpy as np
import pytest
from sdp import toys

from distrain_jax.methods.sdp import assignments

pytestmark = pytest.mark.core


def follow(oracle, case):
  seen = [oracle.step(toys.batch(i)) for i in range(toys.STEPS)]
  np.testing.assert_allclose(case.seen, seen, rtol=2e-5)
  toys.near(case.params, oracle.p)
  return seen


def test_the_oracle_s_gradient_is_that_of_its_loss():
  p, on = toys.start(), toys.masks("both")[1]
  rows = toys.batch(0)
  _, g = toys.gradient(p, on, rows["x"], rows["y"])
  rng = np.random.default_rng(5)
  way = {k: rng.normal(size=x.shape) for k, x in p.items()}
  at = lambda t: toys.gradient(
    {k: x + t * way[k] for k, x in p.items()}, on, rows["x"], rows["y"]
  )[0]
  slope = sum((g[k] * way[k]).sum() for k in p)
  np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-6)


@pytest.mark.parametrize(
  ("level", "masking", "shard", "accumulate"), toys.CASES
)
def test_steps_equal_plain_loops(level, masking, shard, accumulate):
  case = toys.trained(level, masking, shard, accumulate=accumulate)
  oracle = toys.Oracle(level, masking, toys.masks(level))
  seen = follow(oracle, case)
  norms = [norm for _, norm in seen]
  assert min(norms) < toys.CLIP_NORM < max(norms)


@pytest.mark.parametrize("shard", [False, True])
def test_units_that_workers_do_not_divide_are_shared_out_alike(shard):
  case = toys.trained("neuron", "forward", shard, units=6)
  follow(toys.Oracle("neuron", "forward", toys.masks("neuron", 6)), case)


def shuffled(family, layers, units, workers):
  at = assignments.Places(np.random.default_rng(3))
  return assignments.neurons(layers, units, workers, 0.75, at)


def test_every_layer_may_have_windows_of_its_own():
  case = toys.trained("neuron", "forward", True, assignment=shuffled)
  held = shuffled("mlp", toys.L, toys.M, toys.N).held
  on = held.reshape(toys.N, toys.L, -1).repeat(toys.M // toys.N, axis=2)
  assert len({on[:, k].tobytes() for k in range(toys.L)}) > 1
  follow(toys.Oracle("neuron", "forward", on.astype(float)), case)


@pytest.mark.parametrize(
  ("holders", "masking", "shard"),
  [(3, "forward", False), (3, "forward", True), (1, "backward", False)],
)
def test_some_workers_may_hold_one_unit_more_than_others(
  holders, masking, shard
):
  units, coverage = 6, holders / toys.N
  case = toys.trained("neuron", masking, shard, units, coverage=coverage)
  table = assignments.neurons(1, units, toys.N, coverage)
  assert len(set(table.held.sum(1))) == 2
  on = table.held[:, None].repeat(toys.L, axis=1).astype(float)
  follow(toys.Oracle("neuron", masking, on), case)
  if masking == "forward":  # what is empty is zero, and stays so
    empty = table.groups[:, 0] == units  # (N, places)
    for w, places in enumerate(empty):
      for name in ("a", "b"):
        held = np.asarray(case.state.params.held[name][w])
        assert not held[..., places].any() and held[..., ~places].all()


def nested(family, layers, units, workers):
  return assignments.neurons(layers, units, workers, 0.5, first_units=True)


def test_nested_widths_differ_by_worker():
  case = toys.trained("neuron", "forward", False, assignment=nested)
  held = nested("mlp", 1, toys.M, toys.N).held.repeat(2, axis=1)
  assert len(set(held.sum(1))) > 2
  on = held[:, None].repeat(toys.L, axis=1).astype(float)
  follow(toys.Oracle("neuron", "forward", on), case)
