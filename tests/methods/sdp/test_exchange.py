"""Messages between holders, against loops over workers and cells."""

import collections
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.methods.sdp import assignments, exchange

pytestmark = pytest.mark.core

N, C = 4, 3  # workers, elements of a fragment
EACH = P("data")


def shuffled(seed):
  return assignments.Places(np.random.default_rng(seed))


HOLDINGS = {
  "ring": assignments.neurons(1, 8, N, 0.5),
  "alone": assignments.neurons(1, 8, N, 0.25),
  "all": assignments.neurons(1, 8, N, 1.0),
  "layered": assignments.neurons(3, 8, N, 0.75, shuffled(0)),
  "uneven": assignments.neurons(1, 6, N, 0.5),  # cells of two fragments
  "blocks": assignments.blocks(8, N, 0.5, shuffled(1)),
  "both": assignments.both(4, 8, N, (0.5, 0.5)),
}


def with_empty_places():
  """Worker 0 holds nothing of the last cell, worker 1 all of them."""
  groups = np.array([[0, 1, 4, 4], [0, 1, 2, 3], [2, 3, 4, 4], [1, 2, 4, 4]])
  return assignments.Holding(
    size=(1, 4),
    lanes=np.zeros((N, 1), int),
    groups=groups[:, None],
    owners=np.array([[0], [3], [2], [1]]),
  )


HOLDINGS["empty"] = assignments.check("x", with_empty_places())


@pytest.fixture(params=["simulate", "distribute"])
def runner(request, mesh):
  if request.param == "simulate":
    return spmd.vmap_runner("data", N)
  return spmd.mesh_runner(mesh(N), "data")


class Table:
  """Cells and fragments of each worker, from the holding's own fields."""

  def __init__(self, holding, whole=False):
    owners = holding.owners[:, :1] if whole else holding.owners
    layers, groups = holding.size
    pieces = owners.shape[1]
    self.at = []  # of each worker: its places' fragments, None where empty
    for lanes, cut in zip(holding.lanes, holding.groups):
      row = []
      for lane, inside in zip(lanes, cut):
        for group in inside:
          empty = lane == layers or group == groups
          cell = None if empty else lane * groups + group
          row += [None if empty else cell * pieces + f for f in range(pieces)]
      self.at.append(row)
    self.owner = owners.ravel().tolist()
    self.holders = {
      f: [w for w in range(N) if f in self.at[w]]
      for f in range(len(self.owner))
    }

  def owned(self, w):
    return [f for f, owner in enumerate(self.owner) if owner == w]


def values(table, dtype=np.float32):
  x = np.random.default_rng(0).normal(size=(N, len(table.at[0]), C))
  for w, row in enumerate(table.at):
    for place, fragment in enumerate(row):
      if fragment is None:
        x[w, place] = 0
  return x.astype(dtype)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", HOLDINGS)
def test_means_reach_the_owners_and_values_all_holders(name, whole, runner):
  holding = HOLDINGS[name]
  plan, table = exchange.make_plan(holding, whole), Table(holding, whole)
  x = values(table)

  def there_and_back(x):
    me = jax.lax.axis_index("data")
    means = exchange.to_owners(plan, x, me, "data")
    back = exchange.to_holders(plan, means, me, "data")
    return means, back, exchange.to_all(plan, means, me, "data")

  run = jax.jit(runner(there_and_back, (EACH,), (EACH, EACH, EACH)))
  means, back, every = map(np.asarray, run(x))
  found = {}
  for w in range(N):
    owned = table.owned(w)
    assert not means[w, len(owned) :].any()
    for fragment, got in zip(owned, means[w]):
      holders = table.holders[fragment]
      rows = [x[h, table.at[h].index(fragment)] for h in holders]
      np.testing.assert_allclose(
        got, np.mean(rows, axis=0), rtol=1e-6, atol=1e-7
      )
      found[fragment] = got
  for w in range(N):  # moved: to the bit
    for fragment, got in zip(table.at[w], back[w]):
      expected = np.zeros(C) if fragment is None else found[fragment]
      np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
      every[w], [found[f] for f in range(len(table.owner))]
    )


def test_sums_travel_in_the_wire_s_dtype_and_add_up_in_float32():
  plan, table = exchange.make_plan(HOLDINGS["ring"]), Table(HOLDINGS["ring"])
  send = functools.partial(exchange.to_owners, plan, axis="data")
  low = functools.partial(send, wire_dtype="bfloat16")
  x, everyone = values(table), np.arange(N)
  mapped = functools.partial(jax.vmap(low, axis_name="data"), role=everyone)
  means = np.asarray(mapped(x))
  assert means.dtype == np.float32
  rounded = np.asarray(x.astype(jnp.bfloat16), np.float32)
  exact = jax.vmap(send, axis_name="data")
  np.testing.assert_array_equal(means, exact(rounded, role=everyone))


def messages(fn, x, mesh):
  """(elements, dtype, distance) of each message; only shifts are allowed."""
  mapped = spmd.mesh_runner(mesh(N), "data")(fn, (EACH,), EACH)
  found = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      name = eqn.primitive.name
      assert not name.startswith(("psum", "all_", "reduce_scatter")), name
      if name == "ppermute":
        ((shift,),) = [
          {(b - a) % N for a, b in eqn.params["perm"]},
        ]
        operand = eqn.invars[0].aval
        found.append((operand.size, str(operand.dtype), shift))
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        walk(inner)

  walk(jax.make_jaxpr(mapped)(x).jaxpr)
  return found


@pytest.mark.parametrize("holders", [1, 2, 3, 4])
def test_there_are_holders_less_one_shifts_each_way(holders, mesh):
  holding = assignments.neurons(2, 16, N, holders / N)
  plan = exchange.make_plan(holding)
  x = values(Table(holding))
  me = lambda: jax.lax.axis_index("data")
  there = lambda x: exchange.to_owners(plan, x, me(), "data", "bfloat16")
  back = lambda x: exchange.to_holders(plan, x, me(), "data")
  owned = np.zeros((N, 2, C), np.float32)  # 1/N of two layers' cells
  for fn, given, dtype in ((there, x, "bfloat16"), (back, owned, "float32")):
    sent = messages(fn, given, mesh)
    assert len({shift for *_, shift in sent}) == len(sent) == holders - 1
    # 1/N of all elements each.
    assert all(size == 2 * C and kind == dtype for size, kind, _ in sent)


def test_shuffled_layers_of_one_plan_share_their_messages(mesh):
  """Strides differ by layer, and so do distances: never more than N - 1."""
  holding = assignments.neurons(8, 8, N, 0.5, shuffled(0))
  plan = exchange.make_plan(holding)
  me = lambda: jax.lax.axis_index("data")
  there = lambda x: exchange.to_owners(plan, x, me(), "data")
  sent = messages(there, values(Table(holding)), mesh)
  counts = collections.Counter(shift for *_, shift in sent)
  assert max(counts.values()) == 1
  assert len(sent) <= N - 1
