"""SIGTERM and SIGINT: finish the step, save, and leave with a code of its own."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd

# EX_TEMPFAIL: nothing is wrong, start the same command again to go on.
EXIT_CODE = 75


class Interrupted(Exception):
  """The run was asked to stop, and its state is saved."""

  def __init__(self, step: int):
    super().__init__(f"stopped after step {step}; its state is saved")
    self.step = step


class StopSignal:
  """A context in which SIGTERM and SIGINT are noted instead of obeyed.

  A second SIGINT is obeyed at once, for the user who will not wait.
  """

  def __init__(self):
    self.seen = False
    self._before = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      try:
        self._before[number] = signal.signal(number, self._note)
      except ValueError:  # not the main thread, e.g. in a notebook's worker
        break
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      # None: it was not set from Python, and cannot be set again.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _note(self, number, frame):
    del frame
    if self.seen and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.seen = True


class Agreement:
  """Whether any process wants to stop: the same answer in all, at one step.

  Signals reach processes at different moments, and one that stops alone would
  leave the others waiting in a collective. With several processes the answer
  is that of the step before, so that nobody waits for it.
  """

  def __init__(self, mesh: Mesh | None):
    """Args: the run's mesh; None if all its workers are on one device."""
    self._asked = None
    self._votes = None
    if mesh is None or not spmd.spans_processes(mesh):
      return
    # Every device votes: XLA for CPU keeps programs in order only if they are
    # on the same devices, and gloo mixes up collectives that overlap.
    devices = Mesh(mesh.devices.ravel(), ("device",))
    self._votes = NamedSharding(devices, P("device"))
    everywhere = NamedSharding(devices, P())
    self._any = jax.jit(jnp.max, out_shardings=everywhere)
    self._local = len(mesh.local_devices)

  def __call__(self, mine: bool) -> bool:
    """Called once a step by every process, with its own wish."""
    if self._votes is None:
      return mine
    before = self._asked
    votes = jax.make_array_from_process_local_data(
      self._votes, np.full(self._local, mine, np.int32)
    )
    self._asked = self._any(votes)
    return before is not None and bool(before)
