"""Blocks that are held whole against plain loops that leave blocks out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax import inspect
from distrain_jax.methods.sdp import whole

pytestmark = pytest.mark.core

N, E, ROWS, STEPS, KEY = 4, 4, 16, 4, jax.random.key(0)
WIDTHS = {"one": 3, "two": 5, "three": 2, "four": 7}  # no two alike
RATE, MOMENTUM, CLIP_NORM = 0.05, 0.9, 1.2
SGD = optax.sgd(RATE, momentum=MOMENTUM)


def start():
  rng = np.random.default_rng(3)
  blocks = {
    name: {
      "a": 0.4 * rng.normal(size=(E, width)),
      "c": 0.3 * rng.normal(size=(width, E)),
    }
    for name, width in WIDTHS.items()
  }
  return {**blocks, "v": 0.5 * rng.normal(size=E)}


def batch(step):
  rng = np.random.default_rng(step)
  x = rng.normal(size=(ROWS, E)) + np.linspace(-1, 1, ROWS)[:, None]
  return {"x": x, "y": np.sin(x.sum(1))}


def loss_fn(params, rows, key):
  """Of the blocks that there are."""
  del key
  h = rows["x"].astype(params["v"].dtype)
  for name in WIDTHS:
    if name in params:
      h = h + jnp.tanh(h @ params[name]["a"]) @ params[name]["c"]
  return jnp.mean((h @ params["v"] - rows["y"]) ** 2), {}


def gradient(p, there, x, y):
  """Loss and gradients by hand in float64; zeros for blocks that are absent."""
  h, kept = x, {}
  for name in WIDTHS:
    if name in there:
      hidden = np.tanh(h @ p[name]["a"])
      kept[name] = h, hidden
      h = h + hidden @ p[name]["c"]
  error = h @ p["v"] - y
  d = 2 * error / len(y)
  g = jax.tree.map(np.zeros_like, p)
  g["v"] = h.T @ d
  d_h = np.outer(d, p["v"])
  for name in reversed(kept):
    before, hidden = kept[name]
    g[name]["c"] = hidden.T @ d_h
    inner = (d_h @ p[name]["c"].T) * (1 - hidden**2)
    g[name]["a"] = before.T @ inner
    d_h = d_h + inner @ p[name]["a"].T
  return np.mean(error**2), g


class Oracle:
  """SGD with momentum; a block's gradient is the mean over its holders."""

  def __init__(self, holders, masking):
    self.p, self.holders, self.masking = start(), holders, masking
    self.m = jax.tree.map(np.zeros_like, self.p)

  def step(self, rows):
    losses, sums = [], jax.tree.map(np.zeros_like, self.p)
    for w in range(N):
      mine = slice(w * ROWS // N, (w + 1) * ROWS // N)
      trains = [b for b in WIDTHS if w in self.holders[b]]
      there = trains if self.masking == "forward" else list(WIDTHS)
      loss, g = gradient(self.p, there, rows["x"][mine], rows["y"][mine])
      losses.append(loss)
      for name in [*trains, "v"]:
        sums[name] = jax.tree.map(np.add, sums[name], g[name])
    means = {}
    for name, total in sums.items():
      count = len(self.holders.get(name, range(N)))
      means[name] = jax.tree.map(lambda s, n=count: s / n, total)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(means)))
    scale = min(1, CLIP_NORM / norm)
    self.m = jax.tree.map(lambda m, g: MOMENTUM * m + scale * g, self.m, means)
    self.p = jax.tree.map(lambda p, m: p - RATE * m, self.p, self.m)
    return np.mean(losses), norm


def make(**options):
  params = toys.float32(start())
  return dj.sdp(
    loss_fn,
    SGD,
    names=jax.tree.map(lambda x: (None,) * x.ndim, params),
    shapes=params,
    level="block",
    blocks=tuple(WIDTHS),
    clip_norm=CLIP_NORM,
    **options,
  )


def run_through(run):
  state, seen = run.init(KEY, toys.float32(start())), []
  for i in range(STEPS):
    state, metrics = run.step(state, toys.float32(batch(i)), KEY)
    seen.append([float(metrics[k]) for k in ("loss", "grad_norm")])
  return state, np.array(seen)


@functools.cache
def trained(**options):
  run = dj.simulate(make(**options), workers=N)
  return run, *run_through(run)


def holders(coverage, assignment="cyclic"):
  """{block: its workers}; cyclic ones from their places on the ring."""
  each = round(coverage * N)
  if assignment == "cyclic":
    return {b: {(i + j) % N for j in range(each)} for i, b in enumerate(WIDTHS)}
  sizes = {name: 4 * 2 * E * width for name, width in WIDTHS.items()}
  held = whole.hold(sizes, N, each, balanced=True)
  return {b: set(np.flatnonzero(held[:, i])) for i, b in enumerate(WIDTHS)}


