"""An optimizer whose state is on the worker that owns the leaf.

Every worker's program is the same: a switch on its number, whose branches show
the optimizer the parameters' own tree, with `optax.MaskedNode` where leaves are
others'. So paths, masks, labels and trees beside the parameters work as always.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distrain_jax.leaf_layout import (
  Buffers,
  LeafLayout,
  by_worker,
  joined,
  make_leaf_layout,
  taken,
)
from distrain_jax.leafwise import check_leafwise
from distrain_jax.method import Params
from distrain_jax.pipelining.packing import Packed, Packing, packing


class LeafShards(NamedTuple):
  """`tx` over a layout; `make_leaf_shards` makes it."""

  tx: optax.GradientTransformation
  layout: LeafLayout
  packing: Packing  # of the workers' states, leaf by leaf
  treedefs: tuple[Any, ...]  # of the workers' states
  dtype: Any  # of the parameters that tx sees; None: the leaves' own

  def init(self, mine: Buffers, worker: jax.Array) -> Packed:
    """This worker's state, packed."""

    def branch(w, mine):
      return self._packed(self.tx.init(self.layout.own(mine, w)), w)

    return self._switch(branch, worker, mine)

  def update(
    self, grads: Buffers, state: Packed, mine: Buffers, worker: jax.Array
  ) -> tuple[Buffers, Packed]:
    """(this worker's parameters, its state) after one step of `tx`."""

    def branch(w, grads, state, mine):
      old, own = self._unpacked(state, w), self.layout.own(mine, w)
      updates, new = self.tx.update(self.layout.own(grads, w), old, own)
      own = optax.apply_updates(own, updates)
      return self.layout.buffers(own, w, self.dtype), self._packed(new, w)

    return self._switch(branch, worker, grads, state, mine)

  def restack(self, stacked: Packed, new: "LeafShards") -> Packed:
    """All workers' states, (N, ...), as those of other workers."""
    every = {}
    for w, own in enumerate(self.layout.parts):
      of_one = jax.tree.map(lambda x, w=w: x[w], stacked)
      state = self._unpacked(of_one, w)
      layers = {part.leaf: part.layers for part in own}
      for path, x in _by_path(state).items():
        every.setdefault(path, []).append((layers, x))
    axes = self._axes()
    whole = {}
    for path, found in every.items():
      leaf, axis = axes.get(path, (None, 0))
      parts = [(layers.get(leaf), x) for layers, x in found]
      whole[path] = joined(parts, axis)
    states = []
    for w, own in enumerate(new.layout.parts):
      layers = {part.leaf: part.layers for part in own}
      paths = _by_path(_numbered(new.treedefs[w]))
      leaves = []
      for path in paths:
        leaf, axis = axes.get(path, (None, 0))
        mine = layers.get(leaf)
        x = whole[path]
        leaves.append(x if mine is None else taken(x, mine, axis))
      states.append(new.packing.pack(leaves, w))
    return jax.tree.map(lambda *x: jnp.stack(x), *states)

  def _axes(self) -> dict[str, tuple[int, int]]:
    """Path in a state -> (leaf of layers that it belongs to, axis of these).

    What has another shape where there is one layer more.
    """
    leaves, treedef = self.layout.leaves, self.layout.treedef
    shapes = lambda leaves: _by_path(
      jax.eval_shape(self.tx.init, treedef.unflatten(leaves))
    )
    usual, found = shapes(leaves), {}
    cut = {p.leaf for own in self.layout.parts for p in own if p.layers}
    for i in cut:
      x = leaves[i]
      more = jax.ShapeDtypeStruct((x.shape[0] + 1, *x.shape[1:]), x.dtype)
      for path, y in shapes([*leaves[:i], more, *leaves[i + 1 :]]).items():
        differs = np.flatnonzero(np.subtract(y.shape, usual[path].shape))
        if len(differs):
          found[path] = (i, int(differs[0]))
    return found

  def _switch(self, branch, worker, *operands):
    branches = [
      lambda *x, w=w: branch(w, *x) for w in range(self.layout.workers)
    ]
    return by_worker(worker, branches, *operands)

  def _packed(self, state, w):
    return self.packing.pack(jax.tree.leaves(state), w)

  def _unpacked(self, packed, w):
    return self.treedefs[w].unflatten(self.packing.unpack(packed, w))


def _by_path(tree) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): x for path, x in leaves}


def _numbered(treedef):
  return treedef.unflatten(range(treedef.num_leaves))


def make_leaf_shards(
  tx: optax.GradientTransformation,
  params: Params,
  workers: int,
  stacked: Any,
  dtype: Any = None,
) -> LeafShards:
  """`tx` on the workers' leaves.

  Args:
    tx: a leafwise optimizer, see `leafwise`.
    params: arrays, or anything with shapes and dtypes.
    workers: their number.
    stacked: see `cut_leaves`.
    dtype: of the parameters that tx sees; None: their own.
  """
  cut = cut_leaves("make_leaf_shards", params, stacked)
  layout = make_leaf_layout(params, workers, cut)

  def state(w):
    mine = {
      key: jax.ShapeDtypeStruct((n,), dtype or key)
      for key, n in layout.columns.items()
    }
    return jax.eval_shape(lambda x: tx.init(layout.own(x, w)), mine)

  states = [state(w) for w in range(workers)]
  return LeafShards(
    tx,
    layout,
    packing([jax.tree.leaves(x) for x in states]),
    tuple(map(jax.tree.structure, states)),
    dtype,
  )


def cut_leaves(name: str, params: Params, stacked: Any) -> tuple[bool, ...]:
  """Of each leaf, whether its first axis is one of layers.

  Args:
    name: of the method, for the message.
    params: arrays, or anything with shapes.
    stacked: how many leading axes of each leaf hold layers: a number for all,
      or a tree like params of numbers.

  Raises:
    ValueError: a tree unlike the parameters, or more axes than a leaf has.
  """
  leaves, treedef = jax.tree.flatten(params)
  if isinstance(stacked, int):
    counts = [stacked] * len(leaves)
  else:
    try:
      counts = treedef.flatten_up_to(stacked)
    except (ValueError, TypeError) as e:
      raise ValueError(
        f"{name}: `stacked` is a number of leading axes that hold layers, or a "
        f"tree of numbers like the parameters: {e}"
      ) from e
  for x, n in zip(leaves, counts):
    if type(n) is not int or not 0 <= n <= np.ndim(x):
      raise ValueError(
        f"{name}: `stacked` counts the leading axes of a parameter that hold "
        f"layers; got {n!r} for one of shape {np.shape(x)}."
      )
  return tuple(n > 0 for n in counts)


def start(
  name: str, tx, whole: Params, stacked: Any, axis: str, dtype: Any
) -> tuple[Buffers | None, Packed]:
  """This worker's masters (None without dtype) and state of a whole model.

  Args:
    name: of the method.
    tx: the optimizer.
    whole: the parameters.
    stacked: see `cut_leaves`.
    axis: the workers' axis.
    dtype: of parameters beside float32 masters; None: no masters.

  Raises:
    ValueError: if tx is not leafwise, on behalf of the method.
  """
  check_leafwise(name, tx, whole, cut_leaves(name, whole, stacked))
  me, n = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
  masters = None if dtype is None else jnp.float32
  low = lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)
  shards = make_leaf_shards(tx, jax.tree.map(low, whole), n, stacked, masters)
  mine = shards.layout.pieces(whole, me, masters)
  return None if dtype is None else mine, shards.init(mine, me)
