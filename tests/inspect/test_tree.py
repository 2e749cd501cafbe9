"""The table of a tree, against sizes by hand and JAX's own."""

import json

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import inspect
from distrain_jax.inspect.tree import tree

pytestmark = pytest.mark.core
IMAGE = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32)


def by_path(params, **options):
  return {row.path: row for row in tree(params, **options).rows}


def test_every_kind_of_leaf_has_its_shape_dtype_and_bytes():
  params = {
    "array": jnp.ones((3, 5), jnp.bfloat16),
    "struct": jax.ShapeDtypeStruct((7,), jnp.int8),
    "numpy": np.zeros((2, 2)),
    "scalar": np.float32(1),
    "number": 1.5,
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0, impl="rbg"), 3),
    "none": None,
  }
  rows = by_path(params)
  assert {
    k: (r.shape, r.dtype, r.elements, r.bytes) for k, r in rows.items()
  } == {
    "array": ((3, 5), "bfloat16", 15, 30),
    "struct": ((7,), "int8", 7, 7),
    "numpy": ((2, 2), "float64", 4, 32),
    "scalar": ((), "float32", 1, 4),
    "number": ((), "float32", 1, 4),
    "key": ((), "key<fry>", 1, 8),
    "keys": ((3,), "key<rbg>", 3, 48),
  }
  total = tree(params).total
  assert (total.arrays, total.elements, total.bytes) == (7, 32, 133)
  assert total.device_bytes == 30 + 8 + 48  # what lies on a device


def test_a_device_holds_its_shards_and_whole_replicas(mesh):
  mesh = mesh(4, tensor=2)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  params = {
    "both": place(jnp.ones((8, 6)), "data", "tensor"),
    "one": place(jnp.ones((8, 6)), None, "tensor"),
    "same": place(jnp.ones(5)),
    "alone": jax.device_put(jnp.ones(3), mesh.devices.flat[1]),
    "host": np.ones(7, np.float32),
  }
  shown = {k: (r.sharding, r.device_bytes) for k, r in by_path(params).items()}
  assert shown == {
    "both": ("P('data', 'tensor')", 2 * 3 * 4),
    "one": ("P(None, 'tensor')", 8 * 3 * 4),
    "same": ("replicated", 20),
    "alone": ("cpu:1", 12),
    "host": (None, None),
  }
  assert tree(params).total.device_bytes == 24 + 96 + 20 + 12  # device 1
  assert tree(params).total.bytes == 2 * 8 * 6 * 4 + 20 + 12 + 28


def test_devices_that_are_not_there_hold_their_shards():
  mesh = AbstractMesh((256,), ("data",), axis_types=(AxisType.Auto,))
  place = NamedSharding(mesh, P("data"))
  params = [
    jax.ShapeDtypeStruct((512, k), jnp.float32, sharding=place) for k in (1, 3)
  ]
  assert tree(params).total.device_bytes == 2 * 4 * (1 + 3)


@pytest.mark.parametrize("factory", [dj.ddp, dj.zero1])
def test_a_state_holds_what_bytes_held_says(factory, mesh):
  model = dj.models.create("mlp")
  batch = {"image": IMAGE, "label": jax.ShapeDtypeStruct((8,), jnp.int32)}
  task = dj.models.task(model, "classification", batch)
  run = dj.distribute(factory(task.loss_fn, optax.adam(1e-3)), mesh(4))
  params = dj.models.abstract(model, IMAGE).params
  state = run.abstract(jax.random.key(0), params)
  table = tree(state)
  assert table.total.device_bytes == inspect.bytes_held(state)
  names = dj.models.logical_names(model, IMAGE)
  rows = by_path(
    state, names=type(state)(None, names, *[None] * (len(state) - 2))
  )
  assert rows["params/dense_0/kernel"].names == ("inputs", "hidden_0")
  assert rows["step"].names is None


def test_boxes_and_a_tree_of_names_say_the_same():
  model, collections = dj.models.create("resnet18"), ("params", "batch_stats")
  boxed = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros(IMAGE.shape))
  )
  names = {
    c: dj.models.logical_names(model, IMAGE, collection=c) for c in collections
  }
  shown = tree(boxed)
  assert {row.path.split("/")[0] for row in shown.rows} == set(collections)
  assert all(len(row.names) == len(row.shape) for row in shown.rows)
  assert tree(nn.meta.unbox(boxed), names=names) == shown


