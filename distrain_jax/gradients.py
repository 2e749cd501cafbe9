"""A worker's own gradient: accumulated over micro-batches, before it speaks.

The gradient of the local loss is taken first and reduced afterwards:
differentiating through a psum would scale it by the number of workers.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from distrain_jax.method import (
  Batch,
  LossFn,
  Metrics,
  Params,
  StatefulLoss,
)
from distrain_jax.whole import is_whole


class Gradient(NamedTuple):
  """Of one worker, as means over its rows."""

  loss: jax.Array  # ()
  aux: Metrics
  grads: Params  # shapes and dtypes of the parameters
  model_state: Any  # () for a loss without it


def check_accumulate(name: str, accumulate: int) -> None:
  if not is_whole(accumulate, 1):
    raise ValueError(
      f"{name}: `accumulate` is the number of micro-batches that each "
      f"worker's share is cut into, at least 1; got {accumulate!r}."
    )


def microbatches(batch: Batch, k: int) -> Batch:
  """(rows, ...) -> (k, rows/k, ...) on every leaf.

  Raises:
    ValueError: if some leaf's rows are not a multiple of k.
  """

  def one(path, x):
    if x.ndim and x.shape[0] % k == 0:
      return x.reshape(k, x.shape[0] // k, *x.shape[1:])
    raise ValueError(
      f"batch{jax.tree_util.keystr(path)} has shape {x.shape} on each worker, "
      f"which accumulate={k} cannot cut into equal micro-batches. Make the "
      f"global batch a multiple of workers x {k}, or change accumulate."
    )

  return jax.tree_util.tree_map_with_path(one, batch)


def gradient_fn(
  loss_fn: LossFn | StatefulLoss, accumulate: int = 1
) -> Callable[[Params, Any, Batch, jax.Array], Gradient]:
  """`(params, model_state, batch, key) -> Gradient` of this worker alone.

  The share is cut into `accumulate` micro-batches which run one after the
  other: model_state passes through them, micro-batch i gets fold_in(key, i),
  and gradients are summed in their own dtype, then divided once.
  """
  one = microbatch_fn(loss_fn)

  def many(params, model_state, batch, key) -> Gradient:
    micro = microbatches(batch, accumulate)

    def add_next(sums: Gradient, i):
      return add_microbatch(one, sums, params, micro, i, key), None

    sums = zeros(one, params, model_state, micro, key)
    total, _ = jax.lax.scan(add_next, sums, jnp.arange(accumulate))
    means = jax.tree.map(lambda x: x / accumulate, total[:3])
    return Gradient(*means, total.model_state)

  return one if accumulate == 1 else many


def microbatch_fn(
  loss_fn: LossFn | StatefulLoss,
) -> Callable[[Params, Any, Batch, jax.Array], Gradient]:
  """`(params, model_state, micro-batch, key) -> Gradient`."""

  def with_state(params, model_state, batch, key):
    if isinstance(loss_fn, StatefulLoss):
      out = loss_fn.fn(params, model_state, batch, key)
      loss, second = _pair(out, "(loss, (aux, model_state))")
      aux, model_state = _pair(second, "(loss, (aux, model_state))")
    else:
      loss, aux = _pair(loss_fn(params, batch, key), "(loss, aux)")
    _check_loss(loss, aux)
    return loss, (aux, model_state)

  value_and_grad = jax.value_and_grad(with_state, has_aux=True)

  def one(params, model_state, batch, key) -> Gradient:
    (loss, (aux, model_state)), grads = value_and_grad(
      params, model_state, batch, key
    )
    return Gradient(loss, aux, grads, model_state)

  return one


def zeros(
  one, params, model_state, micro: Batch, key: jax.Array, after=None
) -> Gradient:
  """No micro-batch yet: sums of 0 (see `late_zeros`), and the model_state."""
  first = jax.tree.map(lambda x: x[0], micro)
  shapes = jax.eval_shape(one, params, model_state, first, key)
  return Gradient(*late_zeros(shapes[:3], after), model_state)


def late_zeros(shapes: Any, after: jax.Array | None) -> Any:
  """Zeros that XLA cannot make before `after` is known.

  It makes plain ones whenever it likes, which is at the start of a step: the
  sums of two loops that run one after the other would both live all the time.

  Args:
    shapes: a tree of arrays or ShapeDtypeStructs.
    after: a floating scalar, of whatever value; None: plain zeros.
  """
  zero = 0.0
  if after is not None:
    # True for every number and NaN, which XLA does not work out.
    zero = jnp.where(~(after < -jnp.inf), 0.0, 1.0)
  return jax.tree.map(lambda x: jnp.full(x.shape, zero, x.dtype), shapes)


def add_microbatch(
  one, sums: Gradient, params, micro: Batch, i: jax.Array, key: jax.Array
) -> Gradient:
  """The sums with micro-batch i; micro leaves are (k, rows, ...)."""
  at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
  now = jax.tree.map(at, micro)
  g = one(params, sums.model_state, now, jax.random.fold_in(key, i))
  return Gradient(*jax.tree.map(jnp.add, sums[:3], g[:3]), g.model_state)


def _pair(out, form: str):
  if isinstance(out, tuple) and len(out) == 2:
    return out
  raise TypeError(
    f"loss_fn must return {form}; it returned {type(out).__name__}. Without "
    "metrics of its own, aux is {}."
  )


def _check_loss(loss, aux) -> None:
  if jnp.shape(loss) != ():
    raise ValueError(
      f"loss_fn must return a scalar loss, the mean over the batch's rows; got "
      f"shape {jnp.shape(loss)}. Add .mean()."
    )
  if not isinstance(aux, dict) or any(map(jnp.ndim, jax.tree.leaves(aux))):
    raise TypeError(
      "loss_fn's aux must be a dict of scalars, which are averaged over the "
      f"workers; got {jax.tree.map(jnp.shape, aux)}."
    )


def clip_scale(norm: jax.Array, clip_norm: float | None) -> jax.Array:
  """What multiplies a gradient of that global norm: min(1, clip_norm/norm)."""
  if clip_norm is None:
    return jnp.ones_like(norm)
  return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))


def scale_tree(tree: Params, scale: jax.Array) -> Params:
  """Each leaf times a scalar, in the leaf's dtype."""
  return jax.tree.map(lambda x: (x * scale).astype(x.dtype), tree)


def squared_norm(tree: Params) -> jax.Array:
  """Sum of squares in float32: (), over all leaves."""
  squares = [
    jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)
  ]
  return sum(squares, start=jnp.zeros((), jnp.float32))


def check_clip_norm(name: str, clip_norm: float | None) -> None:
  if clip_norm is None:
    return
  if not isinstance(clip_norm, Real) or not clip_norm > 0:
    raise ValueError(
      f"{name}: `clip_norm` is the largest global norm of a gradient, above "
      f"0, or None for no clipping; got {clip_norm!r}."
    )


def check_dtype(name: str, field: str, dtype: DTypeLike | None) -> None:
  try:
    floating = dtype is None or jnp.issubdtype(dtype, jnp.floating)
  except TypeError:  # no dtype at all, such as a misspelt name
    floating = False
  if not floating:
    raise ValueError(
      f"{name}: `{field}` is a floating dtype such as 'bfloat16', or None; "
      f"got {dtype!r}."
    )


def at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast(tree: Params, dtype: DTypeLike) -> Params:
  return jax.tree.map(lambda x: x.astype(dtype), tree)
