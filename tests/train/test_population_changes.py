"""Members who leave, join or are replaced, and where their states lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import distrain_jax as dj
from distrain_jax import runners, train
from distrain_jax.train import members, other_workers

KEY = jax.random.key(0)
ROWS = 250  # of a leaf: 16 KB, beside which all small ones are nothing


def loss_fn(params, batch, key):
  del key
  return jnp.mean((batch["x"] @ params["w"]) ** 2), {}


def run_of(members, mesh, leave=(), **axes):
  method = dj.papa(
    loss_fn, optax.adam(0.1), axis="data", tied=False, leave=leave
  )
  return runners.starting_apart(dj.distribute(method, mesh(members, **axes)))


def start(run):
  """Members whose values are all different, -0.0 among them."""
  size = (run.workers, ROWS, 16)
  w = np.random.default_rng(0).normal(size=size).astype(np.float32)
  w[:, 0, 0] = -0.0
  state = run.init(KEY, {"w": w})
  add = lambda x: x + jnp.asarray(2, x.dtype)
  return state._replace(opt_state=jax.tree.map(add, state.opt_state))


class Batches:
  def get_state(self):
    return {}

  def set_state(self, state):
    del state


def through_a_checkpoint(folder, old, new, state):
  """The new run's state, and the old one as it lay on the new run's mesh."""
  seen = []

  def adopt(state, *args):
    seen.append(state)
    return new.adopt(state, *args)

  like = jax.ShapeDtypeStruct((new.workers, ROWS, 16), jnp.float32)
  with train.Checkpoints(folder) as checkpoints:
    checkpoints.save(1, old, state, Batches(), None)
    checkpoints.wait()
    watched = new._replace(adopt=adopt)
    return checkpoints.restore(1, watched, KEY, {"w": like}), seen


@pytest.mark.parametrize("new, leave", [(3, (1,)), (2, (0, 3)), (6, ())])
def test_a_device_reads_about_as_many_members_as_it_will_have(
  new, leave, mesh, tmp_path
):
  old, new = run_of(4, mesh), run_of(new, mesh, leave)
  state = start(old)
  kept = jax.tree.map(np.asarray, state)
  got, (there,) = through_a_checkpoint(tmp_path, old, new, state)
  w = there.params["w"]
  held = {shard.data.shape[0] for shard in w.addressable_shards}
  assert held == {-(-4 // new.workers)}
  numbers = got.number.tolist()
  assert numbers == [n for n in range(9) if n not in leave][: new.workers]
  for x, y in zip(jax.tree.leaves(kept.params), jax.tree.leaves(got.params)):
    for n, own in zip(numbers, np.asarray(y)):
      if n < 4:  # -0.0 too
        np.testing.assert_array_equal(x[n].view(np.uint32), own.view(np.uint32))
      else:
        np.testing.assert_allclose(own, x.mean(0), rtol=1e-5, atol=1e-7)
    assert {s.data.shape[0] for s in y.addressable_shards} == {1}


def test_an_older_checkpoint_says_nothing_of_numbers_but_is_read(mesh):
  saved = {"workers": 4}
  assert other_workers.same_workers(run_of(4, mesh), saved)
  assert not other_workers.same_workers(run_of(4, mesh, (2,)), saved)
  assert not other_workers.same_workers(run_of(3, mesh), saved)


def test_what_divides_a_member_divides_its_old_state_too(mesh, tmp_path):
  old, new = run_of(4, mesh), run_of(2, mesh, (0, 1), tensor=2)
  columns = NamedSharding(new.mesh, P("data", None, "tensor"))
  abstract = new.abstract
  like = jax.ShapeDtypeStruct((2, ROWS, 16), jnp.float32, sharding=columns)
  new = new._replace(abstract=lambda key, _: abstract(key, {"w": like}))
  state = start(old)
  kept = np.asarray(state.opt_state[0].mu["w"])
  got, (there,) = through_a_checkpoint(tmp_path, old, new, state)
  shapes = {s.data.shape for s in there.params["w"].addressable_shards}
  assert shapes == {(2, ROWS, 8)}
  moment = got.opt_state[0].mu["w"]
  assert moment.sharding.is_equivalent_to(columns, 3)
  np.testing.assert_array_equal(moment, kept[2:])


@pytest.mark.parametrize("devices, old", [(3, 4), (8, 7), (4, 5)])
def test_taking_over_a_state_needs_few_leaves_beside_it(devices, old, mesh):
  run = run_of(devices, mesh, tuple(range(max(old - devices, 0))))
  layers, each = 8, ROWS * 16 * 4  # bytes of a leaf
  leaf = lambda n: jax.ShapeDtypeStruct((n, ROWS, 16), jnp.float32)
  params = {f"w{i}": leaf(devices) for i in range(layers)}
  mine = run.abstract(KEY, params)
  padded = -(-old // devices) * devices
  longer = lambda x: (padded, *x.shape[1:]) if x.ndim else ()
  there = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(longer(x), x.dtype, sharding=x.sharding),
    mine,
  )

  def adopt(state):
    # As `run.adopt` has it, of what is not an array yet.
    state = jax.tree.map(lambda x: x[:old] if x.ndim else x, state)
    return run.method.reshard(state, devices)

  where = jax.tree.map(lambda x: x.sharding, mine)
  program = jax.jit(adopt, out_shardings=where).lower(there).compile()
  memory = program.memory_analysis()
  own = 3 * layers * each  # params and two moments
  assert memory.output_size_in_bytes < 1.01 * own
  assert memory.argument_size_in_bytes < 1.01 * (padded // devices) * own
  # Whether each value is finite, as bool, and few leaves.
  bools = memory.argument_size_in_bytes / 4
  assert memory.temp_size_in_bytes < bools + 4 * each


@pytest.fixture(scope="module")
def config(small):
  return lambda **changes: small(
    **{
      "mesh": ConfigDict({"population": -1}),
      "method.name": "wash",
      "batch_size": 12,
      "evaluation.batch_size": 120,
      "model": ConfigDict({"name": "mlp", "widths": (8,)}),
      **changes,
    }
  )


def test_a_member_is_replaced_on_the_same_devices(config, tmp_path):
  devices = jax.devices()[:4]
  # Not shuffled: what stays a member's own can be told.
  still = {"method.rate": 0.0, "method.learning_rates": (1, 1, 1, 1, 0.5)}
  before = train.train(train.build(config(**still), devices), tmp_path).state
  before = jax.tree.map(np.asarray, before.inner)
  replaced = {"steps": 5, "method.leave": (2,), "checkpoint.every": 5, **still}
  x = train.build(config(**replaced), devices)
  with train.Checkpoints(tmp_path / "checkpoints") as saved:
    state = saved.restore(4, x.run, x.key, x.params(), x.batches()).inner
  assert state.number.tolist() == [0, 1, 3, 4]
  for old, new in zip(
    jax.tree.leaves(before.params), jax.tree.leaves(state.params)
  ):
    np.testing.assert_array_equal(new[:3], old[[0, 1, 3]])
    np.testing.assert_allclose(new[3], old.mean(0), rtol=1e-5, atol=1e-7)
  done = train.train(x, tmp_path).state.inner
  assert done.number.tolist() == [0, 1, 3, 4]
  # From then on nobody changes: a state of the same members is taken as it is.
  again = train.build(config(**replaced), devices)
  unused = lambda *_: pytest.fail("nobody left or joined")
  again = again._replace(run=again.run._replace(adopt=unused))
  train.train(again, tmp_path)
  forgotten = train.build(config(**{"steps": 6, **still}), devices)
  with pytest.raises(
    ValueError, match=r"of whom \(4,\) would be lost .*Name all who left"
  ):
    train.train(forgotten, tmp_path)


def test_an_evaluation_spoiled_by_a_member_names_it(config, tmp_path):
  """The step's own metrics are of the parameters before it."""
  rates = (1.0, 1.0, 3e38, 1.0)  # inf in the first update
  x = train.build(
    config(
      **{
        "method.name": "ensemble",
        "method.learning_rates": rates,
        "evaluation.every": 1,
        "checkpoint.every": 1,
        "optimizer.warmup_steps": 0,
        "optimizer.learning_rate": 10.0,
      }
    ),
    jax.devices()[:4],
  )
  with pytest.raises(
    train.BadStep,
    match=r"Step 1: {'validation_loss': nan} .*Member 2 is not finite; the 3 others"
    r" .*leave='\(2,\)' --config.batch_size=9\.",
  ):
    train.train(x, tmp_path)
  with train.Checkpoints(tmp_path / "checkpoints", reading=True) as saved:
    assert saved.steps == []


def test_who_is_not_finite_is_the_worst_and_never_the_best():
  for bad in range(3):
    losses = [float("nan") if n == bad else 1.0 + n for n in range(3)]
    each = {f"{n}_each_loss": x for n, x in enumerate(losses)}
    each |= {f"{n}_each_accuracy": 0.1 * n for n in range(3)}
    found = members._summary(each, 3)
    assert np.isnan(found["members_worst_loss"])
    assert found["members_best_loss"] == (2.0 if bad == 0 else 1.0)
    assert found["members_worst_accuracy"] == 0
    assert found["members_best_accuracy"] == pytest.approx(0.2)
