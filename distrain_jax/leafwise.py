"""Does an optimizer treat each leaf by itself? Then it can be sharded by leaf.

A clipping by the global norm, a decision on all gradients or noise that is
drawn leaf after leaf would silently be of one worker's leaves. They are found
by looking: what an optimizer computes for a leaf among the others is, written
out, the same program on the same inputs as for that leaf alone. Nothing is run,
and shapes are the real ones.

That it also treats the layers of a leaf by themselves is tried on numbers, at
small sizes; at the real ones its state must have the layers on an axis.
"""

import functools
import hashlib
import re
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax

from distrain_jax.method import Params

# Their programs are read as if they were written where they are called.
CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call")
# Sizes of the gradients of three layers in each step of the trial: thresholds
# are passed, by one or by all, at first and after calm; then some are broken.
SIZES = (
  (1.0, 1.0, 1.0),
  (1e-4, 1e-4, 1e-4),
  (1.0, 1e-4, 1e4),
  (1e4, 1.0, 1e-4),
  (1e4, 1e4, 1e4),
  (np.inf, 1.0, 1.0),
  (1.0, 1.0, np.nan),
)
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def check_leafwise(
  name: str,
  tx: optax.GradientTransformation,
  params: Params,
  stacked: tuple[bool, ...],
) -> None:
  """Refuses an optimizer whose update of a leaf depends on other leaves.

  Args:
    name: of the method, for the message.
    tx: the optimizer.
    params: arrays or tracers; only structure, shapes and dtypes are used.
    stacked: of each leaf, whether its first axis is one of layers which may be
      on different workers.

  Raises:
    ValueError: saying where it differs and what to do instead.
  """
  leaves, treedef = jax.tree.flatten(params)
  shapes = tuple((np.shape(x), x.dtype) for x in leaves)
  _check(name, tx, treedef, shapes, stacked)


@functools.lru_cache(maxsize=16)  # a method's init is traced more than once
def _check(name, tx, treedef, shapes, stacked) -> None:
  leaves = [jax.ShapeDtypeStruct(*x) for x in shapes]
  whole = _programs(tx, treedef.unflatten(leaves))
  for i in range(len(leaves)):
    for path, program in _programs(tx, only(treedef, leaves, {i})).items():
      if whole.get(path) != program:
        raise ValueError(
          f"{name} with shard='leaves' gives whole leaves to the optimizer, "
          f"but what tx computes as {path} is not the same with other leaves "
          f"beside it. Clip with {name}(..., clip_norm=...) instead of "
          f"optax.clip_by_global_norm, take {name}(..., accumulate=...) instead "
          "of optax.MultiSteps; what needs all leaves at once trains with ddp."
        )
  if any(stacked):
    which = {i for i, cut in enumerate(stacked) if cut}
    _check_state(name, tx, treedef, leaves, which)
    _check_layers(name, tx, treedef, leaves, which)


def only(treedef, leaves, which: Any) -> Params:
  """The tree with some of its leaves; `optax.MaskedNode` in other places."""
  return treedef.unflatten(
    x if i in which else optax.MaskedNode() for i, x in enumerate(leaves)
  )


def _programs(tx, params) -> dict[str, str]:
  """What `tx` computes, in words -> the program of it, as a hash."""
  state = jax.eval_shape(tx.init, params)
  starts = _hashes(lambda params: {"state": tx.init(params)}, params=params)

  def update(grads, old, params):
    updates, new = tx.update(grads, old, params)
    return {"updates": updates, "next state": new}

  steps = _hashes(update, grads=params, old=state, params=params)
  return starts | steps


def _hashes(fn, **given) -> dict[str, str]:
  """Path of a result -> hash of its program, inputs by their paths."""
  closed, out = jax.make_jaxpr(lambda x: fn(**x), return_shape=True)(given)
  inputs = [
    _hash("input", jax.tree_util.keystr(path), x.shape, x.dtype)
    for path, x in jax.tree_util.tree_leaves_with_path(given)
  ]
  paths = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(out)
  ]
  return dict(zip(paths, _evaluated(closed, inputs)))


