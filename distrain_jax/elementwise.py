"""Does an optimizer treat each element by itself? Then it can be sharded flat.

On a worker's pieces, a norm, a trust ratio, a factored moment or an
orthogonalisation would silently be that of the piece. Such transforms are
found by trying them, not by name, so that a user's own is judged too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distrain_jax.layout import make_layout
from distrain_jax.method import Params

# One gradient far below, one far above any threshold, one ordinary: what
# clips, normalises or adapts by a norm must show. The last one has a NaN: a
# decision on the whole tree's finiteness must not be taken by one worker.
SCALES = (1e-3, 1e6, 1.0, np.nan)


def check_elementwise(
  name: str, tx: optax.GradientTransformation, params: Params
) -> None:
  """Refuses an optimizer whose update of an element depends on others.

  Args:
    name: of the method, for the message.
    tx: the optimizer.
    params: arrays or tracers; only structure, shapes and dtypes are used.

  Raises:
    ValueError: saying which leaf differed and what to do instead.
  """
  leaves, treedef = jax.tree.flatten(params)
  _check(name, tx, treedef, tuple((np.shape(x), x.dtype) for x in leaves))


@functools.lru_cache(maxsize=16)  # a method's init is traced more than once
def _check(name, tx, treedef, leaves) -> None:
  params = treedef.unflatten(jax.ShapeDtypeStruct(*x) for x in leaves)
  shapes = {shape for shape, _ in leaves} | {()}
  # Not under compile-time evaluation, where full-size zeros would be made.
  state = jax.eval_shape(tx.init, params)
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    if x.shape not in shapes:
      raise _refusal(name, f"its state{_at(path)} has shape {x.shape}")
  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    why = _first_difference(tx, params)
  if why is not None:
    raise _refusal(name, why)


def _first_difference(tx, params):
  """What tx does differently on pieces, in words; None: nothing.

  A small random tree of the same structure, cut in two, stands for params.
  """
  rng = np.random.default_rng(0)

  def small(x):
    # The cut is inside a row: else what looks at whole rows would not show.
    shape = (3,) * (x.ndim - 1) + (2 if x.ndim > 1 else 3,) * (x.ndim > 0)
    return jnp.asarray(rng.normal(size=shape), x.dtype)

  whole = jax.tree.map(small, params)
  layout = make_layout(whole, workers=2)
  update, cut = jax.jit(tx.update), jax.jit(layout.pieces)
  pieces = [cut(whole, w) for w in range(2)]
  ones = jax.tree.map(jnp.ones_like, whole)
  real = [cut(ones, w) for w in range(2)]  # 0: padding, whatever tx does to it
  states = [tx.init(whole), *map(tx.init, pieces)]
  for scale in SCALES:
    grads = jax.tree.map(small, whole)
    grads = _spoil(grads) if np.isnan(scale) else _scaled(grads, scale)
    given = [grads, *(cut(grads, w) for w in range(2))]
    done = [update(g, s, p) for g, s, p in zip(given, states, [whole, *pieces])]
    states = [s for _, s in done]
    for w, (updates, state) in enumerate(done[1:]):
      updates = jax.tree.map(_where, real[w], updates)
      path = _unequal(updates, cut(done[0][0], w))
      if path is not None:
        return f"it updates params{_at(path)} differently in pieces"
      # A scalar of the state is one for all workers, as a step count is.
      path = _unequal(_scalars(state, state), _scalars(done[0][1], state))
      if path is not None and not np.isnan(scale):
        return f"its state{_at(path)} differs by piece"
  return None


def _where(real, x):
  return jnp.where(real == 0, jnp.zeros_like(x), x)


def _scalars(state, piece):
  """The leaves of a state that have shape () in that of a piece."""
  key = jax.dtypes.prng_key
  is_one = lambda x: x.ndim == 0 and not jnp.issubdtype(x.dtype, key)
  return jax.tree.map(lambda x, p: x if is_one(p) else None, state, piece)


def _scaled(tree, scale):
  return jax.tree.map(lambda x: (x * scale).astype(x.dtype), tree)


def _spoil(tree):
  """NaN in the last element of every leaf: they are on the second piece."""

  def one(x):
    if x.size == 1:
      return x  # on the first piece
    return x.ravel().at[-1].set(np.nan).reshape(x.shape)

  return jax.tree.map(one, tree)


def _unequal(got, expected):
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected)
  )
  for (path, x), y in pairs:
    x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
    size = np.max(np.abs(y), initial=0.0, where=np.isfinite(y))
    if not np.allclose(x, y, rtol=1e-2, atol=1e-6 * size, equal_nan=True):
      return path
  return None


def _at(path) -> str:
  return jax.tree_util.keystr(path)


def _refusal(name: str, why: str) -> ValueError:
  return ValueError(
    f"{name} shards the optimizer element by element, but tx needs more than "
    f"one element at a time: {why}. Clip with {name}(..., clip_norm=...) "
    "instead of optax.clip_by_global_norm. muLO, Muon, Adafactor, LAMB and the "
    "like need whole matrices: use ddp, zero1(..., shard='leaves'), a pipeline "
    "or a population."
  )