def test_names_given_go_before_those_of_boxes_and_none_is_a_whole_subtree():
  box = nn.LogicallyPartitioned(np.ones((3, 5), np.float32), ("embed", "mlp"))
  rows = by_path(
    {"a": {"w": box}, "b": {"w": box}, "c": np.ones(2)},
    names={"a": {"w": ("x", None)}, "b": None, "c": ("y",)},
  )
  assert [rows[k].names for k in ("a/w", "b/w", "c")] == [
    ("x", None),
    None,
    ("y",),
  ]


def test_a_box_is_opened_under_a_mesh_without_a_constraint(mesh):
  box = nn.Partitioned(
    jax.ShapeDtypeStruct((3, 5), jnp.float32), ("data", None)
  )
  with jax.set_mesh(mesh(8)):
    (row,) = tree({"w": box}).rows
  assert row == ("w", (3, 5), "float32", ("data", None), None, 15, 60, None)


def test_nnx_states_and_models():
  start = nnx.initializers.ones
  model = nnx.Linear(4, 6, kernel_init=start, rngs=nnx.Rngs(0))
  value = model.kernel.get_value()
  model.kernel = nnx.Param(
    value, out_sharding=("embed", "mlp"), eager_sharding=False
  )
  for params in (model, nnx.state(model), nnx.state(model, nnx.Param)):
    rows = by_path(params)
    assert set(rows) == {"kernel", "bias"}
    assert rows["kernel"].names == ("embed", "mlp")
    assert rows["bias"].names is None
    assert rows["kernel"].bytes == 96
  rows = by_path(nnx.state(model), names={"kernel": ("a", "b"), "bias": ("b",)})
  assert rows["kernel"].names == ("a", "b")


def test_of_an_equinox_module_only_the_arrays_are_shown():
  model = eqx.nn.MLP(2, 3, 4, depth=1, key=jax.random.key(0))
  rows = by_path(model)
  assert {k: r.shape for k, r in rows.items()} == {
    "layers/0/weight": (4, 2),
    "layers/0/bias": (4,),
    "layers/1/weight": (3, 4),
    "layers/1/bias": (3,),
  }


PARAMS = {"a": {"w": np.ones((2, 3)), "b": np.ones(3)}, "c": (np.ones(()), ())}
NAMES = {"a": {"w": ("x", "y"), "b": ("y",)}, "c": ((), ())}


def test_a_scalar_has_no_axes_and_an_empty_tuple_is_no_array():
  rows = by_path(PARAMS, names=NAMES)
  assert rows["c/0"].names == () and len(rows) == 3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"a": {"w": ("x", "y")}}, r"nothing at a/b, .*shape \(3,\)"),
    ({"a": {**NAMES["a"], "v": ("z",)}}, r"\('z',\) at a/v, .*no array"),
    ({"a": {**NAMES["a"], "b": ("y", "z")}}, r"at a/b: 2 axes, .*shape \(3,\)"),
    ({"a": {**NAMES["a"], "b": "y"}}, "'y' at a/b; expected a tuple"),
    ({"c": [("x",), ()]}, r"\('x',\) at c/0: 1 axes, .*shape \(\)"),
  ],
)
def test_names_that_do_not_match_are_refused_with_the_path(change, message):
  with pytest.raises(ValueError, match=message):
    tree(PARAMS, names={**NAMES, **change})


def test_text_html_and_json_show_every_row():
  table = tree({"<w>": jnp.ones((1000, 4)), "b": jnp.ones(4)})
  lines = str(table).split("\n")
  assert repr(table) == str(table) and "axes" not in lines[0]
  words = lambda line: " ".join(line.split())
  size = "15.62 KiB 15.62 KiB"
  assert words(lines[2]) == f"<w> (1000, 4) float32 cpu:0 4,000 {size}"
  assert words(lines[-1]) == "total 4,004 15.64 KiB 15.64 KiB"
  assert "&lt;w&gt;" in table._repr_html_() and "<w>" not in table._repr_html_()
  read = json.loads(json.dumps(table.to_json()))
  assert read["rows"][0]["shape"] == [1000, 4]
  assert read["total"]["bytes"] == 16016


def test_a_tree_without_arrays_is_an_empty_table():
  table = tree({"a": None, "f": jnp.sin})
  assert table.total == (0, 0, 0, None)
  assert str(table).split("\n")[-1].split() == ["total", "0", "0", "B"]
