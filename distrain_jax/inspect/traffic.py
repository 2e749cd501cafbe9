"""Bytes that a worker sends in a step, and bytes of state that it holds.

Bytes sent are counted in the traced program, before XLA: what the method asks
for, with the formulas of ring algorithms (Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations", 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002).

Letters: N workers along the axis, x the bytes of a collective's operand.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from distrain_jax.runners import Run

# Primitive -> (x, N) -> bytes that one worker sends.
RING: dict[str, Callable[[int, int], float]] = {
  "psum": lambda x, n: 2 * x * (n - 1) / n,
  "psum_invariant": lambda x, n: 2 * x * (n - 1) / n,
  "pmax": lambda x, n: 2 * x * (n - 1) / n,
  "pmin": lambda x, n: 2 * x * (n - 1) / n,
  "reduce_scatter": lambda x, n: x * (n - 1) / n,
  "all_gather": lambda x, n: x * (n - 1),
  "all_to_all": lambda x, n: x * (n - 1) / n,
  "ppermute": lambda x, n: x,
}


def bytes_sent(run: Run, state: Any, batch: Any, key: Any) -> dict[str, float]:
  """Bytes that one worker sends in one step, by kind of collective.

  Args:
    run: made by `distribute`; a simulated one has no collectives left.
    state, batch, key: as for `run.step`, or their ShapeDtypeStructs.

  Returns:
    {"psum": bytes, ...}; the loop trips of scans are counted, of the branches
    of a conditional the dearest one.

  Raises:
    ValueError: for a simulated run, or a collective in a while loop whose
      number of trips the program does not say.
  """
  if run.mesh is None:
    raise ValueError(
      "bytes_sent: this run is simulated on one device, where nothing is sent. "
      "Pass one from distribute(method, mesh)."
    )
  jaxpr = run.step.trace(state, batch, key).jaxpr.jaxpr
  return _count(jaxpr, run.workers)


def bytes_held(state: Any) -> int:
  """Bytes of a state on its fullest device.

  Args:
    state: of a `Run`, as arrays or as `run.abstract` gives it. Under `simulate`
      one device holds all workers.
  """
  held: dict[Any, int] = {}
  for x in jax.tree.leaves(state):
    shape = x.sharding.shard_shape(x.shape)
    size = int(np.prod(shape)) * _itemsize(x.dtype)
    for device in x.sharding.device_set:
      held[device] = held.get(device, 0) + size
  return max(held.values(), default=0)


def _count(jaxpr, workers: int) -> dict[str, float]:
  total: dict[str, float] = {}
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name in RING:
      sizes = [v.aval.size * _itemsize(v.aval.dtype) for v in eqn.invars]
      _add(total, {name: RING[name](sum(sizes), workers)})
      continue
    inner = [_count(j, workers) for j in _jaxprs_in(eqn.params)]
    if name == "cond":
      inner = [max(inner, key=lambda c: sum(c.values()))]
    if name == "while" and any(inner):
      raise ValueError(
        "bytes_sent: a while loop holds a collective, and how often it runs is "
        "not known. Use a scan or a fori_loop with constant bounds."
      )
    trips = eqn.params["length"] if name == "scan" else 1
    for counts in inner:
      _add(total, {k: v * trips for k, v in counts.items()})
  return total


def _jaxprs_in(params):
  for value in params.values():
    for item in value if isinstance(value, (list, tuple)) else [value]:
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def _add(total, more):
  for name, value in more.items():
    total[name] = total.get(name, 0.0) + value


def _itemsize(dtype) -> int:
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return (
      jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype)).size
      * 4
    )
  return np.dtype(dtype).itemsize
