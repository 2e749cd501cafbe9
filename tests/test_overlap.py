"""An exchange beside micro-batches: the same however it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distrain_jax import layout, overlap, wires

pytestmark = pytest.mark.core

N, TRIPS = 3, 7


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
  with pytest.MonkeyPatch.context() as patch:
    for module in (layout, overlap):
      patch.setattr(module, "TILES", (2, 2), raising=False)
      patch.setattr(module, "LANES", 4, raising=False)
    patch.setattr(layout, "ALONE", 40)
    yield


def make_tree(dtype="float32"):
  """Leaves that travel alone, before and among the small ones; 14 in all.

  Their numbers are sorted otherwise as words: 0, 10, 13, 2.
  """
  shapes = {0: (7, 8), 2: (45,), 10: (9, 6), 13: (4, 4, 4)}
  rng = np.random.default_rng(0)
  small = [(3,), (), (5, 2)]
  leaves = [
    rng.integers(-8, 8, size=shapes.get(i, small[i % 3])) for i in range(14)
  ]
  return [jnp.asarray(x, dtype) for x in leaves]


def exchange(tree, slices, reduction="reduce_scatter", wire_dtype=None):
  return overlap.Exchange(
    layout=layout.make_layout(tree, N),
    axis="i",
    slices=slices,
    wire_dtype=wire_dtype,
    reduction=reduction,
  )


def run(one, trips, tree=None):
  """Every worker w's sums are (w + 1) times the tree; the update: 2 x + 1.

  Returns:
    `((N, TRIPS) micro-batches in the order they ran, the trees, the counts)`.
  """
  tree = make_tree() if tree is None else tree

  def worker(w, trips):
    sums = jax.tree.map(lambda x: x * (w + 1).astype(x.dtype), tree)
    work = lambda carry, i: (carry[0].at[i].set(carry[1]), carry[1] + 1)

    def turn(pieces):
      assert {x.dtype for x in jax.tree.leaves(pieces)} == {jnp.float32.dtype}
      return jax.tree.map(lambda x: 2 * x + 1, pieces), w + 10

    start = (jnp.full(TRIPS, -1), jnp.zeros((), int))
    (ran, count), new, out = overlap.beside(
      one, work, start, trips, overlap.packed(one, sums), turn, wires.Plain()
    )
    return ran, new, (count, out)

  if isinstance(trips, int):
    return of_workers(functools.partial(worker, trips=trips))
  return of_workers(worker, jnp.asarray(trips))


def of_workers(worker, *each):
  """What every worker makes of its number."""
  fn = jax.jit(jax.vmap(worker, axis_name="i"))
  return fn(jnp.arange(N), *each)


def expected(tree):
  """2 (1 + 2 + 3) x + 1 on every worker."""
  one = lambda x: 2 * N * (N + 1) / 2 * np.asarray(x, np.float64) + 1
  return [np.broadcast_to(one(x), (N, *x.shape)) for x in tree]


def assert_equal(got, wanted):
  for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
    np.testing.assert_array_equal(
      np.asarray(x, np.float64), y, err_msg=f"leaf {i}"
    )


@pytest.mark.parametrize(
  ("slices", "reduction"),
  [
    (0, "reduce_scatter"),
    (1, "reduce_scatter"),
    (3, "reduce_scatter"),
    (1, "all_to_all"),
    (2, "all_to_all"),
  ],
)
def test_however_it_is_cut_every_leaf_comes_back_in_its_place(
  slices, reduction
):
  ran, new, (count, out) = run(exchange(make_tree(), slices, reduction), TRIPS)
  assert_equal(new, expected(make_tree()))
  # Every micro-batch ran once, in order; what turn says besides comes along.
  assert (np.asarray(ran) == np.arange(TRIPS)).all()
  assert (count == TRIPS).all()
  assert out.tolist() == [10, 11, 12]


def test_workers_may_make_different_numbers_of_trips():
  ran, new, (count, _) = run(exchange(make_tree(), 1), [2, 7, 5])
  assert_equal(new, expected(make_tree()))
  assert count.tolist() == [2, 7, 5]
  assert (np.asarray(ran)[2] == [0, 1, 2, 3, 4, -1, -1]).all()


def test_an_exchange_that_is_not_cut_needs_no_microbatch():
  _, new, (count, _) = run(exchange(make_tree(), 0), 0)
  assert_equal(new, expected(make_tree()))
  assert (count == 0).all()


@pytest.mark.parametrize("slices", [0, 2])
def test_leaves_of_several_dtypes_keep_theirs(slices):
  tree = make_tree()
  tree = [x.astype("bfloat16") if i % 2 else x for i, x in enumerate(tree)]
  _, new, _ = run(exchange(tree, slices), 4, tree=tree)
  assert [x.dtype for x in new] == [x.dtype for x in tree]
  assert_equal(new, expected(tree))  # small whole numbers are exact


@pytest.mark.parametrize("slices", [0, 2])
def test_in_eight_bits_every_leaf_comes_back_in_its_place(slices):
  tree = make_tree()
  base = [x + 0.5 for x in tree]

  def worker(w):
    sums = [x * (w + 1).astype(x.dtype) for x in tree]
    wire = wires.Quantised(base, "i")
    work = lambda carry, i: carry
    turn = lambda pieces: (pieces, ())
    one = exchange(tree, slices)
    sent = overlap.packed(one, sums)
    return overlap.beside(one, work, (), 4, sent, turn, wire)[1]

  new = of_workers(worker)
  largest = max(float(jnp.abs(6 * x - b).max()) for x, b in zip(tree, base))
  for x, got in zip(tree, new, strict=True):
    off = np.abs(np.asarray(got) - 6 * np.asarray(x)[None])
    assert off.max() <= largest / 254 + 1e-5
  assert largest > 5


def test_what_is_sent_apart_is_added_up_in_float32():
  """1 + 2 x 2^-9 of three workers: in bfloat16 the small ones are lost."""
  tree = [jnp.ones(30, jnp.bfloat16)]

  def worker(w, reduction):
    small = jnp.where(w == 0, 1.0, 2.0**-9).astype(jnp.bfloat16)
    one = exchange(tree, 0, reduction)
    return overlap.scatter_sums(one, [small * tree[0]])[0]

  fn = functools.partial(worker, reduction="all_to_all")
  got = of_workers(fn)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, 1 + 2 * 2.0**-9)


@pytest.mark.parametrize("reduction", overlap.REDUCTIONS)
def test_gradients_travel_in_the_wires_dtype_and_arrive_in_float32(reduction):
  tree = [jnp.full(30, 1 + 2.0**-9)]  # which bfloat16 rounds to 1

  def worker(w):
    one = exchange(tree, 0, reduction, wire_dtype="bfloat16")
    return overlap.scatter_sums(one, [tree[0] + 0.0 * w])[0]

  got = of_workers(worker)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, N)
  traced = str(jax.make_jaxpr(worker, axis_env=[("i", N)])(0))
  (sent,) = [x for x in traced.splitlines() if f"= {reduction}[" in x]
  assert ":bf16[" in sent


@pytest.mark.parametrize("slices", [0, 3])
def test_alone_the_exchange_gives_what_it_gives_beside_microbatches(slices):
  tree = make_tree()

  def worker(w):
    one = exchange(tree, slices)
    pieces = overlap.scatter_sums(one, [x * (w + 1) for x in tree])
    return overlap.gather_pieces(one, [2 * x + 1 for x in pieces])

  assert_equal(of_workers(worker), expected(tree))
