"""The seconds that a clock is given, by hand or from a compiled program."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distrain_jax.inspect.clock.loop import TICKS

# Exchanges in a step of the methods whose compiled report fits the clock.
REPORTED = {"ddp": 1, "zero1": 1, "dpu": 1, "weight_prediction": 1, "acco": 2}


class Times(NamedTuple):
  """Seconds; n workers. `times` makes and checks them."""

  micro_batch: tuple[float, ...]  # (n,), forward and backward, on each worker
  reduce_scatter: tuple[float, ...]  # (n,), of the model, by each one's link
  all_gather: tuple[float, ...]  # (n,)
  update: float = 0.0  # of a worker's shard; of the whole model n times that

  @property
  def exchange(self) -> float:
    """Tm: a reduce-scatter, the update of the shard, an all-gather."""
    return max(self.reduce_scatter) + self.update + max(self.all_gather)

  def at_ratio(self, ratio: float, accumulate: int) -> "Times":
    """The same with another exchange, so that Tm / Tc = `ratio`.

    Tc: of `accumulate` micro-batches on the slowest worker. An exchange that
    took no time becomes half a reduce-scatter, half an all-gather.
    """
    wanted = ratio * accumulate * max(self.micro_batch)
    if not self.exchange:
      half = (wanted / 2,) * len(self.micro_batch)
      return self._replace(reduce_scatter=half, all_gather=half)
    factor = wanted / self.exchange
    return self._replace(
      reduce_scatter=tuple(factor * s for s in self.reduce_scatter),
      all_gather=tuple(factor * s for s in self.all_gather),
      update=factor * self.update,
    )


def times(
  workers: int,
  *,
  micro_batch: float | Sequence[float],
  reduce_scatter: float | Sequence[float],
  all_gather: float | Sequence[float],
  update: float = 0.0,
  slow: Mapping[int, float] | None = None,
) -> Times:
  """Seconds of `workers` workers, from one number for all or one for each.

  Args:
    workers: how many.
    micro_batch: of forward and backward of one micro-batch.
    reduce_scatter: of the whole model's gradients; an all-reduce takes this
      and `all_gather`.
    all_gather: of the whole model's parameters.
    update: of one worker's shard by the optimizer.
    slow: worker -> how many times longer its micro-batches take.

  Raises:
    ValueError: for times that are negative, not finite or too few, and for a
      worker that is not there.

  >>> times(2, micro_batch=1.0, reduce_scatter=0.2, all_gather=0.1, slow={1: 4})
  Times(micro_batch=(1.0, 4.0), reduce_scatter=(0.2, 0.2), all_gather=(0.1, \
0.1), update=0.0)
  """
  at_least("workers", workers, 1)
  compute = list(_each("micro_batch", micro_batch, workers))
  if min(compute) * TICKS < 1:
    raise ValueError(
      f"clock: `micro_batch` is in seconds, above 0; got {micro_batch!r}."
    )
  for worker, factor in (slow or {}).items():
    if worker not in range(workers):
      raise ValueError(
        f"clock: `slow` names worker {worker!r}, but the {workers} workers are "
        f"0 to {workers - 1}."
      )
    (factor,) = _each("slow", factor, 1)
    if not factor:
      raise ValueError("clock: `slow` has factors above 0, such as 4; got 0.")
    compute[worker] *= factor
  return Times(
    micro_batch=tuple(compute),
    reduce_scatter=_each("reduce_scatter", reduce_scatter, workers),
    all_gather=_each("all_gather", all_gather, workers),
    update=_each("update", update, 1)[0],
  )


def from_report(report: Mapping[str, Any], accumulate: int) -> Times:
  """The modelled times of a compiled step: one of launch/compile.py's reports.

  All that the step computes, the update with it, is its micro-batches; what is
  neither a reduce-scatter nor an all-gather on the wire is half of each.

  Args:
    report: `Report.to_json()` of a method that is in REPORTED.
    accumulate: micro-batches into which to cut the step's compute.

  Raises:
    ValueError: for another method's report, or one without times.
  """
  name, where = report["name"], f"of {report['name']} on {report['hardware']}"
  if "model" not in report or not report["model"]["step_seconds"]:
    raise ValueError(
      f"clock: the report {where} has no times. Compile for a topology that "
      "has them, e.g. --topology=v5e:2x4, and a model that fits."
    )
  if name not in REPORTED:
    raise ValueError(
      f"clock: the report {where} does not tell one exchange's seconds; those "
      f"of {', '.join(REPORTED)} do: compile with --compare=zero1."
    )
  seconds = {"reduce-scatter": 0.0, "all-gather": 0.0}
  for c in report["collectives"]:
    took = c["seconds"] * c["runs"] / REPORTED[name]
    kind = "reduce-scatter" if c["each_keeps_a_part"] else c["kind"]
    kinds = [kind] if kind in seconds else list(seconds)
    for kind in kinds:
      seconds[kind] += took / len(kinds)
  return times(
    report["devices"],
    micro_batch=report["model"]["compute_seconds"] / accumulate,
    reduce_scatter=seconds["reduce-scatter"],
    all_gather=seconds["all-gather"],
  )


def at_least(name: str, value: int, least: int) -> None:
  """Raises ValueError for what is no such whole number."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(
      f"clock: `{name}` is a whole number of at least {least}; got {value!r}."
    )


def _each(name, value, workers) -> tuple[float, ...]:
  """A number for each worker."""
  one = not isinstance(value, Sequence)
  found = (value,) * workers if one else tuple(value)
  if len(found) != workers:
    raise ValueError(
      f"clock: `{name}` has {len(found)} numbers for {workers} workers; give "
      "one for all of them or one for each."
    )
  if not all(math.isfinite(x) and x >= 0 for x in found):
    raise ValueError(
      f"clock: `{name}` is finite and not negative; got {value!r}."
    )
  return tuple(map(float, found))
