"""ZeRO-1 by whole leaves: DDP's numbers with any leafwise optimizer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import leaf_layout, leaf_shards, learned, spmd
from distrain_jax.inspect import topologies
from distrain_jax.leafwise import check_leafwise

pytestmark = pytest.mark.core

KEY = jax.random.key(0)
LAYERS = 3
STACKED = {"b": 1, "gain": 0, "v": 0, "w": 1}
NAMES = {
  "b": ("layers", "hidden"),
  "gain": (),
  "v": ("hidden",),
  "w": ("layers", "hidden_0", "hidden_1"),
}


def make_params():
  draw = lambda i, *s: jax.random.normal(jax.random.fold_in(KEY, i), s) / 2
  return {
    "b": draw(0, LAYERS, 4),
    "gain": jnp.ones(()),
    "v": draw(1, 4),
    "w": draw(2, LAYERS, 4, 4),
  }


def loss_fn(params, batch, key):
  del key
  x = batch["x"].astype(params["v"].dtype)
  for w, b in zip(params["w"], params["b"]):
    x = jnp.tanh(x @ w + b[None])
  error = params["gain"] * (x @ params["v"]) - batch["y"]
  return jnp.mean(error**2), {}


def make_batch(rows=24):
  x = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
  return {"x": x, "y": np.sin(x.sum(1))}


def mulo():
  mup = learned.mup_info(make_params(), names=NAMES)
  return learned.mulo(mup=mup)


def muon():
  dims = optax.contrib.MuonDimensionNumbers
  numbers = {"b": None, "gain": None, "v": None, "w": dims(1, 2)}
  return optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)


DECAYS = {"b": False, "gain": False, "v": False, "w": True}
TXS = {
  "adamw": lambda: optax.adamw(0.05, weight_decay=0.1, mask=DECAYS),
  "mulo": mulo,
  "muon": muon,
}
tx_of = functools.cache(lambda name: TXS[name]())


def leaves(tx, **options):
  return dj.zero1(loss_fn, tx, shard="leaves", stacked=STACKED, **options)


def trained(run, steps=3, state=None):
  state = run.init(KEY, make_params()) if state is None else state
  for _ in range(steps):
    state, metrics = run.step(state, make_batch(), KEY)
  return state, metrics


def near(a, b, tolerance=2e-6):
  def one(x, y):
    x, y = (np.asarray(v, np.float32) for v in (x, y))
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)

  jax.tree.map(one, a, b)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.cache
def by_ddp(name, clip_norm=None):
  run = dj.simulate(
    dj.ddp(loss_fn, tx_of(name), clip_norm=clip_norm), workers=1
  )
  state, metrics = trained(run)
  return run.params(state), metrics


@pytest.mark.parametrize(
  ("name", "workers", "on_mesh"),
  [
    ("adamw", 2, False),
    ("adamw", 8, True),  # as many as there are leaves and layers
    ("mulo", 4, True),
    pytest.param("muon", 3, True, marks=pytest.mark.full),
  ],
)
def test_it_is_data_parallel_training(name, workers, on_mesh, mesh):
  method = leaves(tx_of(name), clip_norm=0.3)
  if on_mesh:
    run = dj.distribute(method, mesh(workers))
  else:
    run = dj.simulate(method, workers=workers)
  state, metrics = trained(run)
  assert run.step.compilations() == 1
  tolerance = 1e-4 if name == "muon" else 1e-5  # orthogonalised in bfloat16
  near((run.params(state), metrics), by_ddp(name, 0.3), tolerance)
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()), run.params(state), make_params()
  )
  assert min(jax.tree.leaves(moved)) > 0


def test_parameters_that_are_sharded_over_another_axis_train_alike(mesh):
  """Branches of the switch have no messages of that axis, or all would wait."""
  both = mesh(2, tensor=2)
  place = lambda *axes: jax.NamedSharding(both, P(*axes))
  rules = {"b": place(None, "tensor"), "v": place("tensor")}
  rules |= {"gain": place(), "w": place(None, None, "tensor")}
  params = jax.device_put(make_params(), rules)
  run = dj.distribute(leaves(tx_of("adamw"), clip_norm=0.3), both)
  text = run.step.lower(run.abstract(KEY, params), make_batch(), KEY).as_text()
  assert text.count("stablehlo.reduce_scatter") == 1
  assert text.count("stablehlo.all_gather") == 1
  state, metrics = trained(run, state=run.init(KEY, params))
  got = run.params(state)
  near((got, metrics), by_ddp("adamw", 0.3), 1e-5)
  assert got["w"].sharding.is_equivalent_to(rules["w"], 3)


@pytest.mark.full
def test_for_a_tpu_it_is_one_scatter_and_one_gather():
  devices = np.array(topologies.topology("v5e:2x4").devices)
  sizes = {"b": (16, 512), "gain": (), "v": (512,), "w": (16, 512, 512)}
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}
  run = dj.distribute(
    leaves(tx_of("adamw")), spmd.make_mesh({"data": 8}, devices)
  )
  x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
  batch = {"x": x, "y": jax.ShapeDtypeStruct((64,), jnp.float32)}
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = run.step.lower(run.abstract(key, params), batch, key)
  kinds = re.findall(
    r" (all-reduce|reduce-scatter|all-gather)(?:-start)?\(",
    step.compile().as_text(),
  )
  assert sorted(set(kinds)) == ["all-gather", "all-reduce", "reduce-scatter"]
  assert kinds.count("reduce-scatter") == kinds.count("all-gather") == 1


def test_every_leaf_and_layer_has_one_worker_and_shares_are_even():
  layout = leaf_layout.make_leaf_layout(make_params(), 4, (1, 0, 0, 1))
  held = {}
  for w, own in enumerate(layout.parts):
    for part in own:
      for layer in part.layers or (None,):
        held.setdefault((part.leaf, layer), []).append(w)
  assert all(len(owners) == 1 for owners in held.values())
  wanted = {(i, layer) for i in (0, 3) for layer in range(LAYERS)}
  assert held.keys() == wanted | {(1, None), (2, None)}
  # 65 elements in all, of which a layer of w has 16.
  assert layout.columns == {"float32": 17}
  whole = leaf_layout.make_leaf_layout(make_params(), 4, (0, 0, 0, 0))
  assert whole.columns == {"float32": 48}


@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_cut_and_joined_again_a_tree_is_the_same_to_the_bit(workers):
  tree = make_params()
  tree["w"] = tree["w"].astype(jnp.bfloat16)
  layout = leaf_layout.make_leaf_layout(tree, workers, (1, 0, 0, 1))
  equal(layout.whole(layout.all_pieces(tree)), tree)
  mine = layout.pieces(tree, jnp.asarray(workers - 1))
  last = jax.tree.map(lambda x: x[-1], layout.all_pieces(tree))
  equal(mine, last)


def test_large_buffers_are_whole_tiles():
  tree = {"a": jnp.arange(9000.0), "b": jnp.arange(100.0)}
  layout = leaf_layout.make_leaf_layout(tree, 2, (0, 0))
  assert layout.columns == {"float32": 16384}
  every = layout.all_pieces(tree)
  assert every["float32"].shape == (2, 16, 1024)
  equal(layout.whole(every), tree)


def test_a_worker_holds_the_state_of_its_leaves_only():
  """As many bytes as the docstring of `Zero1State` says."""
  sizes = {"b": (LAYERS, 64), "gain": (), "v": (64,), "w": (LAYERS, 64, 64)}
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}
  run = dj.simulate(leaves(tx_of("adamw")), workers=4)
  state = run.abstract(KEY, params).opt_state
  floats = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
  share = leaf_layout.make_leaf_layout(params, 4, (1, 0, 0, 1)).columns
  assert share == {"float32": 64 * 64}  # a layer of w; a worker has the rest
  each = sum(x.size for x in floats) / 4
  assert 2 * 64 * 64 <= each < 2 * 64 * 64 + 1024  # padded to a tile
  counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
  assert {x.shape for x in counts} == {(4,)}


def test_masters_are_float32_and_parameters_their_roundings():
  method = leaves(tx_of("adamw"), param_dtype="bfloat16")
  run = dj.simulate(method, workers=4)
  state, _ = trained(run, steps=1)
  masters = jax.tree.leaves(state.masters)
  assert {x.dtype for x in masters} == {jnp.dtype("float32")}
  layout = leaf_layout.make_leaf_layout(state.params, 4, (1, 0, 0, 1))
  every = jax.tree.map(np.asarray, state.masters)
  flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(every)])
  assert not (flat.astype(jnp.bfloat16) == flat).all()
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), every)
  equal(layout.whole(rounded), state.params)


@pytest.mark.parametrize("options", [{}, {"param_dtype": "bfloat16"}])
def test_four_workers_to_three_and_back_is_the_same_to_the_bit(options):
  method = leaves(tx_of("adamw"), **options)
  four, three = (dj.simulate(method, workers=n) for n in (4, 3))
  saved = jax.tree.map(np.asarray, trained(four, steps=2)[0])
  there = three.adopt(saved)
  like = three.abstract(KEY, make_params())
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(there) == kinds(like)
  moved = jax.tree.map(np.asarray, there)
  back = jax.tree.map(np.asarray, four.adopt(there))
  equal(back, saved)
  if options:
    return
  # Training goes on as if nothing had happened, on either number.
  got = three.params(trained(three, steps=1, state=moved)[0])
  near(got, by_ddp("adamw")[0], 1e-5)


@pytest.mark.parametrize("name", ["mulo", "muon"])
def test_any_state_moves_with_its_leaves_and_layers(name):
  tx, params = tx_of(name), make_params()
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.integers(0, 99, x.shape), x.dtype)
  one, three, four = (
    leaf_shards.make_leaf_shards(tx, params, n, STACKED) for n in (1, 3, 4)
  )
  whole = jax.tree.map(fill, jax.eval_shape(tx.init, params))
  by_path = {
    jax.tree_util.keystr(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(whole)
  }
  packed = one.packing.pack(jax.tree.leaves(whole), 0)
  alone = jax.tree.map(lambda x: x[None], packed)
  there = one.restack(alone, three)
  for w, own in enumerate(three.layout.parts):
    state = three.treedefs[w].unflatten(
      three.packing.unpack(jax.tree.map(lambda x, w=w: x[w], there), w)
    )
    for path, x in jax.tree.leaves_with_path(state):
      where = jax.tree_util.keystr(path)
      moved = [p for p in own if f"['{list(params)[p.leaf]}']" in where]
      of_whole = by_path[where]
      if not moved or moved[0].layers is None:
        np.testing.assert_array_equal(x, of_whole)
        continue
      sizes = enumerate(zip(of_whole.shape, x.shape))
      axis = next((i for i, (n, m) in sizes if n != m), 0)
      if of_whole.shape == x.shape:
        continue
      np.testing.assert_array_equal(x, np.take(of_whole, moved[0].layers, axis))
  equal(four.restack(three.restack(there, four), one), alone)


def grouped(first, second):
  labels = {"b": "one", "gain": "two", "v": "one", "w": "two"}
  return optax.multi_transform({"one": first, "two": second}, labels)


@pytest.mark.parametrize(
  "make",
  [
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    lambda: grouped(optax.sgd(0.1), optax.clip_by_global_norm(1.0)),
    lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    lambda: optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.5, 0)),
    lambda: optax.chain(
      optax.sgd(0.1), optax.add_noise(0.1, 0.5, jax.random.key(0))
    ),
    lambda: optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    lambda: optax.contrib.prodigy(0.1),
  ],
  ids=[
    "norm",
    "norm of a group",
    "finite",
    "noise",
    "noise by a typed key",
    "micro-batches",
    "prodigy",
  ],
)
def test_what_needs_all_leaves_is_refused_by_init(make):
  run = dj.simulate(leaves(make()), workers=2)
  says = r"zero1 with shard='leaves'.*clip_norm.*accumulate=.*MultiSteps"
  with pytest.raises(ValueError, match=says):
    run.abstract(KEY, make_params())


@pytest.mark.parametrize(
  "make",
  [
    lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    lambda: optax.lamb(0.1),
    lambda: optax.contrib.muon(0.1),
    lambda: optax.chain(optax.clip(1.0), optax.adaptive_grad_clip(0.1)),
    lambda: grouped(optax.adam(0.1), optax.lion(0.1)),
    lambda: optax.masked(optax.lars(0.1), DECAYS),
    lambda: optax.inject_hyperparams(optax.adamw)(
      lambda step: 0.1 / (1 + step)
    ),
  ],
  ids=["adafactor", "lamb", "muon", "clip", "groups", "masked", "injected"],
)
def test_what_needs_one_leaf_is_not(make):
  check_leafwise("zero1", make(), make_params(), (False,) * 4)


def test_layers_that_an_optimizer_mixes_are_refused():
  tx = optax.lamb(0.1)  # by the norm of all layers
  run = dj.simulate(leaves(tx), workers=2)
  with pytest.raises(ValueError, match=r"params\['.'\] together.*stacked=0"):
    run.abstract(KEY, make_params())
  whole = dj.zero1(loss_fn, tx, shard="leaves")
  dj.simulate(whole, workers=2).abstract(KEY, make_params())


BLOCK = optax.clip_by_block_rms
FACTORED = {"multiply_by_parameter_scale": False, "clipping_threshold": None}


@pytest.mark.parametrize(
  ("make", "shape"),
  [
    (lambda: optax.chain(BLOCK(10.0), optax.sgd(0.1)), (3, 4, 4)),
    (lambda: optax.chain(BLOCK(1e6), optax.sgd(0.1)), (3, 4, 4)),
    (
      lambda: optax.chain(
        optax.scale_by_adam(b2=0.99), BLOCK(1.0), optax.scale(-0.1)
      ),
      (3, 4, 4),
    ),
    (lambda: optax.adafactor(0.1, **FACTORED), (128, 256)),
    (lambda: optax.adafactor(0.1, **FACTORED), (300, 128, 256)),
    (
      lambda: optax.chain(optax.clip_by_global_norm(100.0), optax.sgd(0.1)),
      (3, 4, 4),
    ),
    (lambda: optax.apply_if_finite(optax.sgd(0.1), 3), (3, 4, 4)),
  ],
  ids=[
    "large gradients",
    "huge gradients",
    "after spikes",
    "factored",
    "factored otherwise",
    "norm of a lone leaf",
    "finite",
  ],
)
@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)]
)
def test_layers_that_are_mixed_at_some_sizes_only_are_refused(
  make, shape, dtype
):
  params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
  check_leafwise("zero1", make(), params, (False,))
  with pytest.raises(ValueError, match=r"\['w'\] together.*stacked=0"):
    check_leafwise("zero1", make(), params, (True,))


@pytest.mark.parametrize(
  "make",
  [
    TXS["adamw"],
    lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    lambda: optax.chain(optax.clip(1.0), optax.lion(0.1)),
    lambda: optax.adafactor(0.1, **FACTORED),  # too small to be factored
    muon,
    lambda: learned.mulo(mup=0.5, stacked=STACKED),
    lambda: learned.mulo(mup=0.5, stacked=STACKED, nan_to_num=False),
  ],
)
@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("float16", marks=pytest.mark.full)]
)
def test_layers_that_are_not_mixed_are_let_pass(make, dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), make_params())
  check_leafwise("zero1", make(), params, tuple(map(bool, STACKED.values())))


@pytest.mark.parametrize(
  "make",
  [
    lambda mup: learned.mulo(mup=mup),
    lambda mup: learned.mup_adamw(0.05, mup),
  ],
  ids=["mulo", "mup_adamw"],
)
def test_mup_may_be_a_function_of_the_parameters(make):
  """It is called on trees with holes for others' leaves."""
  late = lambda params: learned.mup_info(
    params, names=NAMES, overrides={"v": "output"}
  )
  texts = []
  for mup in (late, late(make_params())):
    run = dj.simulate(leaves(make(mup)), workers=2)
    state = run.abstract(KEY, make_params())
    texts.append(run.step.lower(state, make_batch(), KEY).as_text())
  assert texts[0] == texts[1]


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"shard": "rows"}, "`shard` is one of elements, leaves; got 'rows'"),
    ({"stacked": 1}, "`stacked`.*Leave it out with shard='elements'"),
  ],
)
def test_wrong_options_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    dj.zero1(loss_fn, tx_of("adamw"), **options)


@pytest.mark.parametrize(
  ("stacked", "says"),
  [
    ({"w": 1}, "tree of numbers like the parameters"),
    (2, r"got 2 for one of shape \(\)"),
    ({**STACKED, "v": True}, "got True"),
  ],
)
def test_stacked_axes_that_do_not_fit_are_refused(stacked, says):
  with pytest.raises(ValueError, match=says):
    leaf_shards.cut_leaves("zero1", make_params(), stacked)
