"""Scores of the models that the workers train, where these differ."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from distrain_jax import soups, spmd
from distrain_jax.gradients import at_least_float32
from distrain_jax.models import Task
from distrain_jax.runners import Run
from distrain_jax.soups import trees
from distrain_jax.train.evaluate import averages

Scores = dict[str, float]


def members_evaluator(
  run: Run, task: Task
) -> Callable[[Any, Iterable[Any]], Scores]:
  """`(state, batches) -> {"members_loss", "ensemble_accuracy", ...}`.

  `members_` are means over the workers' models, `members_worst_` and
  `members_best_` of the worst and the best of them; `ensemble_` is the mean of
  their probabilities and `logit_ensemble_` of their logits. Every model sees
  all rows: as much work as so many evaluations.

  Args:
    run: of a method with `member`.
    task: whose logits are scored.

  Returns:
    A function; it compiles once.
  """
  method = run.method

  def one_worker(state, batch):
    logits = method.member(lambda model: task.logits(model, batch), state)
    axes = method.workers_on
    mean = lambda x: jax.lax.pmean(x, axes)
    each = lambda x: jax.lax.psum(spmd.in_own_place(x, axes), axes)
    alone = task.score(logits, batch)
    together = {
      "ensemble": task.score(jnp.log(mean(jax.nn.softmax(logits))), batch),
      "logit_ensemble": task.score(mean(logits), batch),
    }
    return {
      "weight": alone.pop("weight"),
      **{f"each_{k}": each(x) for k, x in alone.items()},
      **{f"{who}_{k}": x[k] for who, x in together.items() for k in alone},
    }

  jitted = jax.jit(run.runner(one_worker, (method.specs, P()), P()))

  def evaluate(state, batches):
    sums = lambda batch: _flat(jitted(state, run.spread(batch)))
    return _summary(averages(sums, batches), run.workers)

  return evaluate


def mixer(run: Run) -> Callable[[Any, Any], Any]:
  """`(state, weights (N,)) -> model`: sum_n weights[n] of worker n's model.

  On the run's mesh, whatever the number of workers in other processes: no
  worker's model is taken anywhere else. Leaves that are no floats are those of
  the first.
  """
  method = run.method

  def one_worker(state, weights):
    axes = method.workers_on
    me = jax.lax.axis_index(axes)

    def one(x):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.psum(jnp.where(me == 0, x, 0), axes)
      wide = jnp.promote_types(x.dtype, jnp.float32)
      # A member of weight 0 is out, though it were not finite.
      own = jnp.where(weights[me] == 0, 0, weights[me] * x.astype(wide))
      return jax.lax.psum(own, axes).astype(x.dtype)

    return jax.tree.map(one, method.member(lambda model: model, state))

  return jax.jit(run.runner(one_worker, (method.specs, P()), P()))


def relative_distance(run: Run) -> Callable[[Any], jax.Array]:
  """`(state) -> ()`: `soups.consensus_distance(...).total.relative`.

  Of the trained leaves, on the run's mesh.
  """
  method = run.method

  def one_worker(state):
    axes = method.workers_on
    model = trees.trained(method.member(lambda model: model, state))
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    leaves = filter(floating, jax.tree.leaves(model))
    wide = list(map(at_least_float32, leaves))
    mean = jax.lax.pmean(wide, axes)
    apart = sum(jnp.square(x - m).sum() for x, m in zip(wide, mean))
    norm = sum(jnp.square(x).sum() for x in wide)
    apart, norm = jax.lax.psum((apart, norm), axes)
    return jnp.sqrt(apart / jnp.where(norm == 0, 1, norm))

  return jax.jit(run.runner(one_worker, (method.specs,), P()))


def not_finite(run: Run, state: Any) -> list[int]:
  """Numbers of the members in whose model some value is not finite."""
  method = run.method

  def one_worker(state):
    leaves = jax.tree.leaves(method.member(lambda model: model, state))
    floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    bad = sum(jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in floating)
    axes = method.workers_on
    return jax.lax.psum(spmd.in_own_place(bad, axes), axes)

  with spmd.no_current_mesh():
    bad = jax.jit(run.runner(one_worker, (method.specs,), P()))(state)
  numbers = method.numbers(run.workers)
  return [n for n, count in zip(numbers, np.asarray(bad)) if count]


def greedy_soup(
  mix: Callable[[Any, Any], Any],
  state: Any,
  members: int,
  score: Callable[[Any], float],
) -> tuple[Any, int]:
  """The model of `soups.greedy` among a state's members, and their number.

  Args:
    mix: as `mixer` makes it.
    state: of the population.
    members: N.
    score: (model) -> higher is better, on held-out data.
  """
  # A soup is known by its weights: those of one member are one-hot, and the
  # mean of several of them is that of a soup of several members.
  alone = list(np.eye(members, dtype=np.float32))
  found = soups.greedy(alone, lambda weights: score(mix(state, weights)))
  return mix(state, found.model), len(found.chosen)


def _flat(sums):
  """Scalars only: `each_loss_sum` (N,) becomes `each_loss_sum` of N names."""
  out = {k: x for k, x in sums.items() if not k.startswith("each_")}
  for name in sums.keys() - out.keys():
    for n, x in enumerate(np.asarray(sums[name])):
      out[f"{n}_{name}"] = x
  return out


def _summary(found: Scores, members: int) -> Scores:
  scores: Scores = {}
  # Who is not finite is the worst, and never the best.
  for what, best, worst in (
    ("loss", np.fmin, np.maximum),
    ("accuracy", np.fmax, np.minimum),
  ):
    each = [found.pop(f"{n}_each_{what}") for n in range(members)]
    scores[f"members_{what}"] = float(np.mean(each))
    scores[f"members_worst_{what}"] = float(worst.reduce(each))
    scores[f"members_best_{what}"] = float(best.reduce(each))
  return scores | found
