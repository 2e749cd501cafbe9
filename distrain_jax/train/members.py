"""Scores of the models that the workers train, where these differ."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.models import Task
from distrain_jax.runners import Run
from distrain_jax.train.evaluate import averages


def members_evaluator(
  run: Run, task: Task
) -> Callable[[Any, Iterable[Any]], dict[str, float]]:
  """`(state, batches) -> {"members_loss", "ensemble_accuracy", ...}`.

  `members_` are means over the workers' models, `ensemble_` is the mean of
  their probabilities. Every model sees all rows: as much work as so many
  evaluations.

  Args:
    run: of a method with `member`.
    task: whose logits are scored.

  Returns:
    A function; it compiles once.
  """
  method, same = run.method, P()

  def one_worker(state, batch):
    logits = method.member(lambda model: task.logits(model, batch), state)
    mean = jax.lax.pmean(jax.nn.softmax(logits), method.axis)
    alone = jax.lax.pmean(task.score(logits, batch), method.axis)
    together = task.score(jnp.log(mean), batch)
    together.pop("weight")
    return {
      "weight": alone.pop("weight"),
      **{f"members_{k}": x for k, x in alone.items()},
      **{f"ensemble_{k}": x for k, x in together.items()},
    }

  if run.mesh is None:
    runner = spmd.vmap_runner(method.axis, run.workers)
  else:
    runner = spmd.mesh_runner(run.mesh, method.axis)
  jitted = jax.jit(runner(one_worker, (method.specs, same), same))

  def evaluate(state, batches):
    return averages(lambda batch: jitted(state, run.spread(batch)), batches)

  return evaluate
