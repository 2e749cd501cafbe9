"""A worker's arrays against the whole model with units zeroed, or blocks gone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax import models

pytestmark = pytest.mark.core

N, KEY = 4, jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 16)
IMAGES = jax.random.normal(jax.random.key(2), (3, 5))


class Made:
  """A model with its workers' params, and the numbers of their elements."""

  def __init__(self, model, example, **options):
    params = models.init(model, KEY, example).params
    names = models.logical_names(model, example)
    method = dj.sdp(
      lambda params, rows, key: (0.0, {}),
      optax.sgd(0.1),
      names=names,
      shapes=params,
      **options,
    )
    run = dj.simulate(method, workers=N)
    self.model, self.params, self.example = model, toys.numpy(params), example
    self.names = names
    leaves, treedef = jax.tree.flatten(self.params)
    ends = np.cumsum([x.size for x in leaves])
    numbered = [
      np.arange(end - x.size, end, dtype=np.float32).reshape(x.shape)
      for x, end in zip(leaves, ends)
    ]
    self.numbers = treedef.unflatten(numbered)
    self.ids = toys.numpy(run.init(KEY, self.numbers).params)
    self.state = self.of(self.params)
    # Of any logits: a gradient with respect to each.
    self.run = jax.jit(jax.value_and_grad(self.loss, has_aux=True))

  def of(self, params):
    """What workers hold of other values: those at the same places."""
    flat = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    return jax.tree.map(lambda ids: flat[ids.astype(int)], self.ids)

  def loss(self, params):
    logits = self.model.apply({"params": params}, self.example)
    weights = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32))
    return jnp.sum(logits * weights.reshape(logits.shape)), logits

  def there(self, w):
    """Of each element of the whole model: whether worker w has it."""
    return jax.tree.map(np.isin, self.numbers, toys.of_worker(self.ids, w))


@functools.cache
def llama(**options):
  model = models.create(
    "llama", vocab=16, embed=16, layers=4, heads=8, kv_heads=4, mlp=12
  )
  return Made(model, TOKENS, **options)


@functools.cache
def mlp():
  model = models.create("mlp", widths=(8, 8, 8), classes=3)
  return Made(model, IMAGES, coverage=0.5)


@pytest.mark.parametrize(
  "make",
  [
    mlp,
    functools.partial(llama, coverage=0.5),
    functools.partial(llama, coverage=0.75, assignment="shuffled"),
  ],
  ids=["mlp", "llama", "llama-shuffled"],
)
def test_a_subnetwork_is_the_whole_one_with_absent_units_zeroed(make):
  made = make()
  for w in range(N):
    mine, there = toys.of_worker(made.state, w), made.there(w)
    zeroed = jax.tree.map(np.multiply, made.params, there)
    (_, logits), grads = made.run(mine)
    (_, expected), dense = made.run(zeroed)
    toys.near(logits, expected, 2e-5)

    def check(ids, g, d, numbers, there):
      at = np.searchsorted(numbers.ravel(), np.asarray(ids).ravel())
      toys.near(np.asarray(g).ravel(), np.asarray(d).ravel()[at], 5e-5)
      assert not np.asarray(d)[~there].any()  # not 1e-9

    jax.tree.map(
      check, toys.of_worker(made.ids, w), grads, dense, made.numbers, there
    )
    absent = jax.tree.map(lambda x: (~x).any(), there)
    assert any(jax.tree.leaves(absent))


def test_of_two_hidden_layers_in_a_row_the_first_is_sampled():
  shapes = jax.tree.map(np.shape, mlp().state.held)
  assert shapes["dense_0"]["kernel"] == (N, 5, 4)
  assert shapes["dense_1"]["kernel"] == (N, 4, 8)
  assert shapes["dense_2"] == {"bias": (N, 4), "kernel": (N, 8, 4)}
  assert shapes["output"]["kernel"] == (N, 4, 3)
  assert mlp().state.held["dense_1"]["bias"] is None


@pytest.mark.parametrize("assignment", ["cyclic", "shuffled"])
def test_absent_blocks_are_skipped_and_never_looked_at(assignment):
  made = llama(coverage=0.5, level="block", assignment=assignment)
  layer = made.numbers["blocks"]["attention_norm"]["scale"][:, 0]
  seen = set()
  for w in range(N):
    ids = made.ids.held["blocks"]["attention_norm"]["scale"][w, :, 0]
    kept = [int(np.flatnonzero(layer == i)[0]) for i in ids]
    assert kept == sorted(kept) and len(kept) == 2
    seen |= set(kept)
    rows = np.array(kept)
    blocks = jax.tree.map(lambda x, rows=rows: x[rows], made.params["blocks"])
    mine = toys.of_worker(made.state, w)
    toys.equal(mine, {**made.params, "blocks": blocks})
    others = np.setdiff1d(np.arange(4), kept)
    spoilt = jax.tree.map(np.array, made.params)
    for x in jax.tree.leaves(spoilt["blocks"]):
      x[others] = np.nan
    spoilt = toys.of_worker(made.of(spoilt), w)
    toys.equal(made.run(mine), made.run(spoilt))
  assert seen == set(range(4))


def test_both_levels_give_each_worker_a_part_of_its_layers():
  made = llama(coverage=(0.5, 0.5), level="both")
  shapes = jax.tree.map(np.shape, made.state.held["blocks"])
  assert shapes["attention"]["query"] == (N, 2, 16, 2, 2, 2)
  assert shapes["attention"]["out"] == (N, 2, 2, 2, 2, 16)
  assert shapes["feed_forward"]["gate"] == (N, 2, 16, 6)
  assert shapes["feed_forward_norm"]["scale"] == (N, 2, 16)
  assert made.state.held["embedding"] is None
  norms = made.ids.held["blocks"]["attention_norm"]["scale"][:, :, 0]
  for w in range(N):  # the layers are the same in all of its arrays
    for part, name in (("attention", "out"), ("feed_forward", "down")):
      ids = made.ids.held["blocks"][part][name][w]
      whole = made.numbers["blocks"][part][name]
      layers = made.numbers["blocks"]["attention_norm"]["scale"][:, 0]
      for i, one in enumerate(ids):
        (layer,) = np.flatnonzero(layers == norms[w, i])
        assert np.isin(one, whole[layer]).all()


def test_what_is_shared_by_name_stays_whole():
  model = models.create(
    "llama", vocab=16, embed=8, layers=2, heads=4, kv_heads=4, mlp=12
  )
  made = Made(model, TOKENS, coverage=0.5, shared=("heads",))
  blocks = made.state.held["blocks"]
  assert not jax.tree.leaves(blocks["attention"])
  assert blocks["feed_forward"]["down"].shape == (N, 2, 6, 8)
