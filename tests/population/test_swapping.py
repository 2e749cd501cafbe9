"""What becomes of chosen coordinates: permuted, or averaged."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.population import selection, swapping

pytestmark = pytest.mark.core

AXIS = "population"
EACH, SAME = P(AXIS), P()
SHAPES = {"a": (16, 12), "b": (3, 8, 5), "c": (24,), "d": (3,), "e": ()}
RATES = [0.5, (0.6, 0.3, 0.0), 0.7, 0.9, 0.9]


def trees(n, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda shape: rng.normal(size=(n, *shape)).astype(np.float32)
  return {name: draw(shape) for name, shape in SHAPES.items()}


def exchange(part, *given, key, axes=AXIS):
  return swapping.exchange_chosen(
    given, list(map(np.asarray, RATES)), key, part, axes
  )


def runner(n, how, mesh):
  """The three forms: by vmap, on a mesh, and two members a device."""
  axes, inner = AXIS, None
  if how == "vmap":
    return spmd.vmap_runner(AXIS, n), axes
  if how == "inner":
    axes, inner, n = (AXIS, "member"), ("member", 2), n // 2
  made = spmd.make_mesh({AXIS: n}, jax.devices()[:n])
  return spmd.mesh_runner(made, AXIS, inner), axes


def shuffle(n, how="vmap", mesh=None, average=False):
  run, axes = runner(n, how, mesh)
  part = swapping.average_parts if average else swapping.shuffle_parts
  part = functools.partial(part, axes=axes)

  def step(one, two, key):
    return tuple(exchange(part, one, two, key=key, axes=axes))

  return jax.jit(run(step, (EACH, EACH, SAME), (EACH, EACH)))


def by_hand(given, key, n):
  """Plain loops over members, parts and coordinates; NumPy.

  The choice and the three permutations are taken from the code under test; what
  is done with them is not.
  """
  choice_key, part_key, route_key = jax.random.split(key, 3)
  shapes = [x.shape[1:] for x in jax.tree.leaves(given)]
  plan = selection.make_plan(shapes, list(map(np.asarray, RATES)), n)
  chosen = jax.tree.map(np.asarray, selection.choose(plan, choice_key))
  first = np.asarray(jax.random.randint(part_key, (plan.count // n,), 0, n))
  keys = jax.random.split(route_key, 3)
  tau, sigma, rho = (np.asarray(swapping.permutation(k, n)) for k in keys)
  slots = []  # (leaf, flat index): of each chosen coordinate, in order
  for i, (pieces, where) in enumerate(zip(plan.leaves, chosen.where)):
    for piece, at in zip(pieces, where):
      shift = (piece.layer or 0) * piece.size
      slots += [(i, shift + x) for x in at]
  pool = [(i, x) for i in plan.pooled for x in range(int(np.prod(shapes[i])))]
  slots += [pool[x] for x in chosen.pool]
  moved = chosen.moved if chosen.moved is not None else [True] * len(slots)
  old = [x.reshape(n, -1) for x in jax.tree.leaves(given)]
  new = [x.copy() for x in old]
  for j, ((leaf, at), move) in enumerate(zip(slots, moved)):
    for member in range(n):
      part = (j + first[j // n]) % n
      to = tau[(sigma[member] + rho[part]) % n]
      if move:
        new[leaf][to, at] = old[leaf][member, at]
  leaves = [x.reshape(n, *s) for x, s in zip(new, shapes)]
  return jax.tree.unflatten(jax.tree.structure(given), leaves)


@pytest.mark.parametrize(
  "n, how", [(2, "vmap"), (5, "vmap"), (4, "mesh"), (6, "inner")]
)
def test_a_shuffle_is_that_of_plain_loops(n, how, mesh):
  one, two, key = trees(n), trees(n, 1), jax.random.key(n)
  found = shuffle(n, how)(one, two, key)
  for given, new in zip((one, two), found):
    expected = by_hand(given, key, n)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
  # Each coordinate's values are the population's own, in another order.
  for name, x in one.items():
    np.testing.assert_array_equal(np.sort(found[0][name], 0), np.sort(x, 0))
  assert any(np.any(found[0][name] != one[name]) for name in one)


def test_the_last_layer_stays():
  one = trees(4)
  found, _ = shuffle(4)(one, one, jax.random.key(1))
  np.testing.assert_array_equal(found["b"][:, 2], one["b"][:, 2])


def test_one_member_and_equal_members_stay_as_they_are():
  alone = trees(1)
  jax.tree.map(
    np.testing.assert_array_equal,
    shuffle(1)(alone, alone, jax.random.key(0))[0],
    alone,
  )
  equal = jax.tree.map(lambda x: np.repeat(x[:1], 4, 0), trees(4))
  jax.tree.map(
    np.testing.assert_array_equal,
    shuffle(4)(equal, equal, jax.random.key(0))[0],
    equal,
  )


def test_what_changes_is_what_is_chosen_but_for_one_in_n():
  """Exactly: a Latin square keeps one part of N at home."""
  n, size = 8, 4096
  x = np.arange(n * size, dtype=np.float32).reshape(n, size)
  part = functools.partial(swapping.shuffle_parts, axes=AXIS)
  step = lambda x, key: swapping.exchange_chosen(
    [x], [np.asarray(0.25)], key, part, AXIS
  )[0]
  run = spmd.vmap_runner(AXIS, n)(step, (EACH, SAME), EACH)
  new = jax.jit(run)(x, jax.random.key(0))
  changed = (np.asarray(new) != x).mean(1)
  np.testing.assert_array_equal(changed, 0.25 * (1 - 1 / n))


def test_expected_products_of_deviations_vanish_as_by_independent_ones():
  """Of coordinates at least N apart; of two in one group they are -1/(N - 1)."""
  n, draws = 4, 8000
  delta = np.float32([1, -1, 1, -1])  # deviations, equal on all coordinates
  x = np.repeat(delta[:, None], 32, 1)
  part = functools.partial(swapping.shuffle_parts, axes=AXIS)
  step = lambda x, key: swapping.exchange_chosen(
    [x], [np.asarray(1.0)], key, part, AXIS
  )[0]
  run = spmd.vmap_runner(AXIS, n)(step, (EACH, SAME), EACH)
  keys = jax.random.split(jax.random.key(2), draws)
  new = np.asarray(jax.jit(jax.vmap(run, (None, 0)))(x, keys))
  products = np.einsum("dnj->dj", new * new[:, :, :1]) / n  # with the first
  mean, error = products.mean(0), products.std(0) / np.sqrt(draws)
  far = np.arange(32)[n : 1 - n]
  assert np.abs(mean[far] / error[far]).max() < 5
  # Groups of N begin at a random place: two that are k apart share one so often.
  for k in range(1, n):
    shared = -(n - k) / n / (n - 1)
    for at in (k, -k):
      assert abs(mean[at] - shared) < 5 * error[at]
  assert mean[0] == 1  # with itself


def law(step, draws=6000):
  """How often each permutation of three members is seen at a coordinate."""
  x = np.repeat(np.arange(3.0, dtype=np.float32)[:, None], 12, 1)
  keys = jax.random.split(jax.random.key(5), draws)
  run = spmd.vmap_runner(AXIS, 3)(step, (EACH, SAME), EACH)
  seen = np.asarray(jax.jit(jax.vmap(run, (None, 0)))(x, keys))
  orders = [tuple(row) for row in seen[:, :, 5].astype(int)]
  return [orders.count(p) for p in itertools.permutations(range(3))]


@pytest.mark.parametrize("form", ["latin", "independent"])
def test_every_permutation_is_equally_likely(form):
  """chi^2 of 5 degrees of freedom: 20.5 is the quantile 0.999."""
  part = functools.partial(swapping.shuffle_parts, axes=AXIS)

  def step(x, key):
    rates = [np.asarray(1.0)]
    if form == "independent":
      return swapping.shuffle_independently([x], rates, key, AXIS)[0]
    return swapping.exchange_chosen([x], rates, key, part, AXIS)[0]

  counts = np.array(law(step))
  expected = counts.sum() / 6
  assert ((counts - expected) ** 2 / expected).sum() < 20.5


@pytest.mark.parametrize("how", ["vmap", "mesh"])
def test_the_reference_moves_each_coordinate_by_a_coin_of_its_own(how):
  n, size, rate = 4, 20_000, 0.2
  x = np.arange(n * size, dtype=np.float32).reshape(n, size)
  run, axes = runner(n, how, None)
  step = lambda one, two, key: tuple(
    swapping.shuffle_independently([one, two], [np.asarray(rate)], key, axes)
  )
  step = jax.jit(run(step, (EACH, EACH, SAME), (EACH, EACH)))
  new, pair = step(x, -x, jax.random.key(0))
  np.testing.assert_array_equal(np.sort(new, 0), x)
  np.testing.assert_array_equal(pair, -np.asarray(new))  # moved together
  changed = (np.asarray(new) != x).mean()
  expected = rate * (1 - 1 / n)
  assert abs(changed - expected) < 5 * np.sqrt(expected / size)


def test_averaged_coordinates_are_those_that_a_shuffle_moves():
  """The same mean as after a shuffle, and members strictly closer to it."""
  one, key = trees(4), jax.random.key(3)
  shuffled, _ = shuffle(4)(one, one, key)
  averaged, _ = shuffle(4, average=True)(one, one, key)
  for name, x in one.items():
    mean = x.mean(0)
    np.testing.assert_allclose(averaged[name].mean(0), mean, atol=1e-6)
    np.testing.assert_allclose(shuffled[name].mean(0), mean, atol=1e-6)
    here = np.asarray(shuffled[name] != x).any(0)
    flat = np.asarray(averaged[name])
    assert np.ptp(flat, axis=0)[here].max(initial=0) == 0
  apart = lambda tree: sum(
    np.square(x - np.mean(x, 0)).sum() for x in map(np.asarray, tree.values())
  )
  np.testing.assert_allclose(apart(shuffled), apart(one), rtol=1e-6)
  assert apart(averaged) < 0.7 * apart(one)


def test_moments_of_another_dtype_go_with_their_coordinates():
  """Where leaves of one tree have dtypes that those of the other have not."""
  n = 4
  one = {k: np.round(8 * x) / 8 for k, x in trees(n).items()}  # exact in bf16
  half = {
    k: jnp.asarray(x, jnp.bfloat16 if k in "ac" else None)
    for k, x in one.items()
  }
  new, pair = shuffle(n)(half, one, jax.random.key(4))
  for name in SHAPES:
    same = np.asarray(new[name], np.float32)
    np.testing.assert_array_equal(same, np.asarray(pair[name]))
  assert np.any(np.asarray(pair["a"]) != one["a"])


def test_dtypes_travel_as_they_are():
  n = 4
  given = {
    "half": jnp.asarray(trees(n)["a"], jnp.bfloat16),
    "small": jnp.asarray(trees(n)["c"], jnp.bfloat16),
    "single": trees(n)["b"],
  }
  part = functools.partial(swapping.shuffle_parts, axes=AXIS)
  rates = [np.asarray(0.9)] * 3
  step = lambda x, key: swapping.exchange_chosen([x], rates, key, part, AXIS)[0]
  new = spmd.vmap_runner(AXIS, n)(step, (EACH, SAME), EACH)(
    given, jax.random.key(0)
  )
  for name, x in given.items():
    assert new[name].dtype == x.dtype
    back = lambda y: np.sort(np.asarray(y, np.float32), 0)
    np.testing.assert_array_equal(back(new[name]), back(x))
