"""Losses and evaluations against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import distrain_jax as dj
from distrain_jax import models
from distrain_jax.method import Variables

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)
IMAGES = {
  "image": RNG.normal(size=(6, 4, 4, 3)).astype(np.float32),
  "label": RNG.integers(0, 10, 6).astype(np.int32),
}
TEXT = {
  "tokens": RNG.integers(0, 9, (3, 5)).astype(np.int32),
  "targets": RNG.integers(0, 9, (3, 5)).astype(np.int32),
}
MLP = models.create("mlp", widths=(8,))
RESNET = models.ResNet(stages=(1,), width=1 / 16, momentum=0.5)
LLAMA = models.create(
  "llama", vocab=9, embed=8, layers=1, heads=2, kv_heads=1, mlp=8
)


@functools.cache
def start(model):
  inputs = TEXT["tokens"] if model is LLAMA else IMAGES["image"]
  return models.init(model, KEY, inputs)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_classification_loss_is_the_mean_cross_entropy_with_smoothing():
  task = models.task(MLP, "classification", IMAGES, label_smoothing=0.2)
  assert not task.stateful
  variables = task.init(KEY)
  assert variables.model_state == start(MLP).model_state == {}
  loss, aux = task.loss_fn(variables.params, IMAGES, KEY)
  logits = MLP.apply({"params": variables.params}, IMAGES["image"])
  logs, labels = log_softmax(logits), IMAGES["label"]
  own = np.take_along_axis(logs, labels[:, None], -1).mean()
  np.testing.assert_allclose(loss, -0.8 * own - 0.2 * logs.mean(), rtol=1e-5)
  hits = np.mean(logs.argmax(-1) == labels)
  np.testing.assert_allclose(aux["accuracy"], hits, rtol=1e-6)


def test_a_label_beyond_the_classes_makes_the_loss_nan():
  loss_fn = models.classification_loss(MLP)
  batch = IMAGES | {"label": np.full(6, 10, np.int32)}
  assert np.isnan(loss_fn(start(MLP).params, batch, KEY)[0])
  loss_fn = models.language_model_loss(LLAMA)
  batch = TEXT | {"tokens": TEXT["tokens"] + 9}
  assert np.isnan(jax.jit(loss_fn)(start(LLAMA).params, batch, KEY)[0])


SOFT = IMAGES | {"label": RNG.dirichlet(np.ones(10), 6).astype(np.float32)}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_soft_labels_is_the_mean_over_their_classes(smoothing):
  task = models.task(MLP, "classification", SOFT, label_smoothing=smoothing)
  params, labels = start(MLP).params, SOFT["label"]
  loss, aux = jax.jit(task.loss_fn)(params, SOFT, KEY)
  logs = log_softmax(MLP.apply({"params": params}, SOFT["image"]))
  smooth = (1 - smoothing) * labels + smoothing / 10
  np.testing.assert_allclose(loss, -(smooth * logs).sum(-1).mean(), rtol=1e-5)
  hits = logs.argmax(-1) == labels.argmax(-1)
  np.testing.assert_allclose(aux["accuracy"], hits.mean(), rtol=1e-6)
  weight = np.asarray([1, 1, 0, 1, 0, 1], np.float32)
  sums = jax.jit(task.evaluate)(params, SOFT | {"weight": weight})
  own = -(labels * logs).sum(-1) @ weight
  np.testing.assert_allclose(sums["loss_sum"], own, rtol=1e-5)
  assert sums["correct_sum"] == hits @ weight and sums["weight"] == 4


def test_labels_are_the_same_as_numbers_and_as_certainties():
  task = models.task(MLP, "classification", IMAGES, label_smoothing=0.1)
  certain = IMAGES | {"label": np.eye(10, dtype=np.float32)[IMAGES["label"]]}
  grads = jax.jit(jax.value_and_grad(task.loss_fn, has_aux=True))
  one, other = (
    grads(start(MLP).params, batch, KEY) for batch in (IMAGES, certain)
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, one, other)


@pytest.mark.parametrize("shape", [(6,), (6, 9), (1, 10)])
def test_soft_labels_of_another_shape_are_refused(shape):
  loss_fn = models.classification_loss(MLP)
  batch = IMAGES | {"label": np.ones(shape, np.float32)}
  with pytest.raises(ValueError, match=r"logits, \(6, 10\); got float32\["):
    loss_fn(start(MLP).params, batch, KEY)


def test_members_train_on_batches_mixed_in_ways_of_their_own():
  batch = {k: np.concatenate([x, x]) for k, x in IMAGES.items()}  # 6 each
  ways = [dj.data.Mixing(mixup=1.0, erasing=0.5), dj.data.Mixing(smoothing=0.2)]
  loss_fn = models.classification_loss(MLP)
  mixed = dj.data.mixing_loss(loss_fn, ways, 10, axis="data")
  smoothed = models.classification_loss(MLP, label_smoothing=0.2)

  def train(loss_fn):
    method = dj.local_sgd(loss_fn, optax.sgd(0.1), accumulate=2)
    run = dj.simulate(method, workers=2)
    state = run.init(KEY, start(MLP).params)
    return jax.device_get(run.step(state, batch, KEY)[0].params)

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  both, expected = train(mixed), train(smoothed)
  jax.tree.map(lambda a, b: close(a[1], b[1]), both, expected)
  first, other = (p["output"]["kernel"][0] for p in (both, expected))
  assert np.abs(first - other).max() > 1e-4


def test_language_model_loss_is_the_mean_over_tokens_in_nats_and_bits():
  task = models.task(LLAMA, "language_model", TEXT, bytes_per_token=2.0)
  params = start(LLAMA).params
  loss, aux = jax.jit(task.loss_fn)(params, TEXT, KEY)
  logs = log_softmax(jax.jit(LLAMA.apply)({"params": params}, TEXT["tokens"]))
  own = np.take_along_axis(logs, TEXT["targets"][..., None], -1).mean()
  np.testing.assert_allclose(loss, -own, rtol=1e-5)
  bits = -own / np.log(2) / 2
  np.testing.assert_allclose(aux["bits_per_byte"], bits, rtol=1e-5)
  bare = models.language_model_loss(LLAMA)
  assert jax.eval_shape(bare, params, TEXT, KEY)[1] == {}


def test_a_stateful_loss_returns_the_running_statistics():
  task = models.task(RESNET, "classification", IMAGES)
  assert task.stateful
  params, state = start(RESNET)
  loss, (aux, new) = jax.jit(task.loss_fn)(params, state, IMAGES, KEY)
  assert loss.shape == aux["accuracy"].shape == ()
  assert jax.tree.structure(new) == jax.tree.structure(state)
  images = jnp.asarray(IMAGES["image"])
  stem = jax.lax.conv_general_dilated(
    images,
    params["stem"]["kernel"],
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  mean = new["batch_stats"]["stem_norm"]["mean"]
  np.testing.assert_allclose(mean, stem.mean((0, 1, 2)) / 2, atol=1e-6)


def test_dropout_follows_the_key_of_the_loss():
  loss_fn = models.classification_loss(models.create("mlp", dropout=0.5))
  params = start(models.create("mlp")).params
  losses = [loss_fn(params, IMAGES, jax.random.key(k))[0] for k in (0, 0, 1)]
  assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
  "model, kind, batch, targets",
  [
    (MLP, "classification", IMAGES, "label"),
    (RESNET, "classification", IMAGES, "label"),
    (LLAMA, "language_model", TEXT, "targets"),
  ],
)
def test_sums_over_padded_batches_equal_the_whole_split(
  model, kind, batch, targets
):
  task = models.task(model, kind, batch)
  variables, evaluate = start(model), jax.jit(task.evaluate)
  rows, total = len(batch[targets]), {}
  for first in range(0, rows, 4):  # the last batch is filled up with copies
    indices = np.arange(first, first + 4)
    part = {k: x[np.minimum(indices, rows - 1)] for k, x in batch.items()}
    part["weight"] = (indices < rows).astype(np.float32)
    if "image" in part:
      part["image"][indices >= rows] = np.nan  # of no consequence
    sums = evaluate(variables, part)
    total = {k: total.get(k, 0) + sums[k] for k in sums}
  logits = jax.jit(model.apply)(
    {"params": variables.params, **variables.model_state},
    batch["image" if kind == "classification" else "tokens"],
  )
  logs, wanted = log_softmax(logits), batch[targets]
  own = np.take_along_axis(logs, wanted[..., None], -1).sum()
  np.testing.assert_allclose(total["loss_sum"], -own, rtol=1e-5)
  assert total["correct_sum"] == (logs.argmax(-1) == wanted).sum()
  assert total["weight"] == wanted.size


def test_evaluate_takes_bare_params_and_no_weight():
  task = models.task(MLP, "classification", IMAGES)
  variables = start(MLP)
  bare = task.evaluate(variables.params, IMAGES)
  assert bare == task.evaluate(Variables(variables.params, {}), IMAGES)
  assert bare["weight"] == 6


def test_with_synchronised_statistics_the_number_of_workers_is_of_no_effect(
  mesh,
):
  model = models.ResNet(stages=(1,), width=1 / 16, axis_name="data")
  batch = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), IMAGES)  # 8 rows
  task = models.task(model, "classification", batch)
  loss_fn = dj.stateful(task.loss_fn, stats="synchronised")
  method = dj.ddp(loss_fn, optax.sgd(0.5))

  def train(run):
    state = run.init(KEY, start(RESNET))
    for _ in range(2):
      state, metrics = run.step(state, batch, KEY)
    return jax.device_get((run.params(state), metrics))

  alone = train(dj.simulate(method, workers=1))
  four = train(dj.distribute(method, mesh(4)))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, alone, four)


@pytest.mark.parametrize(
  "arguments, options, message",
  [
    (("classify", IMAGES), {}, "kind='classify' .* Did you mean 'classifi"),
    (("language_model", IMAGES), {}, "the example has 'image', 'label'"),
    (("classification", IMAGES), {"label_smoothing": 1.0}, r"in \[0, 1\)"),
    (("language_model", TEXT), {"bytes_per_token": 0}, "must be above 0"),
  ],
)
def test_bad_tasks_are_refused(arguments, options, message):
  model = LLAMA if arguments[1] is TEXT else MLP
  with pytest.raises(ValueError, match=message):
    models.task(model, *arguments, **options)
