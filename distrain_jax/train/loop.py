"""One loop for any method: train, evaluate, save, resume.

The host reads the metrics of step n - 1 while step n runs, so that the devices
never wait for it; where something is decided from them (a save, an
evaluation) it waits for step n first.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distrain_jax.methods.guard import GuardState
from distrain_jax.train import curves, members
from distrain_jax.train.checkpoint import Checkpoints
from distrain_jax.train.experiment import Experiment
from distrain_jax.train.interrupt import Agreement, Interrupted, StopSignal
from distrain_jax.train.metrics import (
  MetricsWriter,
  NoMetrics,
  check_packages,
  read_metrics,
)
from distrain_jax.train.profile import Profile
from distrain_jax.train.progress import Progress

DRAW_EVERY = 60.0  # seconds between drawings of the curves
WATCHED = ("loss", "grad_norm")  # ends of the names of what must be finite


class Result(NamedTuple):
  """Of a finished run."""

  state: Any
  metrics: dict[str, float]  # of the test split: "test_loss", ...


class BadStep(RuntimeError):
  """The loss or gradient is not finite, or the loss jumped."""


def train(
  experiment: Experiment, workdir: str | Path, *, label: str = "train"
) -> Result:
  """Runs an experiment to its last step, from its latest checkpoint if any.

  The folder gets config.json, checkpoints/, metrics.jsonl and curves.png.

  Args:
    experiment: as `build` makes it.
    workdir: the run's folder; made if it is not there.
    label: stands before the progress.

  Raises:
    Interrupted: after SIGTERM or SIGINT, once the state is saved; the same
      call goes on from there.
    BadStep: with config.bad_step.action="stop"; the last checkpoint is good.
    ValueError: if the folder holds a run that this one cannot go on from.
  """
  folder = Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  use_compilation_cache(experiment.config.compilation_cache)
  # The signal's context is the outermost: one that comes while the last
  # checkpoint is written, or the test split evaluated, must not undo them.
  with (
    StopSignal() as stop,
    Checkpoints(
      folder / "checkpoints",
      keep=experiment.config.checkpoint.keep,
      keep_best=experiment.config.checkpoint.keep_best,
    ) as checkpoints,
  ):
    loop = _Loop(experiment, folder, checkpoints, label)
    try:
      with loop.writer, loop.progress, loop.profile:
        return loop.go(stop)
    finally:
      loop.draw()


def use_compilation_cache(folder: str) -> None:
  """Keeps XLA's compiled programs between processes, the small ones too."""
  if folder and not jax.config.jax_compilation_cache_dir:
    path = str(Path(folder).expanduser())
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class _Loop:
  """The run's moving parts between steps."""

  def __init__(self, experiment: Experiment, folder: Path, checkpoints, label):
    self.x, self.c, self.run = experiment, experiment.config, experiment.run
    self.folder, self.checkpoints, self.label = folder, checkpoints, label
    self.first_process = jax.process_index() == 0
    check_packages(self.c.log.tensorboard, self.c.log.wandb)
    self.start = checkpoints.latest or 0
    if self.start > self.c.steps:
      raise ValueError(
        f"config.steps={self.c.steps}, but {folder} holds a run of "
        f"{self.start} steps. Set --config.steps={self.start} or more to go on "
        "with it, or start in another folder."
      )
    params = experiment.params()
    self.batches = experiment.batches()
    if self.start:
      self.state = checkpoints.restore(
        self.start, self.run, self.x.key, params, self.batches
      )
    else:
      self.state = self.run.init(self.x.key, params)
    show = self.first_process
    self.progress = Progress(self.start, self.c.steps, label, show=show)
    if self.start:
      self.progress.say(f"going on from step {self.start}")
    self.writer = self._writer() if show else NoMetrics()
    self.profile = Profile(
      folder / "profile", self.c.profile.start, self.c.profile.steps
    )
    self.drawn = time.monotonic()
    self.saved = self.start
    self.bad_steps = _bad_steps(self.state)
    self.agreed = Agreement(self.run.mesh)

  def go(self, stop: StopSignal) -> Result:
    unread = None  # (step, its metrics), while the next step runs
    for step in range(self.start + 1, self.c.steps + 1):
      if self.profile.before(step, self.state):
        self.progress.say(f"profile in {self.profile.folder}")
      batch = self.run.put(next(self.batches))
      self.state, metrics = self.run.step(self.state, batch, self.x.key)
      if unread:
        self._read(*unread)
      unread = (step, metrics)
      stopping = self.agreed(stop.seen)
      if stopping or self._due(step):
        self._read(*unread)
        unread = None
        self._pause(step, stopping)
    return Result(self.state, self._finish())

  def draw(self) -> None:
    """curves.png, from the lines so far."""
    if self.first_process:
      lines = {self.label: read_metrics(self.folder)}
      curves.draw(lines, self.folder / curves.NAME)
      self.drawn = time.monotonic()

  def _read(self, step: int, metrics) -> None:
    """Waits for a step; refuses, logs and shows its numbers."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    self._refuse(step, values)
    if step % self.c.log.every == 0 or step == self.c.steps:
      self.writer.write(step, values)
    self.progress.update(step, values)

  def _refuse(self, step, values) -> None:
    """Stops before anything is saved that came of a bad step."""
    if self.c.bad_step.action != "stop":
      return
    watched = {k: v for k, v in values.items() if k.endswith(WATCHED)}
    bad = {k: v for k, v in watched.items() if not np.isfinite(v)}
    # Those that the run skipped before it was told to stop are forgiven.
    if not bad and values.get("bad_steps", 0) <= self.bad_steps:
      return
    who = self._blamed(values)
    latest = f"The latest checkpoint, of step {self.saved}, is from before."
    raise BadStep(
      f"Step {step}: {bad or watched} "
      f"{'is not finite' if bad else 'is far above its running mean'}. "
      f"{latest if self.saved else 'There is no checkpoint yet.'} {who}Lower "
      "--config.optimizer.learning_rate or set --config.method.clip_norm, or "
      "go on without such steps: --config.bad_step.action=skip."
    )

  def _blamed(self, values) -> str:
    """Members who made a step bad, and how the others go on, for an error."""
    if self.run.method.numbers is None:
      return ""
    if "worst_member" in values:
      blamed, bad = [int(values["worst_member"])], "worst"
    else:  # the model that was evaluated: who spoils the average
      blamed, bad = members.not_finite(self.run, self.state), "not finite"
    others = self.run.workers - len(blamed)
    if not blamed or not others:
      return ""
    leave = (*(self.c.method.leave or ()), *blamed)
    rows = self.c.batch_size // self.run.workers * others
    names = ", ".join(map(str, blamed))
    are = f"Member {names} is" if len(blamed) == 1 else f"Members {names} are"
    them = "it" if len(blamed) == 1 else "them"
    where = "devices (config.mesh times config.population.per_device): "
    if self.c.simulate:
      where = f"simulated ones: --config.simulate={others} "
    return (
      f"{are} {bad}; the {others} others can go on without {them}, on as many "
      f"{where}--config.method.leave='{leave}' --config.batch_size={rows}. "
    )

  def _due(self, step: int) -> bool:
    c = self.c
    return step == c.steps or any(
      every and step % every == 0
      for every in (c.evaluation.every, c.checkpoint.every)
    )

  def _pause(self, step: int, stopping: bool) -> None:
    """Evaluates and saves where it is time to."""
    last = step == self.c.steps
    if last and self.run.drain is not None:
      self.state = self.run.drain(self.state, self.x.key)
    loss = None
    if last or _is_time(step, self.c.evaluation.every):
      split = self.c.evaluation.split
      loss = self._evaluate(step, split)["loss"]
      self._refuse(step, {f"{split}_loss": loss})
    if last or stopping or _is_time(step, self.c.checkpoint.every):
      self.checkpoints.save(step, self.run, self.state, self.batches, loss)
      self.saved = step
    if stopping and not last:
      self.checkpoints.wait()
      self.progress.say(f"stopped after step {step}, which is saved")
      raise Interrupted(step)

  def _evaluate(self, step: int, split: str):
    means = self.x.evaluate(self.run.params(self.state), split)
    if split == "test" and self.x.evaluate_members:
      means = {**means, **self.x.evaluate_members(self.state, split)}
    values = {f"{split}_{name}": value for name, value in means.items()}
    self.writer.write(step, values)
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    self.progress.say(f"step {step}  {numbers}")
    if time.monotonic() - self.drawn > DRAW_EVERY:
      self.draw()
    return means

  def _finish(self) -> dict[str, float]:
    """The test split's numbers; those of a run that had finished are read."""
    for line in read_metrics(self.folder):
      if "test_loss" in line and line["step"] == self.c.steps:
        return {k: v for k, v in line.items() if k != "step"}
    means = self._evaluate(self.c.steps, "test")
    return {f"test_{name}": value for name, value in means.items()}

  def _writer(self) -> MetricsWriter:
    c = self.c
    text = c.to_json_best_effort(indent=2, sort_keys=True)
    (self.folder / "config.json").write_text(text + "\n")
    return MetricsWriter(
      self.folder,
      resume_at=self.start,
      tensorboard=c.log.tensorboard,
      wandb=c.log.wandb,
      config=json.loads(text),
    )


def _bad_steps(state: Any) -> int:
  return int(state.bad) if isinstance(state, GuardState) else 0


def _is_time(step: int, every: int) -> bool:
  return bool(every) and step % every == 0
