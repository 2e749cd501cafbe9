"""A model, read once, and cut for so many workers.

Two kinds of parts are cut in two ways: arrays of which a worker has fewer units
(`subnetworks`), and residual blocks that it has whole or not at all (`whole`).
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from distrain_jax.method import Variables
from distrain_jax.methods.sdp import structure, subnetworks, tables, whole
from distrain_jax.methods.sdp.subnetworks import Parts, Subnetworks
from distrain_jax.methods.sdp.whole import Blocks


class Cut(NamedTuple):
  """Parameters, or statistics, of all workers; static."""

  nets: Subnetworks  # of the tree without the blocks
  blocks: Blocks
  writers: Any  # flags of the blocks' arrays, or None
  depth: int  # of the blocks' keys

  def split(self, tree: Any) -> tuple[Any, Any]:
    """A tree, without some blocks perhaps -> (the rest, its blocks)."""
    return whole.split(tree, self.blocks.layouts, self.depth)

  def merge(self, rest: Any, blocks: Any) -> Any:
    """Undoes `split`."""
    return whole.merge(rest, blocks, self.depth)

  def take(self, tree: Any, role: jax.Array) -> tuple[Parts, Any]:
    """A whole tree -> what the worker of `role` has of the rest; and all blocks."""
    rest, blocks = self.split(tree)
    parts = self.nets.sort(rest)
    return parts._replace(held=self.nets.take(parts.held, role)), blocks

  def put(self, tree: Any, mine: Any, role: jax.Array) -> Any:
    """A whole tree with what the worker of `role` has replaced by `mine`."""
    (rest, blocks), (my_rest, my_blocks) = self.split(tree), self.split(mine)
    parts, every = self.nets.sort(my_rest), self.nets.sort(rest)
    held = self.nets.put(every.held, parts.held, role)
    rest = self.nets.join(parts._replace(held=held))
    return self.merge(rest, {**blocks, **my_blocks})

  def pack(self, tree: Any, role: int) -> Parts:
    """A worker's own tree -> the rest, sorted, and the blocks' buffers."""
    rest, blocks = self.split(tree)
    buffers = self.blocks.pack(blocks, role)
    return self.nets.sort(rest)._replace(whole=buffers)

  def only_blocks(self, tree: Any) -> Any:
    """The tree with None in place of the rest's arrays."""
    rest, blocks = self.split(tree)
    return self.merge(jax.tree.map(lambda _: None, rest), blocks)

  def scale(self, tree: Any, up: bool) -> Any:
    """See `Subnetworks.scale`; of the blocks what there are."""
    rest, blocks = self.split(tree)
    rest = self.nets.scale(rest, up)
    part = dict(zip(self.blocks.layouts, self.blocks.held.mean(0)))

    def one(name):
      factor = 1 / float(part[name])
      by = factor if up else 1 / factor
      times = lambda x, w: (x * by).astype(x.dtype) if w else x
      return jax.tree.map(times, blocks[name], self.writers[name])

    if self.writers is None:
      return self.merge(rest, blocks)
    return self.merge(rest, {name: one(name) for name in blocks})


def as_variables(tree: Any) -> Variables:
  """Params or Variables, with () for a model_state that is empty."""
  if isinstance(tree, Variables):
    return tree if tree.model_state else tree._replace(model_state=())
  return Variables(tree, ())


class Model(NamedTuple):
  """What `read` found; of parameters and statistics together."""

  found: structure.Structure  # of `Variables` without the blocks
  blocks: Variables  # shapes by name
  writers: Any  # flags of the blocks' parameters by name, or None
  whole: Variables  # shapes

  def check(self, variables: Variables) -> None:
    """Refuses another model.

    Raises:
      ValueError: if the variables are not those that were read.
    """
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    same = jax.tree.structure(variables) == jax.tree.structure(self.whole)
    if not same or shapes(variables) != shapes(self.whole):
      raise ValueError(
        "sdp: the params given to init are not those of `shapes`; pass the "
        "same model's params (or their ShapeDtypeStructs) to sdp."
      )

  def cut(
    self,
    workers: int,
    forward: bool,
    dtype: DTypeLike | None,
    draws: int = 1,
    **options: Any,
  ) -> tuple[Cut, Cut]:
    """(parameters, statistics) for so many workers.

    Args:
      workers: N.
      forward: whether a worker has no more than it trains.
      dtype: of the parameters that it has; None: their own.
      draws: how many, of who holds what.
      **options: of `tables.hold`.
    """
    each = range(draws) if draws > 1 else [None]
    holdings = [{}] * draws
    if self.found.families:
      holdings = [
        tables.hold(self.found, workers, draw=k, **options) for k in each
      ]
    nets, stats = subnetworks.of_variables(
      subnetworks.cut(self.found, holdings)
    )
    params, state = self.blocks
    held = [np.ones((workers, 0), bool)] * draws
    if params:
      held = [
        tables.hold_blocks(params, workers, draw=k, **options) for k in each
      ]
    cuts = Cut(nets, whole.make(params, held, dtype), self.writers, 0)
    if not forward:
      stats, state = subnetworks.all_shared(self.whole.model_state), {}
    there = [name in state for name in params]
    kept = [x[:, there] for x in held]
    return cuts, Cut(stats, whole.make(state, kept), None, 1)


def read(
  names: Any,
  shapes: Any,
  *,
  level: str,
  assignment: tables.Assignment,
  shared: Collection[str],
  blocks: Collection[str],
  writers: Any,
) -> Model:
  """A model's structure; see `structure.read`.

  Args:
    names, shapes, level, assignment, shared, blocks, writers: as of `sdp`.

  Raises:
    ValueError: as `structure.read`; if a block is no key of the parameters, or
      `shared` names what the model does not have.
  """
  names, shapes = map(as_variables, (names, shapes))
  blocks = () if level == "neuron" else tuple(blocks)
  for name in blocks:
    keys = shapes.params if isinstance(shapes.params, dict) else ()
    if name not in keys:
      raise ValueError(
        f"sdp: `blocks` names {name!r}, which is no top-level key of the "
        f"parameters; they have {', '.join(map(str, keys)) or 'none'}."
      )
  cut = lambda tree, depth: whole.split(tree, blocks, depth)
  params, of_params = cut(shapes.params, 0)
  state, of_state = cut(shapes.model_state, 1)
  rest = Variables(cut(names.params, 0)[0], cut(names.model_state, 1)[0])
  flags = of_writers = None
  if writers is not None:
    flags, of_writers = cut(writers, 0)
    # Statistics are no writers.
    flags = Variables(flags, jax.tree.map(lambda _: False, state))
  found = structure.read(
    rest,
    Variables(params, state),
    level,
    shared,
    layered=assignment == "shuffled" or callable(assignment),
    writers=flags,
    alone=not blocks,
  )
  structure.check_shared(shared, names)
  return Model(found, Variables(of_params, of_state), of_writers, shapes)
