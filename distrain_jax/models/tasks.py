"""What a model is trained on: its loss and its evaluation, as pure functions.

Batches are dicts with a leading axis of b rows. Classification: {"image":
(b, h, w, c) float32, "label": (b,) int32}, or soft labels, (b, classes) float,
each row's probabilities of the classes, as mixed images have. Language
modelling: {"tokens": (b, t) int32, "targets": (b, t) int32}, the tokens that
follow. For evaluation also "weight": (b,) float32, 1 for rows that count and 0
for padding.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from distrain_jax.method import Batch, LossFn, Metrics, Variables
from distrain_jax.models import chunked_loss, options, zoo
from distrain_jax.models.chunked_loss import cross_entropy


class Task(NamedTuple):
  """A model with a purpose; see `task`."""

  init: Callable[[jax.Array], Variables]  # (key) -> new variables
  # Not stateful: (params, batch, key) -> (loss, aux), which a method takes.
  # Stateful: (params, model_state, batch, key) -> (loss, (aux, model_state)),
  # which it takes as `distrain_jax.method.stateful(loss_fn)`.
  loss_fn: Callable[..., Any]
  stateful: bool
  # (variables or params, batch) -> sums over rows, see `evaluation`.
  evaluate: Callable[[Any, Batch], Metrics]
  # (variables or params, batch) -> logits (b, classes) or (b, t, vocab).
  logits: Callable[[Any, Batch], jax.Array]
  # (logits, or log-probabilities, batch) -> what `evaluate` returns.
  score: Callable[[jax.Array, Batch], Metrics]
  # (what the model returns in training, batch) -> (loss, aux): with the model,
  # `loss_fn`.
  measure: Callable[[Any, Batch], tuple[jax.Array, Metrics]]


def classification_loss(
  model: nn.Module, *, label_smoothing: float = 0.0, stateful: bool = False
) -> LossFn | Callable[..., Any]:
  """Mean cross-entropy, in nats, of images' labels.

  Args:
    model: `apply(variables, image, train=True) -> logits (b, classes)`.
    label_smoothing: this fraction of each label, whole or soft, is spread over
      all classes. Szegedy et al., "Rethinking the Inception Architecture for
      Computer Vision", 2015, https://arxiv.org/abs/1512.00567, section 7.
    stateful: whether the model has non-trained state, as BatchNorm.

  Returns:
    A loss_fn of the form that `Task.loss_fn` states; aux is {"accuracy"}, the
    fraction of rows whose likeliest class is the label, or a soft label's
    likeliest class. The key feeds the model's dropout.

  Raises:
    ValueError: if label_smoothing is not in [0, 1).
  """
  measure = classification_measure(label_smoothing=label_smoothing)
  return _loss_fn(model, "image", measure, stateful)


def classification_measure(
  *, label_smoothing: float = 0.0
) -> Callable[[jax.Array, Batch], tuple[jax.Array, Metrics]]:
  """`(logits (b, classes), batch) -> (loss, aux)`; see `classification_loss`."""
  options.check_rate("classification", label_smoothing=label_smoothing)

  def measure(logits, batch):
    losses, hits = _losses_and_hits(logits, batch["label"])
    every = -jax.nn.log_softmax(logits).mean()
    loss = (1 - label_smoothing) * losses.mean() + label_smoothing * every
    return loss, {"accuracy": hits.mean(dtype=jnp.float32)}

  return measure


def language_model_loss(
  model: nn.Module,
  *,
  bytes_per_token: float | None = None,
  logits_chunk: int | None = None,
  stateful: bool = False,
) -> LossFn | Callable[..., Any]:
  """Mean cross-entropy, in nats a token, of the tokens that follow.

  Args:
    model: `apply(variables, tokens, train=True) -> logits (b, t, vocab)`.
    bytes_per_token: average length of a token's text, 1 for byte tokens: aux
      is then {"bits_per_byte"}; otherwise it is empty.
    logits_chunk: so many tokens of a row have logits at once; None or 0: all.
      For a model with a method `hidden(tokens, train=True) -> (x (b, t, e),
      head (e, vocab))`, whose product the logits are. See `chunked_loss`.
    stateful: whether the model has non-trained state.

  Returns:
    A loss_fn of the form that `Task.loss_fn` states.

  Raises:
    ValueError: if bytes_per_token is not above 0, or logits_chunk cannot be.
  """
  chunked_loss.check(model, logits_chunk)
  measure = language_model_measure(
    bytes_per_token=bytes_per_token, logits_chunk=logits_chunk
  )
  method = "hidden" if logits_chunk else None
  return _loss_fn(model, "tokens", measure, stateful, method)


def language_model_measure(
  *, bytes_per_token: float | None = None, logits_chunk: int | None = None
) -> Callable[[Any, Batch], tuple[jax.Array, Metrics]]:
  """`(logits, batch) -> (loss, aux)`; see `language_model_loss`.

  With logits_chunk, `(x, head)` takes the place of the logits.
  """
  if bytes_per_token is not None and not bytes_per_token > 0:
    raise ValueError(
      "language_model: `bytes_per_token` must be above 0 (1 for byte tokens) "
      f"or None; got {bytes_per_token!r}."
    )

  def measure(out, batch):
    if logits_chunk:
      loss = chunked_loss.mean_cross_entropy(
        *out, batch["targets"], logits_chunk
      )
    else:
      loss = cross_entropy(out, batch["targets"]).mean()
    if bytes_per_token is None:
      return loss, {}
    return loss, {"bits_per_byte": loss / math.log(2) / bytes_per_token}

  return measure


def evaluation(
  model: nn.Module,
  *,
  inputs: str,
  targets: str,
  logits_chunk: int | None = None,
) -> Callable[[Any, Batch], Metrics]:
  """Sums to be added up over a whole split.

  Args:
    model: a classifier of images or of next tokens.
    inputs, targets: their keys in the batch; targets (b,) or (b, t), or soft
      labels (b, classes).
    logits_chunk: as for `language_model_loss`.

  Returns:
    (variables, batch) -> {"loss_sum", "correct_sum", "weight"}, scalars in
    float32: nats, correct predictions, and how many predictions counted (rows,
    or tokens). `variables` is `Variables` or bare params; no "weight" in the
    batch counts every row. Rows of weight 0 change nothing, not even as NaN.
  """

  chunked_loss.check(model, logits_chunk)

  def evaluate(variables, batch):
    out = _apply(model, variables, batch[inputs], bool(logits_chunk))
    wanted = batch[targets]
    if not logits_chunk:
      return _score(out, wanted, batch)
    return _sums(*chunked_loss.token_losses(*out, wanted, logits_chunk), batch)

  return evaluate


# kind -> (the batch's inputs, its targets, the loss's factory)
KINDS = {
  "classification": ("image", "label", classification_loss),
  "language_model": ("tokens", "targets", language_model_loss),
}
MEASURES = {
  "classification": classification_measure,
  "language_model": language_model_measure,
}


def task(
  model: nn.Module, kind: str, example: Mapping[str, Any], **loss_options: Any
) -> Task:
  """A model's init, loss and evaluation, in the form that its state asks for.

  Args:
    model: a Linen module, such as `models.create` returns.
    kind: "classification" or "language_model".
    example: a batch, of which shapes and dtypes matter; values may be
      `jax.ShapeDtypeStruct`s.
    **loss_options: as for `classification_loss`, `language_model_loss`.

  Raises:
    ValueError: an unknown kind, or an example without the kind's inputs.
  """
  inputs, targets, loss = options.pick("task: kind", kind, KINDS)
  if inputs not in example:
    raise ValueError(
      f"task: {kind} reads {inputs!r} and {targets!r} from a batch; the example "
      f"has {', '.join(map(repr, sorted(example)))}."
    )
  start = functools.partial(zoo.init, model, example=example[inputs])
  stateful = bool(zoo.abstract(model, example[inputs]).model_state)
  loss_fn = loss(model, stateful=stateful, **loss_options)
  chunk = loss_options.get("logits_chunk")
  evaluate = evaluation(
    model, inputs=inputs, targets=targets, logits_chunk=chunk
  )
  logits = lambda variables, batch: _apply(model, variables, batch[inputs])
  score = lambda logits, batch: _score(logits, batch[targets], batch)
  measure = MEASURES[kind](**loss_options)
  return Task(start, loss_fn, stateful, evaluate, logits, score, measure)


def _apply(model, variables, x, hidden: bool = False):
  """A model's output in evaluation, or what its logits are a product of."""
  if not isinstance(variables, Variables):
    variables = Variables(variables, {})
  return model.apply(
    {"params": variables.params, **variables.model_state},
    x,
    train=False,
    method="hidden" if hidden else None,
  )


