"""A split's averages, whatever its batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import data, models
from distrain_jax.train import evaluator
from distrain_jax.train.evaluate import with_bits_per_byte


def sums_of(params, batch):
  counts = batch["weight"] > 0
  total = lambda x: jnp.where(counts, x, 0).sum()
  return {
    "loss_sum": total(params * batch["x"]),
    "correct_sum": total(batch["x"] > 2),
    "weight": total(1.0),
  }


@pytest.fixture
def evaluate(mesh):
  method = dj.ddp(lambda *_: (0.0, {}), optax.sgd(0.1))
  return evaluator(dj.distribute(method, mesh(4)), sums_of)


def test_rows_count_and_padding_does_not_even_as_nan(evaluate):
  nan = np.nan
  batches = [
    {"x": np.array([1.0, 2, 3, 4]), "weight": np.ones(4)},
    {"x": np.array([6.0, nan, nan, nan]), "weight": np.array([1.0, 0, 0, 0])},
  ]
  assert evaluate(0.5, batches) == {"loss": 1.6, "accuracy": 0.6}


def test_a_split_without_rows_is_refused(evaluate):
  with pytest.raises(ValueError, match="no rows that count"):
    evaluate(0.5, [])
  with pytest.raises(ValueError, match="no rows that count"):
    evaluate(0.5, [{"x": np.ones(4), "weight": np.zeros(4)}])


def test_the_last_batch_of_a_real_split_counts_for_what_it_has(mesh):
  """Against one NumPy pass over the whole split."""
  split = data.load("digits").validation
  model = models.create("mlp", widths=(16,))
  whole = next(iter(data.eval_batches(split, batch_size=len(split))))
  task = models.task(model, "classification", whole)
  params = task.init(jax.random.key(0)).params
  logits = np.asarray(
    model.apply({"params": params}, whole["image"], train=False), np.float64
  )
  own = logits[np.arange(len(split)), whole["label"]]
  losses = np.log(np.exp(logits).sum(1)) - own
  method = dj.ddp(task.loss_fn, optax.sgd(0.1))
  evaluate = evaluator(dj.distribute(method, mesh(8)), task.evaluate)
  for size in (64, 256):  # 197 rows: every last batch is padded
    means = evaluate(params, data.eval_batches(split, batch_size=size))
    np.testing.assert_allclose(means["loss"], losses.mean(), rtol=1e-5)
    hits = logits.argmax(1) == whole["label"]
    np.testing.assert_allclose(means["accuracy"], hits.mean(), rtol=1e-6)


def test_bits_per_byte_compare_tokenizers():
  means = {"loss": np.log(2) * 6.0, "accuracy": 0.5}
  assert with_bits_per_byte(means, None) == means
  got = with_bits_per_byte(means, 4.0)  # 6 bits a token of 4 bytes
  np.testing.assert_allclose(got["bits_per_byte"], 1.5)
  assert {k: got[k] for k in means} == means
