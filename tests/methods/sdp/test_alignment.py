"""Cosines of subnetworks' gradients with the dense one, against NumPy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax.methods.sdp import alignment, alone

pytestmark = pytest.mark.core

KEY, E = toys.KEY, toys.E
KEYS = ("cosine", "norm_ratio", "cosine_sampled", "cosine_to_mean")
NAMED = {"names": toys.NAMES, "workers": toys.N}


@functools.cache
def measured(level, masking, whole=False, same=False):
  """Of the toy at coverage 1/2, or 1; same: all workers have equal rows."""
  params = toys.float32(toys.start())
  rows = toys.float32((toys.same_for_all if same else toys.batch)(0))
  coverage = toys.LEVELS[level]
  if whole:
    coverage = (1.0, 1.0) if level == "both" else 1.0
  how = {"level": level, "masking": masking, "coverage": coverage}
  fn = functools.partial(
    alignment, toys.loss_fn, shapes=toys.shapes_of(params), **NAMED, **how
  )
  return jax.tree.map(np.asarray, jax.jit(fn)(params, rows, KEY))


def flat(tree):
  return np.concatenate([tree[k].ravel() for k in sorted(tree)])


def compare(a, b):
  norms = np.linalg.norm(a), np.linalg.norm(b)
  return a @ b / norms[0] / norms[1], norms[0] / norms[1]


def expected(level, masking):
  p, rows, on = toys.start(), toys.batch(0), toys.masks(level)
  trains = toys.whole_masks(level, on)
  all_hold = flat({k: m.all(0) for k, m in trains.items()})
  pairs, sums = [], 0.0
  for w in range(toys.N):
    mine = slice(w * toys.ROWS // toys.N, (w + 1) * toys.ROWS // toys.N)
    x, y = rows["x"][mine], rows["y"][mine]
    there = on[w] if masking == "forward" else np.ones_like(on[w])
    held = flat({k: trains[k][w] for k in p})
    g = flat(toys.gradient(p, there, x, y)[1]) * held
    dense = flat(toys.gradient(p, np.ones_like(on[w]), x, y)[1])
    some = held * ~all_hold
    sampled, _ = compare(g * some, dense * some)
    pairs.append((*compare(g, dense * held), sampled))
    sums = sums + np.stack([g, held])
  dense = toys.gradient(p, np.ones_like(on[0]), rows["x"], rows["y"])[1]
  return [*zip(*pairs), compare(sums[0] / sums[1], flat(dense))[0]]


@pytest.mark.parametrize(
  ("level", "masking"),
  [
    ("neuron", "forward"),
    ("block", "forward"),
    ("both", "forward"),
    ("neuron", "backward"),
    ("block", "backward"),
  ],
)
def test_the_numbers_are_those_of_masks_in_numpy(level, masking):
  found = measured(level, masking)
  for name, value in zip(KEYS, expected(level, masking)):
    np.testing.assert_allclose(found[name], value, rtol=2e-5)


@pytest.mark.parametrize(
  ("level", "masking"), [("neuron", "forward"), ("both", "backward")]
)
def test_whole_subnetworks_agree_with_the_whole_model(level, masking):
  for value in measured(level, masking, whole=True).values():
    np.testing.assert_allclose(value, 1, rtol=1e-6)


def test_backward_masks_on_the_same_rows_are_the_dense_gradient():
  for value in measured("neuron", "backward", same=True).values():
    np.testing.assert_allclose(value, 1, rtol=1e-6)
  found = measured("neuron", "backward")  # workers' rows differ
  np.testing.assert_allclose(found["cosine"], 1, rtol=1e-6)
  assert found["cosine_to_mean"] < 0.95


WIDTHS = {"block_0": 3, "block_1": 5}


def blocks_start():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "stem": draw(E, E),
    **{k: {"a": draw(E, m), "b": draw(m, E)} for k, m in WIDTHS.items()},
  }


def blocks_loss(params, stats, rows, key):
  """Of the blocks that are there, with a shift from each one's statistics."""
  del key
  h, after = rows["x"] @ params["stem"], {}
  for name in sorted(stats["shift"]):
    block = params[name]
    h = h + (h + stats["shift"][name]) @ block["a"] @ block["b"]
    after[name] = stats["shift"][name] + 1
  return jnp.mean(h**2), ({}, {"shift": after})


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_whole_blocks_and_statistics_are_left_out_together(masking):
  params, names = blocks_start(), [*WIDTHS]
  stats = {"shift": {k: jnp.ones(()) * i for i, k in enumerate(names)}}
  rows = {"x": toys.float32(toys.batch(0))["x"]}
  axes = lambda tree: jax.tree.map(lambda x: ("embed",) * x.ndim, tree)
  variables = dj.Variables(params, stats)
  loss = dj.stateful(blocks_loss)
  found = alignment(
    loss,
    variables,
    rows,
    KEY,
    workers=2,
    names=dj.Variables(axes(params), axes(stats)),
    shapes=variables,
    level="block",
    blocks=names,
    masking=masking,
  )
  grad = jax.grad(blocks_loss, has_aux=True)
  for w, name in enumerate(names):  # one each
    share = {"x": np.split(rows["x"], 2)[w]}
    dense, _ = grad(params, stats, share, KEY)
    mine, kept = params, stats
    if masking == "forward":
      mine = {k: params[k] for k in ("stem", name)}
      kept = {"shift": {name: stats["shift"][name]}}
    g, _ = grad(mine, kept, share, KEY)
    pair = [
      np.concatenate([x.ravel() for x in jax.tree.leaves((t["stem"], t[name]))])
      for t in (g, dense)
    ]
    cosine, ratio = compare(*pair)
    np.testing.assert_allclose(found["cosine"][w], cosine, rtol=1e-5)
    np.testing.assert_allclose(found["norm_ratio"][w], ratio, rtol=1e-5)
  assert masking == "backward" or found["cosine"].max() < 0.999


