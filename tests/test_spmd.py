"""The traps that `spmd` knows: gradients, meshes, keys, rows, shardings."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import shardings, spmd

pytestmark = pytest.mark.core

N = 4
EACH, SAME = P("data"), P()


@pytest.fixture(params=["vmap", "mesh"])
def runner(request, mesh):
  if request.param == "vmap":
    return spmd.vmap_runner("data", N)
  return spmd.mesh_runner(mesh(N), "data")


def test_a_worker_sees_its_own_slice_without_the_worker_axis(runner):
  def fn(mine, shared):
    assert mine.shape == (3,)
    assert shared.shape == (2,)
    total = jax.lax.psum(mine.sum(), "data")
    return mine + jax.lax.axis_index("data"), total

  x = np.arange(N * 3.0, dtype=np.float32).reshape(N, 3)
  mapped = jax.jit(runner(fn, (EACH, SAME), (EACH, SAME)))
  own, total = mapped(x, np.zeros(2, np.float32))
  np.testing.assert_array_equal(own, x + np.arange(N)[:, None])
  assert total.shape == ()
  assert float(total) == x.sum()


def test_specs_are_prefixes_and_none_is_a_tree_without_leaves(runner):
  def fn(state):
    return {"own": {"a": state["own"]["a"] + 1, "b": None}, "none": None}

  specs = {"own": EACH, "none": EACH}
  state = {"own": {"a": np.zeros((N, 2)), "b": None}, "none": None}
  out = jax.jit(runner(fn, (specs,), specs))(state)
  np.testing.assert_array_equal(out["own"]["a"], np.ones((N, 2)))
  assert out["none"] is None


def test_the_gradient_of_a_replicated_parameter_is_local(runner):
  def fn(w, x):
    return jax.grad(lambda w: (w * x).sum())(w)

  x = np.arange(1.0, N + 1, dtype=np.float32)
  grads = jax.jit(runner(fn, (SAME, EACH), EACH))(np.float32(2), x)
  np.testing.assert_array_equal(grads, x)


def test_keys_are_folded_by_step_and_by_worker(runner):
  def fn(key, step):
    data = jax.random.key_data
    own = data(spmd.worker_key(key, step, "data"))
    return own, data(spmd.shared_key(key, step))

  key = jax.random.key(5)
  mapped = jax.jit(runner(fn, (SAME, SAME), (EACH, EACH)))
  own, shared = (np.asarray(x) for x in mapped(key, 7))
  at_7 = jax.random.fold_in(key, 7)
  for w in range(N):
    expected = jax.random.key_data(jax.random.fold_in(at_7, w))
    np.testing.assert_array_equal(own[w], expected)
    np.testing.assert_array_equal(shared[w], jax.random.key_data(at_7))


def test_a_mesh_has_auto_axes_in_the_order_given():
  mesh = spmd.make_mesh({"data": 2, "tensor": -1})
  assert dict(mesh.shape) == {"data": 2, "tensor": 4}
  assert mesh.axis_names == ("data", "tensor")
  assert set(mesh.axis_types) == {AxisType.Auto}
  few = spmd.make_mesh({"data": 3}, jax.devices()[5:])
  assert set(few.devices.flat) == set(jax.devices()[5:])


@pytest.mark.parametrize(
  ("axes", "count", "says"),
  [
    ({"data": 3}, 8, r"\{'data': 3\} needs 3 devices, but there are 8 \(cpu\)"),
    ({"data": 16}, 8, r"needs 16 devices, but there are 8.*use_cpu_devices"),
    ({"data": 2, "tensor": 2}, 8, "needs 4 devices"),
    ({"data": -1, "tensor": 3}, 8, "needs 3 devices or a multiple"),
    ({"data": -1, "tensor": -1}, 8, "-1"),
    ({"data": 0}, 8, "'data': 0"),
    ({"data": -2, "tensor": -4}, 8, "'data': -2"),
    ({}, 8, "a mesh of {}"),
    ({"data": 1}, 0, "needs 1 device"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, count, says):
  with pytest.raises(ValueError, match=says):
    spmd.make_mesh(axes, jax.devices()[:count])


def test_simulating_the_devices_that_run_already_is_no_error(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  spmd.use_cpu_devices(8)
  assert jax.local_device_count() == 8


def test_a_users_own_collective_timeout_is_kept(monkeypatch):
  mine = "--xla_cpu_collective_timeout_seconds=7"
  monkeypatch.setenv("XLA_FLAGS", mine)
  spmd.use_cpu_devices(8)
  flags = os.environ["XLA_FLAGS"].split()
  assert mine in flags
  names = [flag.split("=")[0] for flag in flags]
  assert len(set(names)) == len(names) == len(spmd.CPU_FLAGS)


def test_devices_cannot_be_simulated_once_jax_runs(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  with pytest.raises(RuntimeError, match=r"runs on 8 cpu device.*simulate 4"):
    spmd.use_cpu_devices(4)


def test_rows_are_split_in_order():
  batch = {"x": np.arange(24).reshape(12, 2), "y": np.arange(12)}
  split = spmd.split_rows(batch, N)
  assert split["x"].shape == (N, 3, 2)
  np.testing.assert_array_equal(split["y"], np.arange(12).reshape(N, 3))


@pytest.mark.parametrize("shape", [(10, 2), (3,), (), (0, 2)])
def test_rows_that_do_not_split_are_refused(shape):
  batch = {"x": np.zeros(8), "bad": np.zeros(shape)}
  with pytest.raises(ValueError, match=r"batch\['bad'\] has shape.*the 4 work"):
    spmd.split_rows(batch, N)


def test_a_twin_mesh_has_auto_axes_and_the_same_devices():
  explicit = jax.make_mesh(
    (2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2
  )
  twin = spmd.auto_mesh(explicit)
  assert set(twin.axis_types) == {AxisType.Auto}
  assert twin.axis_names == explicit.axis_names
  np.testing.assert_array_equal(twin.devices, explicit.devices)


def specs_of(mesh, shapes, specs, params):
  like = shardings.like_params(shapes, specs, params, mesh, "data")
  return jax.tree.map(lambda s: s.spec, like)


def struct(*shape, sharding=None):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_moments_lie_where_the_parameters_of_the_same_path_do():
  mesh = spmd.make_mesh({"data": 2, "tensor": 4})
  on = lambda *spec: NamedSharding(mesh, P(*spec))
  params = {
    "w": struct(4, 8, sharding=on("tensor")),
    "inner": {"w": struct(4, 8, sharding=on(None, "tensor"))},
    "plain": struct(4, 8),
  }
  shapes = {
    "mu": jax.tree.map(lambda x: struct(*x.shape), params),
    "own": {"w": struct(2, 4, 8)},  # with a worker axis
    "factored": {"w": struct(4)},  # not the parameter's shape
    "count": struct(),
  }
  specs = {"mu": SAME, "own": EACH, "factored": SAME, "count": SAME}
  assert specs_of(mesh, shapes, specs, params) == {
    "mu": {
      "w": P("tensor"),
      "inner": {"w": P(None, "tensor")},
      "plain": P(),
    },
    "own": {"w": P("data", "tensor")},
    "factored": {"w": P()},
    "count": P(),
  }


def test_a_model_of_one_array_gives_its_sharding_to_its_moments():
  mesh = spmd.make_mesh({"data": 2, "tensor": 4})
  param = struct(4, 8, sharding=NamedSharding(mesh, P("tensor")))
  shapes = {"mu": struct(4, 8), "count": struct()}
  specs = {"mu": SAME, "count": SAME}
  got = specs_of(mesh, shapes, specs, param)
  assert got == {"mu": P("tensor"), "count": P()}


def test_values_become_global_arrays_keys_included(mesh):
  tree = {"x": np.arange(8.0), "key": jax.random.key(3), "n": 2}
  out = spmd.to_global(tree, mesh(N), SAME)
  everywhere = NamedSharding(mesh(N), SAME)
  for x in jax.tree.leaves(out):
    assert x.sharding.is_equivalent_to(everywhere, x.ndim)
  np.testing.assert_array_equal(out["x"], tree["x"])
  assert int(out["n"]) == 2
  assert jax.random.uniform(out["key"]) == jax.random.uniform(tree["key"])
  split = spmd.to_global(np.arange(8.0), mesh(N), EACH)
  assert split.addressable_shards[0].data.shape == (2,)


def test_a_mesh_of_this_process_spans_no_others(mesh):
  assert not spmd.spans_processes(mesh(N))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_callers_mesh_is_left_and_comes_back(kind):
  empty = jax.sharding.get_abstract_mesh()
  mesh = Mesh(np.array(jax.devices()[:2]), ("other",), axis_types=(kind,))
  with jax.set_mesh(mesh):
    with spmd.no_current_mesh():
      assert jax.sharding.get_abstract_mesh().empty
    assert jax.sharding.get_abstract_mesh().axis_names == ("other",)
  assert jax.sharding.get_abstract_mesh() == empty
  with spmd.no_current_mesh():
    assert jax.sharding.get_abstract_mesh().empty


def test_without_a_coordinator_a_process_stays_alone(monkeypatch):
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
  spmd.join_processes()
  assert jax.process_count() == 1
