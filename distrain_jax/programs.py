"""Functions of a state, compiled for where it lies."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import compile_options as options_by_chip
from distrain_jax import spmd


class Program:
  """A function of a state, compiled for where that lies; see `spmd` for why.

  It runs whichever mesh the caller has set. `pins`: (state) -> out_shardings.
  """

  def __init__(self, fn, mesh, axis, pins, **options):
    self._fn, self._pins, self._options = fn, pins, options
    if mesh is None or 1 < mesh.shape[axis] == mesh.size:
      # Other axes are XLA's to choose, and it forgets an axis of one worker:
      # there are neither.
      self._pins = None
    self._jitted = {}  # what pins may depend on -> jitted function

  def __call__(self, state, *args):
    with spmd.no_current_mesh():
      return self._for(state)(state, *args)

  def lower(self, state, *args):
    with spmd.no_current_mesh():
      return self._for(state).lower(state, *args)

  def trace(self, state, *args):
    with spmd.no_current_mesh():
      return self._for(state).trace(state, *args)

  def compilations(self) -> int:
    """How many programs have been compiled by calls so far."""
    return sum(jitted._cache_size() for jitted in self._jitted.values())

  def _for(self, state):
    kind = None
    if self._pins is not None:
      leaves, treedef = jax.tree.flatten(state)
      kind = (treedef, *((jnp.shape(x), sharding(x)) for x in leaves))
    if kind not in self._jitted:
      out = None if self._pins is None else self._pins(state)
      self._jitted[kind] = jax.jit(self._fn, out_shardings=out, **self._options)
    return self._jitted[kind]


class Step:
  """`run.step`: donates and pins the state, and waits where it has to."""

  def __init__(self, fn, mesh, axis, rows, donate, options):
    self._mesh, self._rows = mesh, rows
    # What the caller asked for, so that the step can be made elsewhere too.
    self.donate, self.compiler_options = donate, dict(options or {})
    table = options_by_chip.for_mesh(mesh)
    self._program = Program(
      fn,
      mesh,
      axis,
      lambda state: (jax.tree.map(sharding, state), None),
      donate_argnums=(0,) if donate else (),
      compiler_options={**table, **self.compiler_options} or None,
    )
    self.lower, self.trace = self._program.lower, self._program.trace
    self.compilations = self._program.compilations
    self._many = mesh is not None and spmd.spans_processes(mesh)
    cpu = mesh is not None and mesh.devices.flat[0].platform == "cpu"
    self._one_in_flight = cpu and mesh.size > 1
    self._running = None

  def __call__(self, state, batch, key):
    if self._many:
      key = spmd.to_global(key, self._mesh, P())
      batch = spmd.to_global(batch, self._mesh, self._rows)
    if self._one_in_flight:
      jax.block_until_ready(self._running)
    state, metrics = self._program(state, batch, key)
    self._running = metrics
    return state, metrics


def sharding(x):
  """None for a restored NumPy array: that leaf's place is XLA's to choose."""
  return getattr(x, "sharding", None)


def here() -> SingleDeviceSharding:
  """Where simulated runs lie: this process's first device."""
  return SingleDeviceSharding(jax.local_devices()[0])


def brought(mesh, tree):
  """Arguments that every process passes alike, on the devices of the run."""
  if mesh is not None and spmd.spans_processes(mesh):
    return spmd.to_global(tree, mesh, P())
  place = here() if mesh is None else NamedSharding(mesh, P())

  def one(x):
    elsewhere = isinstance(x, jax.Array) and x.committed
    elsewhere = elsewhere and x.sharding.device_set != place.device_set
    return jax.device_put(x, place) if elsewhere else x

  return jax.tree.map(one, tree)