CASES = [
  {"coverage": 0.5, "masking": "forward"},
  {"coverage": 0.5, "masking": "backward"},
  {"coverage": 0.25, "masking": "forward", "shard_optimizer": True},
  {"coverage": 0.75, "masking": "forward", "accumulate": 2},
  {"coverage": 0.5, "masking": "forward", "assignment": "balanced"},
]
by_case = pytest.mark.parametrize(
  "options", CASES, ids=lambda x: "-".join(map(str, x.values()))
)


def test_the_oracle_s_gradient_is_that_of_its_loss():
  p, there, rows = start(), ("one", "four"), batch(0)
  _, g = gradient(p, there, rows["x"], rows["y"])
  rng = np.random.default_rng(5)
  way = jax.tree.map(lambda x: rng.normal(size=x.shape), p)
  at = lambda t: gradient(
    jax.tree.map(lambda x, d: x + t * d, p, way), there, rows["x"], rows["y"]
  )[0]
  products = jax.tree.map(lambda a, b: (a * b).sum(), g, way)
  slope = (at(1e-5) - at(-1e-5)) / 2e-5
  np.testing.assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=1e-6)


@by_case
def test_steps_equal_plain_loops(options):
  run, state, seen = trained(**options)
  who = holders(options["coverage"], options.get("assignment", "cyclic"))
  oracle = Oracle(who, options["masking"])
  expected = [oracle.step(batch(i)) for i in range(STEPS)]
  norms = [norm for _, norm in expected]
  assert min(norms) < CLIP_NORM < max(norms)
  np.testing.assert_allclose(seen, expected, rtol=2e-5)
  toys.near(run.params(state), oracle.p)


@by_case
def test_on_a_mesh_it_is_the_same(options, mesh):
  run, state, seen = trained(**options)
  there = dj.distribute(run.method, mesh(N))
  got, found = run_through(there)
  np.testing.assert_allclose(found, seen, rtol=1e-6)
  toys.near(there.params(got), run.params(state), 1e-6)


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_who_holds_everything_trains_like_ddp(masking):
  run, state, seen = trained(coverage=1.0, masking=masking)
  ddp = dj.simulate(dj.ddp(loss_fn, SGD, clip_norm=CLIP_NORM), workers=N)
  expected, losses = run_through(ddp)
  np.testing.assert_allclose(seen, losses, rtol=1e-6)
  toys.near(run.params(state), ddp.params(expected), 2e-6)


def test_all_holders_have_a_block_to_the_bit():
  run, state, _ = trained(coverage=0.75, masking="forward", accumulate=2)
  model, who = toys.numpy(run.params(state)), holders(0.75)
  table = np.array([[w in who[b] for b in WIDTHS] for w in range(N)])
  blocks = whole.make({b: model[b] for b in WIDTHS}, [table])
  buffers = toys.numpy(state.params.whole)
  for w in range(N):
    mine = blocks.unpack({k: x[w] for k, x in buffers.items()}, w)
    assert mine.keys() == {b for b in WIDTHS if w in who[b]}
    toys.equal(mine, {b: model[b] for b in mine})


@pytest.mark.parametrize(
  "options", [x for x in CASES if x["coverage"] == 0.5], ids=str
)
def test_another_number_of_workers_goes_on_with_the_same_model(options):
  run, state, _ = trained(**options)
  saved, model = toys.numpy(state), toys.numpy(run.params(state))
  two = dj.simulate(run.method, workers=2)
  there = two.adopt(saved)
  toys.equal(two.params(there), model)
  toys.equal(run.adopt(toys.numpy(there)), saved)
  _, metrics = two.step(there, toys.float32(batch(STEPS)), KEY)
  p = jax.tree.map(np.float64, model)
  rows, losses = batch(STEPS), []
  sizes = {name: 4 * 2 * E * width for name, width in WIDTHS.items()}
  balanced = options.get("assignment") == "balanced"
  held = whole.hold(sizes, 2, 1, balanced=balanced)
  for w in range(2):
    mine = [b for b, h in zip(WIDTHS, held[w]) if h]
    mine = list(WIDTHS) if options["masking"] == "backward" else mine
    own = slice(w * ROWS // 2, (w + 1) * ROWS // 2)
    losses.append(gradient(p, mine, rows["x"][own], rows["y"][own])[0])
  np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("assignment", ["cyclic", "balanced"])
@pytest.mark.parametrize("coverage", [0.25, 0.5, 0.75])
def test_it_sends_an_all_reduce_of_what_the_longest_worker_holds(
  coverage, assignment, mesh
):
  run = dj.distribute(make(coverage=coverage, assignment=assignment), mesh(N))
  params = toys.float32(start())
  found = inspect.bytes_sent(
    run, run.abstract(KEY, params), toys.float32(batch(0)), KEY
  )
  # Of each array a worker owns a fourth, rounded up.
  sizes = {b: N * sum(-(-E * w // N) for _ in "ac") for b, w in WIDTHS.items()}
  who = holders(coverage, assignment)
  held = [sum(sizes[b] for b in WIDTHS if w in who[b]) for w in range(N)]
  assert found["all_to_all"] == 2 * 4 * max(held) * (N - 1) / N
  assert found["psum"] <= 2 * 4 * (E + 4) * (N - 1) / N  # shared, and scalars
