"""Where a run's numbers go: metrics.jsonl always, other places when asked."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"


class MetricsWriter:
  """Writes one JSON object a line, with `step`, to a run's folder.

  Evaluations are lines too: their names start with the split's, as in
  "validation_loss".
  """

  def __init__(
    self,
    folder: Path,
    *,
    resume_at: int = 0,
    tensorboard: bool = False,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the file, without the lines after `resume_at`.

    Steps after the last checkpoint are taken again, and their lines written
    again: a resumed run's file equals an uninterrupted one's.

    Args:
      folder: of the run.
      resume_at: the step that the run goes on from.
      tensorboard: whether to write TensorBoard events beside it.
      wandb: a Weights & Biases project, or "".
      config: shown there.

    Raises:
      ImportError: with the pip command, if a package is missing.
    """
    check_packages(tensorboard, wandb)
    path = Path(folder) / NAME
    lines = [x for x in read_metrics(folder) if x["step"] <= resume_at]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(x) + "\n" for x in lines))
    part.replace(path)
    self._file = path.open("a")
    self._others: list[Any] = []
    if tensorboard:
      self._others.append(_TensorBoard(folder))
    if wandb:
      self._others.append(_Wandb(folder, wandb, config or {}))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    for other in self._others:
      other.close()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line: {"step": step, **values}, on disk when this returns."""
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for other in self._others:
      other.write(step, values)


class NoMetrics:
  """What processes other than the first one write."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def write(self, step: int, values: Mapping[str, float]) -> None:
    pass


def read_metrics(folder: Path) -> list[dict[str, Any]]:
  """The lines of a run; a last line that was cut short is left out."""
  path = Path(folder) / NAME
  if not path.exists():
    return []
  lines = path.read_text().split("\n")[:-1]  # a whole line ends in a newline
  return [json.loads(line) for line in lines]


def check_packages(tensorboard: bool, wandb: str) -> None:
  """For the start of a run, so that it fails before anything compiles.

  Raises:
    ImportError: with the pip command, if a package is missing.
  """
  for wanted, module, field in (
    (tensorboard, "tensorboardX", "tensorboard"),
    (wandb, "wandb", "wandb"),
  ):
    try:
      if wanted:
        importlib.import_module(module)
    except ImportError as e:
      raise ImportError(
        f"config.log.{field} needs the package {module}: "
        f"pip install 'distrain-jax[{field}]'"
      ) from e


class _TensorBoard:
  def __init__(self, folder: Path):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(str(folder))

  def write(self, step, values):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def close(self):
    self._writer.close()


class _Wandb:
  def __init__(self, folder: Path, project: str, config):
    import wandb

    # The folder's name identifies the run, so that a resumed one goes on.
    name = Path(folder).resolve().name
    self._run = wandb.init(
      project=project, dir=str(folder), id=name, resume="allow", config=config
    )

  def write(self, step, values):
    self._run.log(dict(values), step=step)

  def close(self):
    self._run.finish()
