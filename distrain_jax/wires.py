"""How a worker's pieces of the parameters travel to the others.

Both kinds have `encode(layout, pieces, parts) -> {name: (R, C)}`, buffers whose
rows `parts` divides unless they are few, and `decode(layout, {name: (N, R, C)})
-> tree`, for what all workers' buffers have become.

Letters in shapes: N workers, R rows of a buffer, C its lanes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distrain_jax.layout import Layout
from distrain_jax.method import Params

INT8_MAX = 127


class Plain(NamedTuple):
  """Cast to a dtype on the way; None: each leaf's own."""

  dtype: Any = None

  def encode(self, layout: Layout, pieces: Params, parts: int):
    return _pack(layout, pieces, self._dtypes(layout), parts)

  def decode(self, layout: Layout, buffers) -> Params:
    tree = layout.as_tree(layout.unpack(buffers, self._dtypes(layout)))
    return jax.tree.map(lambda x, d: x.astype(d), tree, _leaf_dtypes(layout))

  def _dtypes(self, layout: Layout) -> list[Any]:
    return [self.dtype or dtype for dtype in layout.dtypes]


class Quantised(NamedTuple):
  """The difference from what all workers hold already, in 8 bits.

  Each row of C lanes has a scale of its own, its largest magnitude over 127,
  so an element is off by at most 1/254 of its row's largest difference. What
  is too small to be cut into rows travels in float32.
  """

  base: Params  # whole, equal on all workers
  axis: str

  def encode(self, layout: Layout, pieces: Params, parts: int):
    here = layout.pieces(self.base, jax.lax.axis_index(self.axis))
    differences = jax.tree.map(lambda x, y: x - y, pieces, here)
    wide = [jnp.float32] * len(layout.leaves)
    found = {}
    for name, x in _pack(layout, differences, wide, parts).items():
      if x.shape[0] == 1:
        found[name] = x
        continue
      scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / INT8_MAX  # (R, 1)
      steps = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
      found[name + "/steps"] = steps.astype(jnp.int8)
      found[name + "/scale"] = scale
    return found

  def decode(self, layout: Layout, buffers) -> Params:
    names = {name.removesuffix("/steps") for name in buffers}
    names = sorted(name for name in names if not name.endswith("/scale"))
    wide = [jnp.float32] * len(layout.leaves)
    values = {name: _value(buffers, name) for name in names}
    differences = layout.as_tree(layout.unpack(values, wide))
    add = lambda base, x: (base.astype(jnp.float32) + x).astype(base.dtype)
    return jax.tree.map(add, self.base, differences)


def _value(buffers, name: str) -> jax.Array:
  if name in buffers:
    return buffers[name]
  steps = buffers[name + "/steps"].astype(jnp.float32)
  return steps * buffers[name + "/scale"]


def _pack(layout: Layout, pieces: Params, dtypes, parts: int):
  flat = zip(jax.tree.leaves(pieces), dtypes)
  rows = [x.reshape(1, -1).astype(dtype) for x, dtype in flat]
  return {k: x[0] for k, x in layout.pack(rows, parts).items()}


def _leaf_dtypes(layout: Layout) -> Any:
  return layout.treedef.unflatten(layout.dtypes)