def _evaluated(closed, inputs: list[str]) -> list[str]:
  """The results' hashes."""
  jaxpr, known = closed.jaxpr, {}
  known.update(zip(jaxpr.invars, inputs))
  known.update(zip(jaxpr.constvars, map(_of_value, closed.consts)))

  def read(atom):
    is_literal = isinstance(atom, jex.core.Literal)
    return _of_value(atom.val) if is_literal else known[atom]

  for eqn in jaxpr.eqns:
    operands = list(map(read, eqn.invars))
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.primitive.name in CALLS and isinstance(inner, jex.core.ClosedJaxpr):
      results = _evaluated(inner, operands)
    else:
      one = _hash(eqn.primitive.name, *map(_of_param, eqn.params.items()))
      one = _hash(one, *operands)
      results = [_hash(one, i) for i in range(len(eqn.outvars))]
    known.update(zip(eqn.outvars, results))
  return list(map(read, jaxpr.outvars))


def _of_param(item) -> str:
  key, value = item
  consts = value.consts if isinstance(value, jex.core.ClosedJaxpr) else ()
  text = ADDRESS.sub("", str(value))
  return _hash(key, text, *map(_of_value, consts))


def _of_value(x) -> str:
  if isinstance(x, jax.core.Tracer):
    return _hash("tracer", id(x))
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return _hash(x.dtype, _of_value(jax.random.key_data(x)))
  x = np.asarray(x)
  return _hash(x.shape, x.dtype, x.tobytes())


def _hash(*parts: Any) -> str:
  return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _check_state(name, tx, treedef, leaves, which) -> None:
  """Refuses a state that other numbers of layers change on more than an axis.

  What factors leaves by their sizes may take layers for rows or columns.
  """

  def state(count):
    resized = [
      jax.ShapeDtypeStruct((count(x.shape[0]), *x.shape[1:]), x.dtype)
      if i in which
      else x
      for i, x in enumerate(leaves)
    ]
    found = jax.eval_shape(tx.init, treedef.unflatten(resized))
    return {
      jax.tree_util.keystr(path): x.shape
      for path, x in jax.tree_util.tree_leaves_with_path(found)
    }

  usual = state(lambda n: n)
  for count in (lambda n: 1, lambda n: n + 1):
    other = state(count)
    for path in usual.keys() | other.keys():
      a, b = usual.get(path), other.get(path)
      alike = a is not None and b is not None and len(a) == len(b)
      if not alike or sum(map(int.__ne__, a, b)) > 1:
        raise _of_layers(name, f"those of its state{path}")


def _check_layers(name, tx, treedef, leaves, which) -> None:
  """As `check_leafwise`, of layers: small random ones, together and alone."""
  rng = np.random.default_rng(0)

  def small(x, sizes):
    rest = (3,) * (len(x.shape) - 2) + (2,) * (len(x.shape) > 1)
    sizes = np.reshape(sizes, (3,) + (1,) * len(rest))
    return jnp.asarray(sizes * rng.normal(size=(3, *rest)), x.dtype)

  def tree(sizes):
    return only(treedef, [small(x, sizes) for x in leaves], which)

  def tried(params, grads):
    state, found = tx.init(params), []
    for g in grads:
      updates, state = update(g, state, params)
      found.append(updates)
    return found

  update = jax.jit(tx.update)
  with (
    jax.ensure_compile_time_eval(),
    jax.debug_nans(False),
    jax.debug_infs(False),
  ):
    given = tree(SIZES[0]), list(map(tree, SIZES))
    whole = tried(*given)
    for i in range(3):
      cut = lambda tree, i=i: jax.tree.map(lambda x: x[i : i + 1], tree)
      _compare(name, tried(*cut(given)), cut(whole))


def _compare(name: str, alone, among) -> None:
  """Refuses updates of a layer, step by step, that others beside it change."""
  for a_step, b_step in zip(alone, among):
    pairs = jax.tree_util.tree_leaves_with_path(a_step)
    for (path, a), b in zip(pairs, jax.tree.leaves(b_step)):
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      size = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
      if not np.allclose(a, b, rtol=1e-2, atol=1e-5 * size, equal_nan=True):
        where = jax.tree_util.keystr(path)
        raise _of_layers(name, f"those of params{where}")


def _of_layers(name: str, what: str) -> ValueError:
  return ValueError(
    f"{name} with shard='leaves' and stacked= gives layers of one leaf to "
    f"different workers, but tx has {what} together. Pass stacked=0, for whole "
    "leaves only, or tell tx about the layers (mulo: mup=mup_info(params, "
    "names=...) or stacked=)."
  )
