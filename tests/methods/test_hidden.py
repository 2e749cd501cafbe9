"""ACCO and the delayed updates alike: what they hold, send, keep and refuse."""

import halves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import inspect, spmd

pytestmark = pytest.mark.core

KEY, N = halves.KEY, 4
RULE = halves.RULES["adamw"]
LOW = {"wire_dtype": "bfloat16", "param_dtype": "bfloat16"}
DELAYED = {"dpu": dj.dpu, "weight_prediction": dj.weight_prediction}
FACTORIES = {"acco": dj.acco, **DELAYED}
by_name = pytest.mark.parametrize("name", FACTORIES)
small_tiles = halves.small_tiles(rows=2)


def make(name, loss_fn=halves.loss_fn, tx=RULE.tx, **options):
  plain = {"accumulate": 2, "clip_norm": RULE.clip_norm, "wire_dtype": None}
  return FACTORIES[name](loss_fn, tx, **{**plain, **options})


def point(state):
  """Where the next gradient is taken."""
  return getattr(state, "estimate", None) or state.point


def even_start():
  """A width of 4, that another axis divides."""
  start = halves.float32(halves.start())
  return {k: x[..., :4] if x.ndim else x for k, x in start.items()}


@by_name
def test_resumed_equals_uninterrupted_wherever_it_was_saved(name):
  rough = {"estimate_dtype": "int8"} if name == "acco" else {}
  run = dj.simulate(make(name, warmup=1, **LOW, **rough), workers=N)
  state, kept = halves.begin(run), []
  for i in range(4):
    kept.append(halves.saved(state))
    state, metrics = halves.steps(run, state, 1, first=i)
  end = (halves.saved(state), metrics, run.params(state))
  for i, state in enumerate(kept):
    state, metrics = halves.steps(run, state, 4 - i, first=i)
    halves.equal((state, metrics, run.params(state)), end)


# Bytes a parameter: on all workers, and divided among them; in bfloat16, and
# in float32. Then the scalars: steps, counts.
HELD = {
  "zero1": ((2, 12), (4, 8), 2),
  "acco": ((4, 14), (8, 16), 4),
  "dpu": ((4, 12), (8, 12), 3),
  "weight_prediction": ((4, 12), (8, 12), 3),
}


@pytest.mark.parametrize("workers", [2, 8])
@pytest.mark.parametrize("name", HELD)
def test_it_holds_so_many_bytes_a_parameter(name, workers, mesh):
  factory = dj.zero1 if name == "zero1" else FACTORIES[name]
  loss_fn, adamw = lambda params, rows, key: (0.0, {}), optax.adamw(1e-3)
  # All workers divide it.
  params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
  low, exact, scalars = HELD[name]
  for options, (whole, shared) in ((LOW, low), ({"wire_dtype": None}, exact)):
    run = dj.distribute(factory(loss_fn, adamw, **options), mesh(workers))
    held = inspect.bytes_held(run.abstract(KEY, params))
    assert held == (whole + shared / workers) * 64 * 32 + 4 * scalars


def sent(method, mesh):
  """Bytes a step by eight workers, of 512 parameters."""
  run = dj.distribute(method, mesh(8))
  params = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
  rows = {"x": jax.ShapeDtypeStruct((64, 16), jnp.float32)}
  return inspect.bytes_sent(run, run.abstract(KEY, params), rows, KEY)


def squares(params, rows, key):
  return jnp.mean((rows["x"] @ params["w"]) ** 2), {}


@pytest.fixture(scope="module")
def of_zero1(mesh):
  return sent(dj.zero1(squares, optax.sgd(0.1), **LOW), mesh)


@pytest.mark.parametrize(
  ("name", "exchanges", "slices", "reduction"),
  [
    ("acco", 2, 0, "reduce_scatter"),
    ("acco", 2, 2, "reduce_scatter"),
    ("acco", 2, 1, "all_to_all"),
    ("dpu", 1, 2, "reduce_scatter"),
    ("dpu", 1, 1, "all_to_all"),
    ("weight_prediction", 1, 0, "reduce_scatter"),
  ],
)
def test_a_step_sends_one_of_zero1s_updates_or_two(
  name, exchanges, slices, reduction, mesh, of_zero1
):
  options = {"slices": slices, "reduction": reduction, **LOW}
  method = make(name, squares, optax.sgd(0.1), accumulate=4, **options)
  here = sent(method, mesh)
  one_way = 2 * 512 * 7 / 8  # bfloat16, of eight workers
  assert of_zero1["reduce_scatter"] == of_zero1["all_gather"] == one_way
  assert here[reduction] == here["all_gather"] == exchanges * one_way
  assert here.keys() == {reduction, "all_gather", "psum"}
  assert here["psum"] <= exchanges * (of_zero1["psum"] + 8)  # a second norm


