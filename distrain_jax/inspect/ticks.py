"""Which micro-batch each stage of a pipeline has in each tick, and for how long.

The micro-batches are those that the method's own step works on.
Time is a model: every stage costs the same, and a tick takes as long as its
slowest stage, since each ends in messages to both neighbours.

Letters: J stages, M micro-batches.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.runners import Run

COLOURS = {  # Okabe and Ito's
  "forward": "#56b4e9",
  "again": "#e69f00",  # evaluated a second time, on the way back
  "backward": "#009e73",
  "idle": "#e8e8e8",
}
LABELS = {
  "forward": "forward",
  "again": "reconstruction, or recomputation from a kept input",
  "backward": "backward",
  "idle": "idle",
}


class Trace(NamedTuple):
  """Numbers of micro-batches, which count on from step to step; -1: none."""

  forward: np.ndarray  # (ticks, J), int32
  backward: np.ndarray  # (ticks, J), int32

  @property
  def busy(self) -> float:
    """The fraction of passes that have a micro-batch: the methods' metric.

    A tick has room for one pass forward and one back, unless no stage ever has
    both, as in GPipe.
    """
    count = (self.forward >= 0).astype(int) + (self.backward >= 0)
    return float(count.mean() / count.max())

  @property
  def in_flight(self) -> int:
    """Micro-batches between their passes on one stage, at most."""
    change = (self.forward >= 0).astype(int) - (self.backward >= 0)
    return int(change.cumsum(0).max())


class Costs(NamedTuple):
  """Of one stage's passes."""

  forward: float = 1.0
  again: float = 1.0  # the second evaluation, on the way back; 0: graph kept
  backward: float = 2.0


class Pass(NamedTuple):
  """A part of a stage's work in a tick."""

  what: str  # a key of COLOURS
  tick: int
  stage: int
  number: int  # of the micro-batch
  start: float
  length: float


def trace(run: Run, state: Any, batch: Any, key: Any) -> Trace:
  """What every stage does in the step that `run.step` would make.

  Args:
    run: of a pipelined method, without replicas; simulated or distributed.
    state, batch, key: as for `run.step`. The state is left as it is.

  Raises:
    ValueError: for another run.
  """
  method = run.method
  if method.trace is None or method.replicas is not None:
    raise ValueError(
      f"ticks.trace: {method.name} is no pipeline of its own; pass a run of "
      "petra or pipeline, made without `replicas`."
    )
  # A state that wraps another one (guard's) is unwrapped.
  specs = getattr(method.specs, "inner", method.specs)
  state = getattr(state, "inner", state)
  stages = P(method.axis)
  fn = run.runner(method.trace, (specs, P(), P()), (stages, stages))
  with spmd.no_current_mesh():
    found = jax.device_get(jax.jit(fn)(state, batch, key))
  return Trace(*(np.asarray(x).T for x in found))


def passes(trace: Trace, costs: Costs) -> list[Pass]:
  """Everything that stages work on, in order of ticks.

  The last stage's pass forward is done where its pass back is, as the package's
  pipelines have it, and nothing is evaluated twice there.
  """
  found, start = [], 0.0
  for tick in range(len(trace.forward)):
    end = start
    for stage in range(trace.forward.shape[1]):
      at = start
      for what, number in _work(trace, tick, stage):
        length = getattr(costs, what)
        if length:
          found.append(Pass(what, tick, stage, number, at, length))
        at += length
      end = max(end, at)
    start = end
  return found


def _work(trace: Trace, tick: int, stage: int) -> list[tuple[str, int]]:
  """(what, micro-batch) of a stage in a tick."""
  up = int(trace.forward[tick, stage])
  down = int(trace.backward[tick, stage])
  if stage == trace.forward.shape[1] - 1:
    return [("forward", down), ("backward", down)] if down >= 0 else []
  first = [("forward", up)] if up >= 0 else []
  return first + ([("again", down), ("backward", down)] if down >= 0 else [])


