"""The profiler's window: a few steps of a run, as a trace in its folder."""

from pathlib import Path
from typing import Any

import jax


class Profile:
  """Traces some steps; a context manager, which ends a window left open.

  A window that began before the step that a run goes on from is left out.
  """

  def __init__(self, folder: Path, start: int, steps: int):
    """Args: where to; the first step, from 1, or 0 for none; how many."""
    self.folder, self._start, self._end = folder, start, start + steps
    self._open = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._open:
      jax.profiler.stop_trace()

  def before(self, step: int, state: Any) -> bool:
    """Called before each step; whether the trace was just written.

    Args:
      step: about to be taken.
      state: what the last one gave, to wait for at the window's end.
    """
    if step == self._start:
      jax.profiler.start_trace(str(self.folder))
      self._open = True
    if not self._open or step != self._end:
      return False
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    self._open = False
    return True
