"""Where an iterator is in its data, as Orbax saves it."""

import json
from collections.abc import Awaitable
from typing import Any

import jax


class Position:
  """Lends Orbax's save and load to an iterator with get_state and set_state.

  Each process saves its own: a run of several goes on in as many.
  """

  def __init__(self, batches: Any):
    """Raises: TypeError, if the iterator has no such methods."""
    for method in ("get_state", "set_state"):
      if not callable(getattr(batches, method, None)):
        raise TypeError(
          f"Experiment.batches gave a {type(batches).__name__} without "
          f"{method}: a resumed run could not go on where it was. Return an "
          "iterator with get_state() -> JSON values and set_state(state)."
        )
    self._batches = batches
    me, n = jax.process_index(), jax.process_count()
    self._name = f"process_{me}-of-{n}.json"

  async def save(self, directory: Any) -> Awaitable[None]:
    text = json.dumps(self._batches.get_state())  # before the next batch

    async def write():
      ((await directory.await_creation()) / self._name).write_text(text)

    return write()

  async def load(self, directory: Any) -> Awaitable[None]:
    async def read():
      state = json.loads((directory / self._name).read_text())
      self._batches.set_state(state)

    return read()


def saveable(batches: Any) -> Any:
  """The iterator itself if it knows Orbax, as Grain's do."""
  known = hasattr(batches, "save") and hasattr(batches, "load")
  return batches if known else Position(batches)
