"""Bytes that a worker sends in a step, and bytes of state that it holds.

Bytes sent are counted in the traced program, before XLA: what the method asks
for, with the formulas of ring algorithms (Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations", 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002).

Letters: N workers along the axis, x the bytes of a collective's operand.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from distrain_jax.runners import Run

# Followed through a program are arrays of up to so many integers or keys, and
# single floats: a step, a table of what is due, a chance that is drawn.
FEW = 4096


class Lazy:
  """Computed when a conditional asks for it, which for most never happens."""

  def __init__(self, shape: tuple[int, ...], compute: Callable[[], Any]):
    self.shape = shape
    self._compute = compute

  @functools.cached_property
  def now(self) -> Any:
    """As an array."""
    return self._compute()


Known = list[Lazy | None]  # None where a value is not known
# A program's id -> what it sends where nothing is known. The programs live as
# long as the traced step.
Cache = dict[int, tuple[dict[str, float], Known]]

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


def bytes_sent(
  run: Run, state: Any, batch: Any, key: Any, *, steps: int = 1
) -> dict[str, float]:
  """Bytes that one worker sends in a step, by kind of collective.

  Args:
    run: made by `distribute`; a simulated one has no collectives left.
    state, batch, key: as for `run.step`, or their ShapeDtypeStructs.
    steps: averages over so many, from the state's on: methods that exchange
      every so many steps send most of their bytes then.

  Returns:
    {"psum": bytes, ...}; the loop trips of scans are counted. Of a conditional
    that branch counts which the integers of the state, such as its step, and
    the key lead to. Where that is not known, as in a state of ShapeDtypeStructs
    or inside a loop, it is the dearest one.

  Raises:
    ValueError: for a simulated run; for a collective in a while loop whose
      number of trips the program does not say; for steps below 1, or above it
      without a state whose integers are known.
  """
  if run.simulated:
    raise ValueError(
      "bytes_sent: this run is simulated on one device, where nothing is sent. "
      "Pass one from distribute(method, mesh)."
    )
  known: Known = [_followed(x) for x in jax.tree.leaves(state)]
  if steps < 1 or (steps > 1 and all(x is None for x in known)):
    raise ValueError(
      f"bytes_sent: steps={steps} is at least 1, and for more than one the state "
      "is that of run.init or run.step, whose step is known; got "
      f"{'one' if steps < 1 else 'shapes'}."
    )
  closed = run.step.trace(state, batch, key).jaxpr
  rest = [None] * len(jax.tree.leaves(batch)) + [_followed(key)]
  total: dict[str, float] = {}
  cache: Cache = {}
  for _ in range(steps):
    counts, out = _walk(
      closed.jaxpr, closed.consts, known + rest, run.workers, cache
    )
    # Now, or each step would hold on to all before it.
    known = [x and _value(x.now) for x in out[: len(known)]]
    _add(total, counts)
  return {name: value / steps for name, value in total.items()}


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


def _walk(
  jaxpr, consts, known: Known, workers: int, cache: Cache
) -> tuple[dict[str, float], Known]:
  """Bytes that a program sends, and those of its results that are known.

  Args:
    jaxpr, consts: the program.
    known: its arguments' values, None where they are not known.
    workers: N.
    cache: of programs of which no argument or constant is known.
  """
  values = dict(zip(jaxpr.constvars, map(_followed, consts), strict=True))
  blind = all(x is None for x in [*known, *values.values()])
  if blind and id(jaxpr) in cache:
    return cache[id(jaxpr)]
  total: dict[str, float] = {}
  values.update(zip(jaxpr.invars, known, strict=True))

  def read(v):
    if isinstance(v, jax.extend.core.Literal):
      return _followed(np.asarray(v.val, v.aval.dtype))
    return values.get(v)

  for eqn in jaxpr.eqns:
    given = [read(v) for v in eqn.invars]
    counts, outs = _equation(eqn, given, workers, cache)
    _add(total, counts)
    values.update(zip(eqn.outvars, outs))
  found = total, [read(v) for v in jaxpr.outvars]
  if blind:
    cache[id(jaxpr)] = found
  return found


def _equation(
  eqn, given: Known, workers: int, cache: Cache
) -> tuple[dict, Known]:
  """As `_walk`, of one equation."""
  name, unknown = eqn.primitive.name, [None] * len(eqn.outvars)
  if name in RING:
    sizes = [v.aval.size * _itemsize(v.aval.dtype) for v in eqn.invars]
    return {name: RING[name](sum(sizes), workers)}, unknown
  inner = list(_jaxprs_in(eqn.params))
  if not inner:
    return {}, _folded(eqn, given)
  platforms = eqn.params.get("branches_platforms")
  if platforms and None in platforms:
    # Forms for some platforms send what the one for all others does.
    given = [_value(np.asarray(platforms.index(None))), *given[1:]]
  if name == "cond" and given[0] is not None:
    inner, given = [inner[int(given[0].now)]], given[1:]
    name = "taken"
  run = [
    _walk(j, c, _fitting(name, j, given), workers, cache) for j, c in inner
  ]
  counts = [c for c, _ in run]
  if name == "cond":
    return max(counts, key=lambda c: sum(c.values())), unknown
  if name == "while" and any(counts):
    raise ValueError(
      "bytes_sent: a while loop holds a collective, and how often it runs is "
      "not known. Use a scan or a fori_loop with constant bounds."
    )
  trips = eqn.params["length"] if name == "scan" else 1
  total: dict[str, float] = {}
  for c in counts:
    _add(total, {k: v * trips for k, v in c.items()})
  if len(run) > 1 or name in ("scan", "while"):
    return total, unknown
  outs = run[0][1]
  return total, outs if len(outs) == len(unknown) else unknown


def _fitting(name: str, jaxpr, given: Known) -> Known:
  """What an inner program's arguments are known to be; in loops, nothing is."""
  none = [None] * len(jaxpr.invars)
  if name in ("scan", "while", "cond") or len(given) != len(none):
    return none
  # A worker sees a part of what differs by worker.
  fits = lambda v, x: x is not None and x.shape == v.aval.shape
  return [x if fits(v, x) else None for v, x in zip(jaxpr.invars, given)]


