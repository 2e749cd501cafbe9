"""ACCO around models with statistics, sharded ones, and what it refuses."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import layout, spmd

spec = importlib.util.spec_from_file_location(
  "halves", Path(__file__).parent / "halves.py"
)
halves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(halves)

pytestmark = pytest.mark.core

KEY = halves.KEY
RULE = halves.RULES["adamw"]


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layout, "TILES", (1, 1))
    patch.setattr(layout, "LANES", 1)
    yield


def with_statistics(params, stats, rows, key, axis=None):
  """A loss with a running mean, which it subtracts where it is everyone's."""
  mean = rows["x"].mean(0)
  if axis:
    mean = jax.lax.pmean(mean, axis)
  loss, aux = halves.loss_fn(params, {**rows, "x": rows["x"] - mean[None]}, key)
  seen = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "n": stats["n"] + 1}
  return loss, (aux, seen)


@pytest.mark.parametrize("stats", ["averaged", "local", "synchronised"])
def test_statistics_pass_through_both_halves_as_ddps_do(stats):
  axis = "data" if stats == "synchronised" else None
  fn = functools.partial(with_statistics, axis=axis)
  loss_fn = dj.stateful(fn, stats=stats)
  options = {"clip_norm": RULE.clip_norm}
  acco = dj.acco(loss_fn, RULE.tx, wire_dtype=None, accumulate=2, **options)
  acco = dj.simulate(acco, workers=4)
  ddp = dj.simulate(
    dj.ddp(loss_fn, RULE.tx, accumulate=4, **options), workers=4
  )
  model = dj.Variables(
    halves.float32(halves.start()),
    {"mean": jnp.zeros(halves.INPUTS), "n": jnp.zeros((), jnp.int32)},
  )
  state, plain = acco.init(KEY, model), ddp.init(KEY, model)
  for i in range(3):
    # The same rows in a worker's four micro-batches; each worker has its own.
    workers = [halves.batch(4 * i + w, 3) for w in range(4)]
    shares = [halves.repeated(rows, 4) for rows in workers]
    rows = jax.tree.map(lambda *x: np.float32(np.concatenate(x)), *shares)
    state, metrics = acco.step(state, rows, KEY)
    plain, expected = ddp.step(plain, rows, KEY)
    halves.near(state.model_state, plain.model_state, 2e-6)
    halves.near(acco.params(state), ddp.params(plain), 2e-6)
    halves.near(metrics["loss"], expected["loss"], 2e-6)
  seen = np.asarray(state.model_state["n"])
  assert (seen == 3 * 4).all() and seen.shape == (
    (4,) if stats == "local" else ()
  )
  few = dj.simulate(acco.method, workers=2)
  there = few.adopt(jax.tree.map(np.array, state))
  halves.near(few.params(there), acco.params(state), 2e-6)


def on(mesh, params):
  specs = {
    "w": P(None, "tensor"),
    "b": P("tensor"),
    "v": P("tensor"),
    "gain": P(),
  }
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  return jax.tree.map(place, params, specs)


def wide(loss_fn=halves.loss_fn, **options):
  plain = {"wire_dtype": None, "clip_norm": RULE.clip_norm, "accumulate": 2}
  return dj.acco(loss_fn, RULE.tx, **{**plain, **options})


def even_start():
  """A width of 4, that the other axis divides."""
  start = halves.float32(halves.start())
  return {k: x[..., :4] if x.ndim else x for k, x in start.items()}


@pytest.mark.parametrize(
  ("workers", "estimate_dtype"), [(2, "int8"), (4, None)]
)
def test_beside_an_axis_that_shards_the_model_the_numbers_are_the_same(
  workers, estimate_dtype
):
  mesh = spmd.make_mesh({"data": workers, "tensor": 8 // workers})
  method = wide(estimate_dtype=estimate_dtype)
  ends = []
  for run, params in (
    (dj.distribute(method, mesh), on(mesh, even_start())),
    (dj.simulate(method, workers=workers), even_start()),
  ):
    state = run.init(KEY, params)
    for i in range(3):
      rows = jax.tree.map(np.float32, halves.batch(i))
      state, metrics = run.step(state, rows, KEY)
    ends.append((run.params(state), metrics, state.estimate))
    assert run.step.compilations() == 1
    if run.mesh is not None:
      over = NamedSharding(mesh, P(None, "tensor"))
      assert state.estimate["w"].sharding.is_equivalent_to(over, 2)
  halves.near(*ends, 5e-6)


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"accumulate": 0}, "acco: `accumulate`.*got 0"),
    ({"clip_norm": 0.0}, r"acco: `clip_norm`.*got 0\.0"),
    ({"wire_dtype": "int8"}, "acco: `wire_dtype`.*got 'int8'"),
    ({"param_dtype": jnp.int32}, "acco: `param_dtype`"),
    ({"estimate_dtype": "int4"}, "acco: `estimate_dtype`.*got 'int4'"),
    ({"estimate_dtype": jnp.int32}, "acco: `estimate_dtype`"),
    ({"warmup": -1}, "acco: `warmup`.*from 0; got -1"),
    ({"warmup": 1.5}, r"acco: `warmup`.*got 1\.5"),
    ({"warmup": True}, "acco: `warmup`.*got True"),
    ({"warmup": None}, "acco: `warmup`.*got None"),
    ({"slices": 2}, "accumulate=2 allows 0 to 1; got 2"),
    ({"slices": "1"}, "acco: `slices` is a whole number.*got '1'"),
    ({"reduction": "psum"}, "acco: `reduction` is.*got 'psum'"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    wide(**options)


def test_an_optimizer_over_norms_is_refused_by_init():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  run = dj.simulate(dj.acco(halves.loss_fn, tx), workers=2)
  with pytest.raises(ValueError, match=r"acco shards.*clip_norm=\.\.\."):
    run.init(KEY, even_start())


def test_a_mesh_without_the_axis_is_refused(mesh):
  with pytest.raises(ValueError, match="acco works on the axis 'workers'"):
    dj.distribute(wide(axis="workers"), mesh(2))


def test_rows_that_do_not_cut_into_both_halves_are_refused():
  run = dj.simulate(wide(), workers=2)
  rows = jax.tree.map(np.float32, halves.batch(0, 12))
  with pytest.raises(ValueError, match=r"batch\['x'\] has shape \(6, 3\)"):
    run.step(run.init(KEY, even_start()), rows, KEY)
