"""Losses in chunks against the same ones from whole logits."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distrain_jax as dj
from distrain_jax import models
from distrain_jax.models import chunked_loss

B, T, V = 4, 12, 23
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
BATCH = {
  "tokens": RNG.integers(0, V, (B, T)).astype(np.int32),
  "targets": RNG.integers(0, V, (B, T)).astype(np.int32),
}
LLAMA = {"vocab": V, "embed": 8, "layers": 2, "heads": 2, "mlp": 12}
MODELS = {
  "llama": ("llama", {**LLAMA, "dropout": 0.2}),
  "llama, tied": ("llama", {**LLAMA, "tied": True}),
  "gpt_neo": ("gpt_neo", {**LLAMA, "positions": T, "window": 3}),
}
by_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def build(name, **more):
  """A model, and parameters far enough from 0 that every part matters."""
  kind, options = MODELS[name]
  model = models.create(kind, **{**options, **more})
  shapes = models.abstract(model, BATCH["tokens"]).params
  rng = np.random.default_rng(1)
  draw = lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32)
  return model, jax.tree.map(draw, shapes)


def differentiated(model, params, chunk, scale=1.0):
  loss_fn = models.language_model_loss(
    model, bytes_per_token=2.0, logits_chunk=chunk
  )

  def scaled(params):
    loss, aux = loss_fn(params, BATCH, KEY)
    return scale * loss, aux

  return jax.jit(jax.value_and_grad(scaled, has_aux=True))(params)


def close(a, b, tolerance=2e-6):
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@by_model
def test_loss_aux_and_every_gradient_equal_those_of_whole_logits(name):
  model, params = build(name)
  plain = differentiated(model, params, None)
  assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(plain[1]))
  for chunk in (4, 2 * T):
    jax.tree.map(close, differentiated(model, params, chunk), plain)


def test_a_scaled_loss_scales_its_gradients():
  model, params = build("llama")
  plain = differentiated(model, params, 0, scale=-3.0)
  jax.tree.map(close, differentiated(model, params, 4, scale=-3.0), plain)


@by_model
def test_the_loss_alone_equals_that_of_whole_logits(name):
  model, params = build(name)
  plain, chunked = (
    jax.jit(models.language_model_loss(model, logits_chunk=chunk))
    for chunk in (None, 3)
  )
  close(chunked(params, BATCH, KEY)[0], plain(params, BATCH, KEY)[0], 1e-6)


@by_model
def test_in_bfloat16_gradients_are_as_near_the_exact_ones_as_before(name):
  _, params = build(name)
  exact = differentiated(build(name)[0], params, None)[1]
  half, _ = build(name, dtype="bfloat16")

  def error(chunk):
    grads = differentiated(half, params, chunk)[1]
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    return math.sqrt(
      sum(
        np.square(x - y).sum()
        for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(exact))
      )
    )

  assert 0 < error(1) < 1.2 * error(None)


def test_in_float16_a_sum_over_tokens_beyond_its_range_is_no_infinity():
  tokens = 1 << 14
  x = jnp.full((1, tokens, 1), 8, jnp.float16)
  head = jnp.zeros((1, 2), jnp.float16)
  targets = jnp.zeros((1, tokens), jnp.int32)
  grad_fn = jax.grad(chunked_loss.mean_cross_entropy, argnums=1)
  dhead = jax.jit(grad_fn, static_argnums=3)(x, head, targets, 1024)
  assert dhead.dtype == jnp.float16
  close(dhead, [[-4, 4]])  # 8 (softmax - one-hot); its sum is 65,536


def test_a_target_beyond_the_vocabulary_makes_the_loss_nan():
  model, params = build("llama")
  loss_fn = models.language_model_loss(model, logits_chunk=4)
  batch = BATCH | {"targets": BATCH["targets"] + V}
  assert np.isnan(jax.jit(loss_fn)(params, batch, KEY)[0])


def equations(jaxpr):
  """All equations of a jaxpr and of those within it, with their loops' trips."""
  for eqn in jaxpr.eqns:
    yield 1, eqn
    trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for inner in jaxprs_in_params(eqn.params):
      for runs, deeper in equations(inner):
        yield trips * runs, deeper


def traced(name, chunk):
  model, params = build(name)
  loss_fn = models.language_model_loss(model, logits_chunk=chunk)
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  return list(equations(jax.make_jaxpr(grad_fn)(params, BATCH, KEY).jaxpr))


@by_model
def test_no_array_has_an_entry_for_every_token_and_word(name):
  largest = lambda chunk: max(
    out.aval.size
    for _, eqn in traced(name, chunk)
    for out in eqn.outvars
    if V in out.aval.shape
  )
  assert largest(None) == B * T * V
  assert largest(3) == max(B * 3 * V, V * LLAMA["embed"])


@by_model
def test_as_many_products_are_computed_as_from_whole_logits(name):
  def products(chunk):
    total = 0
    for runs, eqn in traced(name, chunk):
      if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        total += runs * eqn.outvars[0].aval.size * depth
    return total

  assert products(3) == products(None) > 0


