"""What a person sees while a run goes: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
  """Steps done, the latest numbers and the pace; a context manager."""

  def __init__(self, start: int, steps: int, label: str, *, show: bool = True):
    """Args: the step that the run goes on from, its last one, and its name."""
    self._steps, self._label, self._show = steps, label, show
    self._terminal = show and sys.stderr.isatty()
    self._bar = tqdm(
      total=steps,
      initial=start,
      desc=label,
      unit="step",
      disable=not self._terminal,
      dynamic_ncols=True,
    )
    self._began, self._first = time.monotonic(), start
    self._said = -LINE_EVERY

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()

  def update(self, step: int, values: Mapping[str, float]) -> None:
    """One more step is done; values are shown as they come."""
    shown = {
      k: f"{values[k]:.4g}" for k in ("loss", "grad_norm") if k in values
    }
    if self._terminal:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(1)
      return
    now = time.monotonic()
    if now - self._said >= LINE_EVERY or step == self._steps:
      self._said = now
      pace = (step - self._first) / max(now - self._began, 1e-9)
      numbers = "  ".join(f"{k} {v}" for k, v in shown.items())
      self.say(f"step {step}/{self._steps}  {numbers}  {pace:.3g} steps/s")

  def say(self, text: str) -> None:
    """A line that stays."""
    if self._show:
      tqdm.write(f"{self._label}: {text}", file=sys.stderr)