@pytest.mark.parametrize("level", toys.LEVELS)
def test_a_worker_alone_has_what_it_has_in_a_run(level):
  params = toys.float32(toys.start())
  shapes, coverage = toys.shapes_of(params), toys.LEVELS[level]
  how = {"shapes": shapes, "level": level, "coverage": coverage}
  each = alone(toys.loss_fn, **NAMED, **how)

  @jax.jit
  def run(me):
    own = each.own(dj.Variables(params, ()), me, 0).params
    return own, each.spread(own, me)

  state = toys.case(level, "forward", False).begun
  held = toys.whole_masks(level, toys.masks(level))
  for w in range(toys.N):
    own, spread = run(w)
    toys.equal(own, toys.of_worker(state.params, w))
    toys.equal(spread, {k: x * held[k][w] for k, x in params.items()})


def test_what_makes_up_for_absent_units_is_in_the_gradient():
  params, rows = toys.float32(toys.start()), toys.float32(toys.batch(0))
  shapes = toys.shapes_of(params)
  each = alone(toys.loss_fn, shapes=shapes, rescale="train", **NAMED)
  whole = dj.Variables(params, ())
  own = each.own(whole, 1, 1).params
  doubled = lambda p: toys.loss_fn({**p, "c": 2 * p["c"]}, rows, KEY)[0]
  got = each.gradient(whole, rows, KEY, 1, 1)
  toys.near(got.grads, jax.grad(doubled)(own))
  toys.near(got.loss, doubled(own))


REFUSED = {
  "`masking` is": {"masking": "sideways"},
  "Set rescale='none'": {"masking": "backward", "rescale": "train"},
  "Nearest: 0.25 or 0.5": {"coverage": 0.3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_sdp_refuses_is_refused(message):
  params, rows = toys.float32(toys.start()), toys.float32(toys.batch(0))
  options = {"shapes": params, **NAMED, **REFUSED[message]}
  with pytest.raises(ValueError, match=message):
    alignment(toys.loss_fn, params, rows, KEY, **options)


def test_rows_and_models_that_do_not_fit_are_refused():
  params, rows = toys.float32(toys.start()), toys.float32(toys.batch(0, 14))
  run = functools.partial(alignment, toys.loss_fn, **NAMED)
  with pytest.raises(ValueError, match="multiple of the 4 workers"):
    run(params, rows, KEY, shapes=params)
  other = toys.float32(toys.start(2 * toys.M))
  with pytest.raises(ValueError, match="not those of `shapes`"):
    run(params, rows, KEY, shapes=other)
