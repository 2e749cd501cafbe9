"""FSDP beyond the contract: scanned layers, memory, wires, other workers."""

import functools
import os
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import spmd
from distrain_jax.models import llama

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
LAYERS, WIDTH, ROWS = 3, 16, 16
SHAPES = {
  "layers": {"w": (LAYERS, WIDTH, 2 * WIDTH), "v": (LAYERS, 2 * WIDTH, WIDTH)},
  "bias": (LAYERS, WIDTH),
  "head": (WIDTH, 4),
  "odd": (5,),
  "gain": (),
}
OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.sgd(0.05, momentum=0.9),
  "adamw": optax.adamw(0.02),
}


def make_params():
  rng = np.random.default_rng(0)
  draw = lambda s: np.float32(rng.normal(size=s) / WIDTH**0.5)
  return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def loss_fn(params, batch, key):
  noise = 1 + 0.1 * jax.random.normal(key, (WIDTH,))

  def layer(h, one):
    w, b = one
    return h + jnp.tanh(h @ w["w"] + params["odd"][0]) @ w["v"] + b[None], None

  start = batch["x"] * noise[None]
  h, _ = jax.lax.scan(layer, start, (params["layers"], params["bias"]))
  error = params["gain"] * (h @ params["head"]) - batch["y"]
  return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def make_batch(i=0):
  x = np.random.default_rng(i).normal(size=(ROWS, WIDTH)).astype(np.float32)
  return {"x": x, "y": np.sin(x[:, :4])}


def steps(run, state, count=20):
  seen = []
  for i in range(count):
    state, metrics = run.step(state, make_batch(i), KEY)
    seen.append(metrics)
  return state, jax.tree.map(lambda *x: np.stack(x), *seen)


def train(run):
  state, seen = steps(run, run.init(KEY, make_params()))
  assert run.step.compilations() == 1
  return run.params(state), seen


near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)


assert_near = functools.partial(jax.tree.map, near)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ("name", "accumulate"), [("sgd", 1), ("momentum", 2), ("adamw", 1)]
)
def test_scanned_layers_train_as_with_ddp_on_both_runners(
  name, accumulate, mesh
):
  make = lambda f: f(
    loss_fn, OPTIMIZERS[name], accumulate=accumulate, clip_norm=0.5
  )
  expected = train(dj.distribute(make(dj.ddp), mesh(8)))
  norms = expected[1]["grad_norm"]
  assert norms.min() < 0.5 < norms.max()  # clipped in some steps
  assert_near(train(dj.distribute(make(dj.fsdp), mesh(8))), expected)
  assert_near(train(dj.simulate(make(dj.fsdp), workers=8)), expected)


@pytest.mark.parametrize(
  "options",
  [
    {"remat": "full", "tied": True},
    {"remat": "dots"},
    {"scan": False, "tied": True},
  ],
  ids=str,
)
def test_a_llama_trains_as_with_ddp(options, mesh):
  config = llama.LlamaConfig(
    vocab=32, embed=16, layers=2, heads=2, kv_heads=1, mlp=24, **options
  )
  model, tokens = llama.Llama(config), np.arange(64).reshape(8, 8) % 32
  params = nn.unbox(jax.jit(model.init)(KEY, tokens))["params"]

  def loss(params, batch, key):
    logits = model.apply({"params": params}, batch)
    labels = jnp.roll(batch, -1, axis=1)
    xent = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return xent.mean(), {}

  ends = []
  for factory in (dj.ddp, dj.fsdp):
    run = dj.distribute(factory(loss, optax.sgd(0.5), clip_norm=1.0), mesh(4))
    state = run.init(KEY, params)
    for _ in range(3):
      state, metrics = run.step(state, tokens, KEY)
    ends.append((run.params(state), metrics))
  assert_near(*ends)


def test_statistics_that_are_not_trained_travel_along(mesh):
  def fn(params, stats, batch, key):
    loss, aux = loss_fn(params, batch, key)
    return loss, (aux, {"mean": 0.9 * stats["mean"] + batch["x"].mean(0)})

  model = dj.Variables(make_params(), {"mean": np.zeros(WIDTH, np.float32)})
  ends = []
  for factory in (dj.ddp, dj.fsdp):
    method = factory(dj.stateful(fn), OPTIMIZERS["sgd"], accumulate=2)
    run = dj.distribute(method, mesh(4))
    state, _ = steps(run, run.init(KEY, model), 3)
    ends.append(run.params(state))
  assert_near(*ends)