def _score(logits: jax.Array, wanted: jax.Array, batch: Batch) -> Metrics:
  return _sums(*_losses_and_hits(logits, wanted), batch)


def _losses_and_hits(
  logits: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Of each row or token: its loss, and whether the likeliest is right."""
  if not jnp.issubdtype(wanted.dtype, jnp.floating):
    return cross_entropy(logits, wanted), logits.argmax(-1) == wanted
  if wanted.shape != logits.shape:
    raise ValueError(
      f"Soft labels are probabilities of the shape of the logits, "
      f"{logits.shape}; got {wanted.dtype}{list(wanted.shape)}. Labels that "
      "are class numbers have an integer dtype."
    )
  losses = -(wanted * jax.nn.log_softmax(logits)).sum(-1)
  return losses, logits.argmax(-1) == wanted.argmax(-1)


def _sums(losses: jax.Array, hits: jax.Array, batch: Batch) -> Metrics:
  """Over the tokens or rows that count: (b,) or (b, t) each."""
  rows = batch.get("weight", jnp.ones(losses.shape[:1], jnp.float32))
  rows = rows.reshape(rows.shape + (1,) * (losses.ndim - rows.ndim))
  weight = jnp.broadcast_to(rows, losses.shape).astype(jnp.float32)
  total = lambda x: jnp.where(weight > 0, x * weight, 0).sum()
  return {
    "loss_sum": total(losses),
    "correct_sum": total(hits),
    "weight": weight.sum(),
  }


def _loss_fn(model, inputs, measure, stateful, method=None):
  """Applies the model in training mode, then `measure(its output, batch)`."""

  def with_state(params, model_state, batch, key):
    out, model_state = model.apply(
      {"params": params, **model_state},
      batch[inputs],
      train=True,
      rngs={"dropout": key},
      mutable=list(model_state),
      method=method,
    )
    loss, aux = measure(out, batch)
    return loss, (aux, dict(model_state))

  def without_state(params, batch, key):
    loss, (aux, _) = with_state(params, {}, batch, key)
    return loss, aux

  return with_state if stateful else without_state
