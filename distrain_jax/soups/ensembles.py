"""Ensembles: the models' predictions averaged, not the models.

Of N models an ensemble costs N times one; an average of models that is as good
costs as much as one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distrain_jax.models import Task
from distrain_jax.soups import trees

HOW = ("probabilities", "logits")


def ensemble_logits(
  logits: Sequence[jax.Array], how: str = "probabilities"
) -> jax.Array:
  """The ensemble's logits, from those of its N members.

  Args:
    logits: N arrays (..., classes) of one shape, or one (N, ..., classes).
    how: "probabilities": the logarithm of the mean of the softmax; "logits":
      the mean of the logits, that is the geometric mean of the probabilities
      (as PAPA's released code, https://arxiv.org/abs/2304.03094).

  Returns:
    (..., classes), float32 or wider: logits, of which the softmax is the
    ensemble's prediction.

  Raises:
    ValueError: for no members, shapes that differ, or another `how`.

  >>> likes = jnp.log(jnp.array([[[0.9, 0.1]], [[0.5, 0.5]]]))
  >>> jnp.exp(ensemble_logits(likes)).round(3).tolist()
  [[0.7..., 0.3...]]
  """
  _check_how(how)
  shapes = [jnp.shape(x) for x in logits]
  if not shapes or len(set(shapes)) > 1 or not shapes[0]:
    raise ValueError(
      "ensemble_logits: `logits` are those of at least one member, (..., "
      f"classes) each, all of one shape; got {shapes}."
    )
  x = jnp.stack([jnp.asarray(x) for x in logits])  # (N, ..., classes)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if how == "logits":
    return x.mean(0)
  log_p = jax.nn.log_softmax(x)
  return jax.nn.logsumexp(log_p, axis=0) - np.log(len(shapes))


def evaluate_ensemble(
  task: Task,
  models: Sequence[Any],
  batches: Iterable[Any],
  how: Sequence[str] = HOW,
) -> dict[str, dict[str, float]]:
  """{how: {"loss", "accuracy"}} of the ensemble over all rows that count.

  Args:
    task: whose logits are scored.
    models: as for `uniform`.
    batches: of a split, such as `data.eval_batches` makes them.
    how: one or more ways of `ensemble_logits`.

  Raises:
    ValueError: as `uniform` and `ensemble_logits`, or if no row counts.
  """
  # Here, as the trainer is much to load and nothing else here needs it.
  from distrain_jax.train.evaluate import averages

  for x in how:
    _check_how(x)
  trees.check("evaluate_ensemble", models)
  logits_of = jax.jit(task.logits)

  @jax.jit
  def scores(logits, batch):
    found = {x: task.score(ensemble_logits(logits, x), batch) for x in how}
    sums = {"weight": next(iter(found.values()))["weight"]}
    for x, score in found.items():
      sums |= {f"{x}_{k}": v for k, v in score.items() if k != "weight"}
    return sums

  def of_batch(batch):
    return scores([logits_of(model, batch) for model in models], batch)

  means = averages(of_batch, batches)
  pick = lambda x: {k: means[f"{x}_{k}"] for k in ("loss", "accuracy")}
  return {x: pick(x) for x in how}


def _check_how(how: str) -> None:
  if how not in HOW:
    raise ValueError(
      f"ensemble: `how` is one of {', '.join(HOW)}; got {how!r}."
    )
