"""The contract of a method: a few pure functions, written for one worker.

A worker sees its own slice of the batch and its own state, and speaks to the
others through collectives on one named axis. `distrain_jax.spmd` runs the
same functions on a mesh, on one device, or in several processes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

Params = Any  # a pytree of arrays: the model
State = Any  # a pytree of arrays: one worker's everything
Batch = Any  # a pytree of arrays with a leading batch axis
Metrics = dict[str, jax.Array]  # scalars, equal on all workers

# (params, batch, key) -> (loss, aux): a scalar and a dict of scalars, both
# means over the batch's rows, so that they average over workers.
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, Metrics]]


class Variables(NamedTuple):
  """A model that carries state which is not trained, as BatchNorm does."""

  params: Params  # trained
  model_state: Any  # running statistics and the like


class StatefulLoss(NamedTuple):
  """A loss over `Variables`; made by `stateful`."""

  # (params, model_state, batch, key) -> (loss, (aux, model_state))
  fn: Callable[..., tuple[jax.Array, tuple[Metrics, Any]]]
  stats: str


STATS = ("averaged", "local", "synchronised")


def stateful(fn: Callable[..., Any], *, stats: str = "averaged"):
  """Marks the loss of a model with non-trained state, e.g. BatchNorm.

  Pass the result wherever a loss_fn goes, and `Variables(params, model_state)`
  wherever params go. During training every worker normalises by its own
  micro-batch, unless the model itself reduces over the workers' axis.

  Args:
    fn: `(params, model_state, batch, key) -> (loss, (aux, model_state))`.
    stats: what happens to model_state between the workers.
      "averaged": its floating leaves are averaged after each step (they travel
        with the gradients), so that all workers hold the same.
      "local": each worker keeps its own, as PyTorch's DDP does; they are
        averaged where the model is read for evaluation or export.
      "synchronised": the model reduces the batch statistics over the axis in
        its forward pass (`axis_name=`), so that they are equal already.

  Returns:
    A `StatefulLoss`.

  Raises:
    ValueError: if `stats` is none of these.
  """
  if stats not in STATS:
    raise ValueError(
      f"stateful: `stats` is one of {', '.join(STATS)}; got {stats!r}."
    )
  return StatefulLoss(fn, stats)


class Method(NamedTuple):
  """What a factory such as `ddp` returns; see `simulate` and `distribute`.

  `init`, `step` and `params` are per-worker functions: they must run where
  `axis` is a named axis (under shard_map or vmap).
  """

  name: str
  axis: str  # the named axis that the workers are on
  # (key, params) -> State: one worker's state, from the whole model.
  init: Callable[[jax.Array, Params], State]
  # (state, batch, key) -> (State, Metrics): batch is this worker's share; key
  # is the run's key, the same at every step and on every worker.
  step: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
  # (state) -> Params: the model to evaluate or export, equal on all workers.
  params: Callable[[State], Params]
  # State, or a prefix of it, of PartitionSpecs: P() for what is equal on all
  # workers, P(axis) for what differs; the latter get a leading worker axis, and
  # with `replicas` P(axis, replicas) two.
  specs: Any
  # (state, workers) -> State, on global arrays (worker axes included): the
  # same state for another number of workers. None: it cannot be done.
  reshard: Callable[[State, int], State] | None = None
  # Whether workers may start from different models (`per_worker=True`).
  population: bool = False
  # In words, what decides beside the shapes where in a state a value lies. A
  # checkpoint of another layout is refused.
  layout: str = ""
  # (fn, state) -> fn(the model that this worker trains, or the Variables),
  # where workers' models differ; fn says nothing to other workers. None: they
  # are all alike.
  member: Callable[[Callable[[Params], Any], State], Any] | None = None
  # A second axis, of workers that do the same on other rows; its size is the
  # mesh's, or what `simulate` is told.
  replicas: str | None = None
  # PartitionSpec of a batch's rows: P() for all rows on all workers. None:
  # divided among the workers, P(axis).
  rows: P | None = None
  # (state, key) -> State: finishes what is in flight, without new rows. None:
  # a step leaves nothing in flight that would be lost.
  drain: Callable[[State, jax.Array], State] | None = None
  # (state, batch, key) -> (forward, backward), int32 (ticks,) each: the number
  # of the micro-batch that this worker takes forward, and back, in each tick of
  # the step that `step` would make of these; -1 for none. None: no pipeline.
  trace: Callable[[State, Batch, jax.Array], tuple[Any, Any]] | None = None
  # A second name that workers are on, of those that share a device: the mesh
  # has no such axis. None: one worker a device.
  inner: str | None = None
  # (workers, before=()) -> the number of each, where a worker is somebody and
  # keeps its state for good: in a state of the same numbers nobody changes.
  # before: the numbers in a saved state; ValueError if one of them would be
  # lost without having been named. None: workers are all alike.
  numbers: Callable[..., Sequence[int]] | None = None

  @property
  def workers_on(self) -> str | tuple[str, str]:
    """What collectives between all workers take as their axis."""
    return all_workers(self.axis, self.inner)


def all_workers(axis: str, inner: str | None) -> str | tuple[str, str]:
  """The name, or names, that collectives between all workers take."""
  return axis if inner is None else (axis, inner)