def _folded(eqn, given: Known) -> Known:
  """The results of an equation on known values, if they too are followed."""
  ready = given and all(x is not None for x in given)
  plain = not eqn.effects and "axis_name" not in eqn.params
  if not (ready and plain and all(_is_small(v.aval) for v in eqn.outvars)):
    return [None] * len(eqn.outvars)

  @functools.cache
  def results() -> list[Any]:
    out = eqn.primitive.bind(*(x.now for x in given), **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]

  return [
    Lazy(v.aval.shape, lambda i=i: results()[i])
    for i, v in enumerate(eqn.outvars)
  ]


def _followed(x: Any) -> Lazy | None:
  """What is followed; None for anything else."""
  known = isinstance(x, np.ndarray) or (
    isinstance(x, jax.Array) and x.is_fully_replicated
  )
  return _value(x) if known and _is_small(x) else None


def _value(x: Any) -> Lazy:
  return Lazy(x.shape, lambda: _here(x))


def _here(x: Any) -> Any:
  """On this process's own device, whatever mesh it came from."""
  if not _is_key(x.dtype):
    return np.asarray(x)
  bits = np.asarray(jax.random.key_data(x))
  return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))


def _is_small(x) -> bool:
  kinds = (jnp.integer, jnp.bool_)
  whole = _is_key(x.dtype) or any(jnp.issubdtype(x.dtype, k) for k in kinds)
  return x.size <= FEW if whole else x.ndim == 0


def _is_key(dtype) -> bool:
  return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _jaxprs_in(params):
  """The programs in an equation's parameters, each with its constants."""
  for value in params.values():
    for item in value if isinstance(value, (list, tuple)) else [value]:
      consts = getattr(item, "consts", ())
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item, consts


def _add(total, more):
  for name, value in more.items():
    total[name] = total.get(name, 0.0) + value


def _itemsize(dtype) -> int:
  if _is_key(dtype):
    return (
      jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype)).size
      * 4
    )
  return np.dtype(dtype).itemsize