def train(run, params, steps=2):
  state = run.init(KEY, params)
  for _ in range(steps):
    state, metrics = run.step(state, BATCH, KEY)
  return jax.device_get((run.params(state), metrics))


def sgd(model, chunk):
  loss_fn = models.language_model_loss(model, logits_chunk=chunk)
  return dj.ddp(loss_fn, optax.sgd(0.5), accumulate=2)


@pytest.mark.parametrize("simulated", [True, False])
def test_training_on_workers_with_micro_batches_is_the_same(mesh, simulated):
  model, params = build("llama, tied")
  plain, chunked = (
    train(
      dj.simulate(sgd(model, chunk), workers=2)
      if simulated
      else dj.distribute(sgd(model, chunk), mesh(2)),
      params,
    )
    for chunk in (None, 4)
  )
  jax.tree.map(functools.partial(close, tolerance=5e-6), chunked, plain)


@pytest.mark.parametrize("logical", ["vocab", "embed"])
@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_parameters_may_be_sharded_over_a_further_axis(mesh, name, logical):
  model, params = build(name, vocab=24)
  devices = mesh(2, tensor=2)
  names = models.logical_names(model, BATCH["tokens"])
  place = lambda x, axes: jax.device_put(
    x,
    NamedSharding(
      devices, P(*("tensor" if axis == logical else None for axis in axes))
    ),
  )
  sharded = jax.tree.map(place, params, names)
  got = train(dj.distribute(sgd(model, 4), devices), sharded)
  wanted = train(dj.simulate(sgd(model, None), workers=2), params)
  jax.tree.map(functools.partial(close, tolerance=5e-6), got, wanted)


@by_model
def test_evaluation_in_chunks_equals_that_of_whole_logits(name):
  model, params = build(name)
  batch = BATCH | {"weight": np.array([1, 0, 1, 0.5], np.float32)}
  logits = jax.jit(model.apply)({"params": params}, BATCH["tokens"])
  targets = BATCH["targets"].copy()
  targets[:, ::2] = logits.argmax(-1)[:, ::2]  # some predictions are right
  targets[1] = V  # a row without weight: its NaN is of no consequence
  batch["targets"] = targets
  plain, chunked = (
    jax.jit(
      models.task(model, "language_model", BATCH, logits_chunk=chunk).evaluate
    )(params, batch)
    for chunk in (None, 3)
  )
  assert 0.5 <= plain["correct_sum"] / plain["weight"] < 0.9
  jax.tree.map(functools.partial(close, tolerance=1e-6), chunked, plain)


class Bigram(nn.Module):
  """A foreign model without `hidden`: a method, that is, not a size."""

  hidden: int = 7

  @nn.compact
  def __call__(self, tokens, *, train=False):
    del train
    return nn.Dense(V)(nn.Embed(V, self.hidden)(tokens))


@pytest.mark.parametrize(
  "model, chunk, message",
  [
    (build("llama")[0], -1, r"whole number above 0; .* Got -1"),
    (build("llama")[0], 2.5, r"whole number above 0; .* Got 2\.5"),
    (build("llama")[0], True, "whole number above 0; .* Got True"),
    (Bigram(), 4, r"no method `hidden\(tokens, .*: Bigram\. Write one"),
  ],
)
def test_a_chunk_that_cannot_be_is_refused_with_the_task(model, chunk, message):
  with pytest.raises(ValueError, match=message):
    models.task(model, "language_model", BATCH, logits_chunk=chunk)


def test_a_chunk_that_does_not_divide_a_row_is_refused_with_the_nearest():
  model, params = build("llama")
  task = models.task(model, "language_model", BATCH, logits_chunk=5)
  message = r"logits_chunk=5 must divide the 12 tokens .* nearest below is 4 .*"
  for run in (
    lambda: task.loss_fn(params, BATCH, KEY),
    lambda: task.evaluate(params, BATCH),
  ):
    with pytest.raises(ValueError, match=message + r"config\.loss"):
      run()


@pytest.fixture
def optimised():
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, False)
  yield
  jax.config.update(name, before)


@pytest.mark.full
def test_a_gpu_s_temporaries_fall_by_most_of_the_logits(optimised):
  vocab, tokens = 1 << 15, 1024
  model = models.create(
    "llama", vocab=vocab, embed=256, layers=2, dtype="bfloat16", remat="full"
  )
  row = jax.ShapeDtypeStruct((8 * 2, tokens), jnp.int32)
  batch = {"tokens": row, "targets": row}
  params = models.abstract(model, row).params
  devices = dj.inspect.mesh("h100:8", {"data": -1})

  def temporaries(chunk):
    loss_fn = models.language_model_loss(model, logits_chunk=chunk)
    run = dj.distribute(dj.ddp(loss_fn, optax.sgd(0.1)), devices)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = run.abstract(key, params)
    report = dj.inspect.compile(run, state, batch, key)
    return report.memory.temporaries

  logits = 2 * tokens * vocab * 4
  assert temporaries(None) > logits
  # A chunk's logits, and theirs, remain of it.
  assert temporaries(None) - temporaries(128) > 0.6 * logits
