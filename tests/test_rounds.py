"""The options of a round, and one worker's share of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distrain_jax as dj
from distrain_jax import gradients, overlap, rounds

pytestmark = pytest.mark.core

N, ROWS = 3, 8
KEY = jax.random.key(0)
OPTIONS = {
  "halves": 2,
  "axis": "i",
  "accumulate": 4,
  "clip_norm": None,
  "wire_dtype": None,
  "param_dtype": None,
  "slices": None,
  "reduction": None,
}


def make_plan(**options):
  return rounds.make_plan("m", **{**OPTIONS, **options})


def plain(params, rows, key):
  return params * rows["x"].mean(), {}


def of_workers(fn, *each):
  return jax.jit(jax.vmap(fn, axis_name="i"))(*each)


@pytest.mark.parametrize(
  ("accumulate", "slices"), [(1, 0), (2, 1), (3, 1), (8, 4)]
)
def test_every_two_microbatches_hide_a_slice(accumulate, slices):
  assert make_plan(accumulate=accumulate).slices == slices
  assert make_plan(accumulate=accumulate, slices=0).slices == 0


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"accumulate": 0}, "m: `accumulate`.*got 0"),
    ({"clip_norm": -1.0}, r"m: `clip_norm`.*got -1\.0"),
    ({"wire_dtype": "int8"}, "m: `wire_dtype`.*got 'int8'"),
    ({"param_dtype": "bfloat17"}, "m: `param_dtype`.*got 'bfloat17'"),
    ({"slices": 3}, "allows 0 to 2; got 3. Pass accumulate=6 or more"),
    ({"slices": 1, "accumulate": 1}, "allows 0 to 0; got 1"),
    ({"slices": -1}, "m: `slices` is a whole number from 0.*got -1"),
    ({"slices": 1.0}, r"m: `slices` is a whole number.*got 1\.0"),
    ({"slices": True}, "m: `slices` is a whole number.*got True"),
    ({"reduction": "ring"}, "`reduction` is reduce_scatter or all_to_all.*'ri"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    make_plan(**options)


def test_a_share_is_cut_into_the_microbatches_of_both_halves():
  plan, x = make_plan(accumulate=2), np.arange(N * ROWS).reshape(N, ROWS)
  todo = of_workers(lambda x: rounds.share(plan, plain, {"x": x}), x)
  assert todo.mine is None
  assert todo.micro["x"].shape == (N, 4, 2)
  np.testing.assert_array_equal(todo.micro["x"][1].ravel(), x[1])
  assert todo.totals.tolist() == [[N * 2.0] * 2] * N  # of all workers


def test_counts_are_each_workers_own_and_totals_everyones():
  plan, x = make_plan(accumulate=2), np.zeros((N, ROWS))
  counts = np.array([[2, 0], [1, 5], [-3, 0]])

  def share(x, counts):
    batch = dj.Counted({"x": x}, counts[None])
    return rounds.share(plan, plain, batch)

  todo = of_workers(share, x, counts)
  assert todo.mine.tolist() == [[2, 0], [1, 2], [0, 0]]  # at most what is cut
  assert todo.totals.tolist() == [[3.0, 2.0]] * N


def test_rows_that_do_not_divide_into_both_halves_are_refused():
  share = functools.partial(rounds.share, make_plan(accumulate=3), plain)
  with pytest.raises(ValueError, match=r"batch\['x'\].*into equal micro"):
    of_workers(share, {"x": np.zeros((N, ROWS))})


def test_sums_wait_in_the_dtype_that_they_travel_in():
  sums = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)}
  dtypes = lambda tree: [x.dtype.name for x in jax.tree.leaves(tree)]
  waiting = functools.partial(rounds.waiting, sums=sums)
  assert dtypes(waiting(make_plan())) == ["float32", "bfloat16"]
  low = make_plan(wire_dtype="bfloat16")
  assert dtypes(waiting(low)) == ["bfloat16"] * 2


def test_means_are_over_all_that_was_taken_and_zero_of_nothing():
  plan = make_plan(accumulate=2)

  def means(loss, totals):
    sums = gradients.Gradient(loss, {"aux": 2 * loss}, (), ())
    return rounds.means(plan, sums, rounds.Share((), None, totals))

  loss = jnp.array([3.0, 0.0, 6.0])
  some, none = jnp.full((N, 2), 1.5), jnp.zeros((N, 2))
  got = of_workers(means, loss, some)
  assert got["loss"].tolist() == [3.0] * N
  assert got["aux"].tolist() == [6.0] * N
  assert of_workers(means, 0 * loss, none)["loss"].tolist() == [0.0] * N


def test_an_exchange_is_as_the_plan_says():
  plan = make_plan(wire_dtype="bfloat16", reduction="all_to_all")
  found = {}

  def look(x):
    found["exchange"] = rounds.exchange(plan, {"x": x})
    return x

  of_workers(look, jnp.zeros((N, 5)))
  assert isinstance(found["exchange"], overlap.Exchange)
  assert found["exchange"].layout.workers == N
  assert found["exchange"][1:] == ("i", 2, "bfloat16", "all_to_all")