def tick_times(trace: Trace, costs: Costs) -> np.ndarray:
  """Each tick's time: (ticks,)."""
  works = np.zeros(trace.forward.shape)
  for p in passes(trace, costs):
    works[p.tick, p.stage] += p.length
  return works.max(1)


def time_per_micro_batch(trace: Trace, costs: Costs) -> float:
  """Of a whole step that starts and ends with an empty pipeline.

  >>> one = np.array([[0, -1], [-1, 0], [-1, -1]])  # J = 2, M = 1
  >>> back = np.array([[-1, -1], [-1, 0], [0, -1]])
  >>> time_per_micro_batch(Trace(one, back), Costs(again=0))
  6.0
  """
  count = len(set(trace.backward.ravel().tolist()) - {-1})
  return float(tick_times(trace, costs).sum() / count)


def when_full(trace: Trace) -> Trace:
  """The ticks in which every stage has both passes.

  One micro-batch leaves in each, so that a tick's time is a micro-batch's where
  the pipeline never empties.

  Raises:
    ValueError: if there is no such tick.
  """
  full = ((trace.forward >= 0) & (trace.backward >= 0)).all(1)
  if not full.any():
    raise ValueError(
      f"ticks.when_full: in none of {len(full)} ticks has every stage both "
      "passes. Trace more micro-batches than 2 (J - 1), in one step of petra."
    )
  return Trace(trace.forward[full], trace.backward[full])


def busy_time(trace: Trace, costs: Costs) -> float:
  """The fraction of all stages' time in which they work."""
  work = sum(p.length for p in passes(trace, costs))
  total = tick_times(trace, costs).sum() * trace.forward.shape[1]
  return float(work / total)


def picture(
  panels: Sequence[tuple[str, Trace, Costs]],
  path: str | Path,
  *,
  title: str = "",
) -> None:
  """Writes a PNG: a panel a schedule, a row a stage, time to the right.

  Args:
    panels: (heading, trace, costs) of each.
    path: of the PNG.
    title: above all.
  """
  from matplotlib.patches import Patch

  end = max(tick_times(t, c).sum() for _, t, c in panels)
  rows = [t.forward.shape[1] for _, t, _ in panels]
  figure = _figure(max(8.0, 0.36 * end + 1.2), 0.3 * sum(rows) + 1.6)
  stack = figure.subplots(
    len(panels), 1, sharex=True, squeeze=False, height_ratios=rows
  )[:, 0]
  for axes, (heading, found, costs) in zip(stack, panels):
    _panel(axes, found, costs)
    axes.set_title(heading, loc="left", fontsize=9)
    axes.set_xlim(0, end)
  stack[-1].set_xlabel("time, in passes forward of a stage", fontsize=9)
  handles = [Patch(color=c, label=LABELS[k]) for k, c in COLOURS.items()]
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=len(handles),
    frameon=False,
    fontsize=8,
  )
  figure.suptitle(title, fontsize=10)
  figure.savefig(path, dpi=130)


def _figure(width: float, height: float) -> Any:
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _panel(axes, found: Trace, costs: Costs) -> None:
  times, count = tick_times(found, costs), found.forward.shape[1]
  for stage in range(count):
    whole = [(0, times.sum())], (stage - 0.42, 0.84)
    axes.broken_barh(*whole, color=COLOURS["idle"])
  for p in passes(found, costs):
    span = [(p.start, p.length)], (p.stage - 0.42, 0.84)
    axes.broken_barh(*span, color=COLOURS[p.what], ec="white", lw=0.6)
    place = p.start + p.length / 2, p.stage
    how = {"ha": "center", "va": "center", "fontsize": 7}
    axes.text(*place, str(p.number), **how)
  for end in times.cumsum():
    axes.axvline(end, color="black", lw=0.5, ls=(0, (1, 2)))
  axes.set(
    ylim=(count - 0.5, -0.5),
    yticks=range(count),
    yticklabels=[f"stage {s}" for s in range(count)],
  )
  axes.tick_params(labelsize=8)
  axes.spines[["top", "right"]].set_visible(False)
