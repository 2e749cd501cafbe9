"""Meta-training: theta learns from how networks train under it.

Thérien et al., 2024, https://arxiv.org/abs/2406.00153, appendix C. Pairs of
every task are shared out over the devices of the mesh axis `tasks`; a
meta-step sends one gradient of theta a pair, some 10 kB. All that goes on from
step to step is in the state, and each pair's randomness is its own, so that
neither stopping nor the number of devices changes what is learned.

Letters in shapes: p pairs of a task.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.learned.meta.inner import Problem
from distrain_jax.learned.meta.pes import (
  Settings,
  check_settings,
  start_pair,
  truncation,
)

AXIS = "tasks"
PAPER = Settings()


class MetaState(NamedTuple):
  """Everything of a meta-training run but its key and data."""

  step: jax.Array  # (), int32, meta-steps done
  theta: Any
  opt_state: optax.OptState
  pairs: tuple[Any, ...]  # a `Pair` a problem, leading axis p, over `tasks`


class MetaTraining(NamedTuple):
  """`trainer`'s result."""

  init: Callable  # (theta, key) -> MetaState
  step: Callable  # (state, data, key) -> (MetaState, metrics)


def outer_adamw(
  steps: int,
  *,
  peak: float = 3e-3,
  final: float = 1e-3,
  warmup: int = 100,
  weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
  """The paper's: AdamW, linear warm-up, cosine to `final`, then constant.

  Args:
    steps: meta-steps of the run; the cosine ends 100 before, or at 49/50.
    peak: the largest rate.
    final: the last rate.
    warmup: meta-steps of warm-up; at most a tenth of the run.
    weight_decay: of theta.
  """
  warmup = min(warmup, steps // 10)
  until = max(warmup + 1, steps - min(100, max(1, steps // 50)))
  rate = optax.warmup_cosine_decay_schedule(
    peak * 1e-7, peak, warmup, until, end_value=final
  )
  return optax.adamw(rate, weight_decay=weight_decay)


def trainer(
  problems: Sequence[Problem],
  tx: optax.GradientTransformation,
  settings: Settings = PAPER,
  *,
  mesh: Mesh | None = None,
) -> MetaTraining:
  """Meta-training on several problems, each with pairs of its own.

  Args:
    problems: all weigh the same, whatever they cost.
    tx: the outer optimizer, on theta.
    settings: of the estimator.
    mesh: with an axis `tasks` over which pairs are shared out; None: one
      device.

  Returns:
    `init` and `step`, compiled. Metrics: meta_loss (mean of all), grad_norm,
    and losses, one a problem. Data is a tuple of one pytree a problem.

  Raises:
    ValueError: settings out of range, a mesh without the axis, or pairs that
      its devices cannot share evenly.
  """
  check_settings(settings)
  count = _devices(mesh)
  if settings.pairs % count:
    raise ValueError(
      f"meta: `pairs`={settings.pairs} must be a multiple of the {count} "
      f"devices on the mesh axis {AXIS!r}."
    )
  runs = [truncation(problem, settings) for problem in problems]

  def init(theta, key):
    pairs = []
    for number, problem in enumerate(problems):
      index = jnp.arange(settings.pairs, dtype=jnp.int32)
      own = jax.random.fold_in(key, number)
      start = lambda i, p=problem, own=own: start_pair(
        p, theta, settings, i, jax.random.fold_in(own, i)
      )
      pairs.append(jax.vmap(start)(index))
    zero = jnp.zeros((), jnp.int32)
    # Untouched, it would be the caller's array, which the first step donates.
    theta = jax.tree.map(jnp.copy, theta)
    return MetaState(zero, theta, tx.init(theta), tuple(pairs))

  def gradients(theta, pairs, data, key):
    """Of this device's pairs; then of all, in the order of their index."""
    found = []
    for number, (run, own, x) in enumerate(zip(runs, pairs, data)):
      task_key = jax.random.fold_in(key, number)
      mapped = jax.vmap(lambda p, k=task_key, r=run, x=x: r(theta, p, x, k))
      grads, own, losses = mapped(own)
      if mesh is not None:
        gather = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
        grads, losses = jax.tree.map(gather, (grads, losses))
      # Summed in one order on any number of devices.
      mean = jax.tree.map(lambda x: jnp.mean(x, 0), grads)
      found.append((mean, jnp.mean(losses), own))
    means, losses, pairs = zip(*found)
    grad = jax.tree.map(lambda *x: sum(x) / len(x), *means)
    return grad, jnp.stack(losses), pairs

  def step(state, data, key):
    key = jax.random.fold_in(key, state.step)
    grad, losses, pairs = spread(state.theta, state.pairs, tuple(data), key)
    grad = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), grad)
    updates, opt_state = tx.update(grad, state.opt_state, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    metrics = {
      "meta_loss": jnp.mean(losses),
      "losses": losses,
      "grad_norm": jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(grad))),
    }
    return MetaState(state.step + 1, theta, opt_state, pairs), metrics

  if mesh is None:
    spread = gradients
    return MetaTraining(jax.jit(init), jax.jit(step, donate_argnums=0))
  spread = jax.shard_map(
    gradients,
    mesh=spmd.auto_mesh(mesh),
    in_specs=(P(), P(AXIS), P(), P()),
    out_specs=(P(), P(), P(AXIS)),
    axis_names={AXIS},
    check_vma=False,
  )
  place = lambda spec: NamedSharding(spmd.auto_mesh(mesh), spec)
  where = MetaState(place(P()), place(P()), place(P()), place(P(AXIS)))
  return MetaTraining(
    jax.jit(init, out_shardings=where),
    jax.jit(step, donate_argnums=0, out_shardings=(where, place(P()))),
  )


def _devices(mesh: Mesh | None) -> int:
  if mesh is None:
    return 1
  if AXIS not in mesh.shape:
    raise ValueError(
      f"meta: pairs are shared out over the mesh axis {AXIS!r}; the mesh has "
      f"{dict(mesh.shape)}. Make one with spmd.make_mesh({{{AXIS!r}: -1}})."
    )
  return mesh.shape[AXIS]