@pytest.mark.parametrize("name", DELAYED)
def test_delayed_updates_scatter_where_nothing_else_is_asked_for(name, mesh):
  method = make(name, squares, optax.sgd(0.1), accumulate=4, **LOW)
  assert sent(method, mesh).keys() == {"reduce_scatter", "all_gather", "psum"}


def test_an_estimate_in_eight_bits_sends_a_quarter_of_its_float32(mesh):
  both = {}
  for dtype in (None, "bfloat16", "int8"):
    method = dj.acco(
      squares, optax.sgd(0.1), accumulate=4, estimate_dtype=dtype
    )
    both[dtype] = sent(method, mesh)["all_gather"]
  one_way = 4 * 512 * 7 / 8
  assert both[None] == 2 * one_way
  assert both["bfloat16"] == 1.5 * one_way
  scales = 4 * 4 * 7  # of four rows on each of the workers
  assert both["int8"] == 1.25 * one_way + scales


@pytest.mark.parametrize(
  ("name", "workers", "options"),
  [
    ("acco", 2, {"estimate_dtype": "int8"}),
    ("acco", 4, {}),
    ("dpu", 2, {"warmup": 1}),
    ("weight_prediction", 2, {"warmup": 1}),
  ],
)
def test_beside_an_axis_that_shards_the_model_the_numbers_are_the_same(
  name, workers, options
):
  mesh = spmd.make_mesh({"data": workers, "tensor": 8 // workers})
  place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
  over, last = P(None, "tensor"), P("tensor")
  specs = {"w": over, "b": last, "v": last, "gain": P()}
  method, ends = make(name, **options), []
  for run, params in (
    (dj.distribute(method, mesh), jax.tree.map(place, even_start(), specs)),
    (dj.simulate(method, workers=workers), even_start()),
  ):
    state, metrics = halves.steps(run, run.init(KEY, params), 3)
    ends.append((run.params(state), metrics, point(state)))
    assert run.step.compilations() == 1
    if run.mesh is not None:
      there = point(state)["w"].sharding
      assert there.is_equivalent_to(NamedSharding(mesh, over), 2)
  halves.near(*ends, 5e-6)


@by_name
@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"accumulate": 0}, "`accumulate`.*at least 1; got 0"),
    ({"clip_norm": 0.0}, r"`clip_norm`.*got 0\.0"),
    ({"wire_dtype": "int8"}, "`wire_dtype`.*got 'int8'"),
    ({"param_dtype": jnp.int32}, "`param_dtype`"),
    ({"warmup": -1}, "`warmup`.*from 0; got -1"),
    ({"warmup": 1.5}, r"`warmup`.*got 1\.5"),
    ({"warmup": True}, "`warmup`.*got True"),
    ({"warmup": None}, "`warmup`.*got None"),
    ({"slices": 2}, r"accumulate=2 allows 0 to 1; got 2\. Pass accumulate=4"),
    ({"slices": "1"}, "`slices` is a whole number.*got '1'"),
    ({"reduction": "ring"}, "reduce_scatter or all_to_all.*'ring'"),
  ],
)
def test_wrong_options_are_refused_by_name(name, options, says):
  with pytest.raises(ValueError, match=f"{name}: .*{says}"):
    make(name, **options)


@pytest.mark.parametrize("dtype", ["int4", jnp.int32])
def test_an_estimate_travels_in_a_floating_dtype_or_int8(dtype):
  with pytest.raises(ValueError, match="acco: `estimate_dtype`"):
    make("acco", estimate_dtype=dtype)


@by_name
def test_an_optimizer_over_norms_is_refused_by_init(name):
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  run = dj.simulate(make(name, tx=tx), workers=2)
  with pytest.raises(ValueError, match=rf"{name} shards.*clip_norm=\.\.\."):
    halves.begin(run)


@by_name
def test_a_mesh_without_the_axis_is_refused(name, mesh):
  with pytest.raises(ValueError, match=f"{name} works on the axis 'workers'"):
    dj.distribute(make(name, axis="workers"), mesh(2))


@pytest.mark.parametrize(
  ("name", "each"), [("acco", 6), ("dpu", 3), ("weight_prediction", 3)]
)
def test_rows_that_do_not_cut_into_all_micro_batches_are_refused(name, each):
  run = dj.simulate(make(name), workers=2)
  rows = jax.tree.map(np.float32, halves.batch(0, 2 * each))
  says = rf"batch\['x'\] has shape \({each}, 3\)"
  with pytest.raises(ValueError, match=says):
    run.step(halves.begin(run), rows, KEY)