def test_eight_workers_to_four_and_back_is_the_same_to_the_bit():
  method = dj.fsdp(loss_fn, OPTIMIZERS["adamw"], clip_norm=0.5)
  eight, four = (dj.simulate(method, workers=n) for n in (8, 4))
  state, _ = steps(eight, eight.init(KEY, make_params()), 3)
  saved = jax.tree.map(np.asarray, state)
  there = four.adopt(saved)
  like = four.abstract(KEY, make_params())
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(like)
  assert_equal(four.params(there), eight.params(saved))
  back = eight.adopt(there)
  assert_equal(back, saved)
  assert_equal(steps(eight, back, 2), steps(eight, state, 2))
  alone = dj.simulate(method, workers=1).adopt(saved)
  assert_equal(eight.adopt(alone), saved)


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"tensor": 2, "other": 2}])
def test_other_axes_of_the_mesh_stay_automatic(axes):
  mesh = spmd.make_mesh({"data": 8 // 2 ** len(axes), **axes})
  params = make_params()
  by = NamedSharding(mesh, P(None, None, "tensor"))
  params["layers"] = jax.device_put(params["layers"], by)
  method = functools.partial(dj.fsdp, loss_fn, OPTIMIZERS["momentum"])
  run = dj.distribute(method(clip_norm=0.5), mesh)
  state, _ = steps(run, run.init(KEY, params), 3)
  assert run.step.compilations() == 1
  # Pieces and moments lie over it as the parameter did, beside their own cut.
  over = NamedSharding(mesh, P("data", None, None, "tensor"))
  cut = [x for x in jax.tree.leaves(state) if x.ndim == 4]
  assert len(cut) == 4  # w and v, and their momentum
  assert all(x.sharding.is_equivalent_to(over, 4) for x in cut)
  same = dj.simulate(method(clip_norm=0.5), workers=mesh.shape["data"])
  expected, _ = steps(same, same.init(KEY, make_params()), 3)
  assert_near(run.params(state), same.params(expected))


def deep_loss(w, batch, key, dtype=jnp.float32):
  """w: (layers, width, width); what the compiler makes of it is read."""

  def layer(h, w):
    return jnp.tanh(h @ w.astype(dtype)), None

  h, _ = jax.lax.scan(layer, batch["x"].astype(dtype), w)
  return jnp.mean(h.astype(jnp.float32) ** 2), {}


def lowered(mesh, layers, width, factory=dj.fsdp, **options):
  """The step's program, and its state as shapes."""
  loss = functools.partial(deep_loss, **options)
  run = dj.distribute(factory(loss, optax.adam(1e-3)), mesh)
  place = lambda *shape, spec: jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(run.mesh, spec)
  )
  batch = {"x": place(ROWS, width, spec=P("data"))}
  key = jax.ShapeDtypeStruct((), KEY.dtype, sharding=NamedSharding(mesh, P()))
  state = run.abstract(KEY, place(layers, width, width, spec=P()))
  sent = dj.inspect.bytes_sent(run, state, batch, key)
  return run.step.lower(state, batch, key), state, sent


def v5e():
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x4"
  )
  return spmd.make_mesh({"data": 8}, topology.devices)


def by_computation(text):
  """{computation's name: lines} of an HLO module."""
  found = {}
  for line in text.splitlines():
    if line and not line[0].isspace():
      lines = found.setdefault(line.split(" (")[0], [])
    lines.append(line)
  return found


def test_each_parameter_byte_travels_three_times(mesh):
  *_, sent = lowered(mesh(8), 8, 64)
  whole = 4 * 8 * 64 * 64
  assert sent["all_gather"] == 2 * whole * 7 / 8  # forwards and backwards
  assert sent["reduce_scatter"] == whole * 7 / 8
  assert sent["psum"] < 16  # the loss and the norm


def test_layers_are_gathered_inside_the_loops(mesh):
  text = lowered(mesh(8), 8, 64)[0].compile().as_text()
  for name, lines in by_computation(text).items():
    for line in lines:
      op = re.search(r" = f32\[([\d,]*)\]\S* (all-gather|reduce-sc\w+)\(", line)
      if op:
        assert not name.startswith("ENTRY")
        assert np.prod(list(map(int, op[1].split(",")))) <= 64 * 64


def temporaries(mesh, layers, width, **options):
  """Bytes beside the arguments, in whole layers."""
  program, _, _ = lowered(mesh, layers, width, **options)
  stats = program.compile().memory_analysis()
  return stats.temp_size_in_bytes / (4 * width * width)


def test_temporaries_do_not_grow_by_whole_layers(mesh):
  few, many = (temporaries(mesh(8), n, 256) for n in (8, 16))
  # An eighth for each layer's gradient; XLA for CPUs copies pieces, up to
  # four times.
  assert many - few < 8 * (5 / 8 + 0.05)
  ddp = [temporaries(mesh(8), n, 256, factory=dj.ddp) for n in (8, 16)]
  assert ddp[1] - ddp[0] >= 8  # what that is compared with


def test_neither_do_they_on_a_tpu():
  few, many = (temporaries(v5e(), n, 4096) for n in (8, 16))
  assert few > 1  # what is in use, and not all of it in vector memory
  assert many - few < 8 * (1 / 8 + 0.05)


def test_what_is_cast_before_its_use_travels_narrow_and_adds_up_wide(mesh):
  program, *_ = lowered(mesh(8), 8, 64, dtype=jnp.bfloat16)
  wire = lambda op: set(
    re.findall(
      rf"stablehlo\.{op}.*?-> tensor<[\dx]*x(\w+)>", program.as_text(), re.S
    )
  )
  assert wire("all_gather") == {"bf16"}
  assert wire("reduce_scatter") == {"f32"}


def test_a_worker_holds_an_eighth_of_everything(mesh):
  program, state, _ = lowered(mesh(8), 8, 64)
  stats = program.compile().memory_analysis()
  whole, batch = 3 * 4 * 8 * 64 * 64, 4 * ROWS // 8 * 64
  held = stats.argument_size_in_bytes - batch
  assert whole / 8 <= held <= whole / 8 + 64
  assert dj.inspect.bytes_held(state) == stats.alias_size_in_bytes


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"accumulate": 0}, "fsdp: `accumulate`.*got 0"),
    ({"clip_norm": -1.0}, r"fsdp: `clip_norm`.*got -1\.0"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    dj.fsdp(loss_fn, optax.sgd(0.1), **options)


def test_an_optimizer_over_norms_is_refused_by_init():
  run = dj.simulate(dj.fsdp(loss_fn, optax.lamb(1e-3)), workers=2)
  with pytest.raises(ValueError, match=r"fsdp shards.*clip_norm=\.\.\."):
    run.init(KEY, make_params())
