"""Parameters that stay with their members while others are exchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax.population import rates

N = 4
KEY = jax.random.key(0)
SHAPES = {
  "block_0": {"kernel": (40, 5), "scale": (64,)},
  "block_1": {"kernel": (8, 20), "scale": (64,)},
  "head": {"kernel": (30,)},
}


def params(lead=(N,)):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: rng.normal(size=(*lead, *shape)).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def still(params, batch, key):
  del batch, key
  return 0.0 * sum(x.sum() for x in jax.tree.leaves(params)), {}


def exchanged(make, tx=None, **options):
  method = make(still, tx or optax.sgd(0.0, momentum=0.5), **options)
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, params(), per_worker=True)
  if options.get("shuffle_optimizer"):  # a coordinate's momentum is marked so
    marked = jax.tree.map(jnp.copy, state.params)
    trace, *rest = state.opt_state
    trace = trace._replace(trace=marked)
    state = state._replace(opt_state=(trace, *rest))
  rows = {"x": np.zeros((N, 1), np.float32)}
  return run.step(state, rows, KEY)[0]


OPTIONS = {
  "wash": (dj.wash, {"shuffle_optimizer": True}),
  "independent": (dj.wash, {"shuffle": "independent"}),
  "sparta": (dj.sparta, {}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_is_excluded_stays_to_the_bit_and_the_rest_moves(case):
  make, options = OPTIONS[case]
  state = exchanged(
    make,
    rate=0.5,
    layer_schedule="constant",
    exclude=("*/scale", "head/*"),
    **options,
  )
  before = params()
  for block in ("block_0", "block_1"):
    old, new = before[block], state.params[block]
    np.testing.assert_array_equal(old["scale"], new["scale"])
    changed = np.mean(old["kernel"] != new["kernel"])
    assert 0.25 < changed < 0.65  # 0.375 for permutations, 0.5 for means
  np.testing.assert_array_equal(
    before["head"]["kernel"], state.params["head"]["kernel"]
  )
  if options.get("shuffle_optimizer"):  # its decay apart, it goes along
    trace = state.opt_state[0].trace
    one = lambda x, y: np.testing.assert_allclose(
      0.5 * np.asarray(x), y, rtol=1e-6
    )
    jax.tree.map(one, state.params, trace)


def shapes():
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def rates_of(exclude, equal_volume=False, layer_schedule="decreasing"):
  tree = shapes()
  depths = {
    "block_0": {"kernel": 0, "scale": 0},
    "block_1": {"kernel": 1, "scale": 1},
    "head": {"kernel": 2},
  }
  found = rates.layer_rates(
    "wash",
    tree,
    depths,
    rate=0.2,
    layer_schedule=layer_schedule,
    equal_volume=equal_volume,
    exclude=exclude,
  )
  return tree, np.array([float(x) for x in found])


def test_others_keep_the_rates_of_their_layers():
  _, every = rates_of(())
  _, some = rates_of(("block_?/scale",))
  np.testing.assert_allclose(every, [0.2, 0.2, 0.1, 0.1, 0.0])
  np.testing.assert_allclose(some, [0.2, 0.0, 0.1, 0.0, 0.0])
  # The last layer stays the last, though nothing of it moves.
  _, some = rates_of(("head/kernel", "*_0/*"))
  np.testing.assert_allclose(some, [0.0, 0.0, 0.1, 0.1, 0.0])


@pytest.mark.parametrize("exclude", [(), ("*/scale",), ("*",)])
def test_an_equal_volume_is_that_of_what_may_move(exclude):
  sizes = np.array([x.size for x in jax.tree.leaves(shapes())])
  volume = lambda schedule, equal: sizes @ rates_of(exclude, equal, schedule)[1]
  wanted = volume("constant", False)
  for schedule in ("constant", "decreasing", "increasing"):
    np.testing.assert_allclose(volume(schedule, True), wanted, rtol=1e-12)


@pytest.mark.parametrize(
  "exclude, message",
  [
    ("*/scale", r"`exclude` is a tuple of patterns .* got '\*/scale'"),
    ((1,), "`exclude` is a tuple of patterns"),
    (None, "`exclude` is a tuple of patterns"),
    ((x for x in ("*",)), "`exclude` is a tuple of patterns"),
  ],
)
def test_what_is_no_pattern_is_refused_at_once(exclude, message):
  for make in (dj.wash, dj.sparta):
    with pytest.raises(ValueError, match=message):
      make(still, optax.sgd(0.1), exclude=exclude)


def test_a_pattern_of_nothing_is_refused_before_the_first_step():
  method = dj.wash(still, optax.sgd(0.1), exclude=("*/scale", "block_0/kernl"))
  run = dj.simulate(method, workers=N)
  start = functools.partial(run.abstract, KEY, params(), per_worker=True)
  with pytest.raises(
    ValueError,
    match=r"'block_0/kernl' is the path of no parameter. Paths are "
    r"block_0/kernel, .*, \.\.\.; did you mean 'block_0/kernel'\?",
  ):
    start()
