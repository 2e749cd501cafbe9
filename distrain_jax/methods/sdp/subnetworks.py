"""A model cut into subnetworks: each worker's arrays have the small shapes.

Nothing is masked: a worker's `mlp` axis is as long as the units that it holds,
its `layers` axis as long as its layers, and the model runs on what it is given.

Letters in shapes: N workers, S places of a worker, O places that it owns, c
elements of a fragment, l layers and g groups that a worker holds, L and G all
of them, F fragments a cell.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distrain_jax.methods.sdp import assignments, exchange
from distrain_jax.methods.sdp.sampled import Sampled
from distrain_jax.methods.sdp.structure import Leaf, Structure

SMALL = 1 << 18  # elements a message below which arrays travel side by side


class Parts(NamedTuple):
  """A tree in two, each of its structure, with None for the other's leaves.

  And what is beside the tree: `whole`, the buffers of blocks that are held
  whole (see `whole`), () where there are none.
  """

  shared: Any  # equal on all workers
  held: Any  # this worker's; or its owned fragments (O, c)
  whole: Any = ()  # this worker's


class Subnetworks(NamedTuple):
  """Of all workers; static."""

  treedef: Any
  leaves: tuple[Sampled | None, ...]  # None: shared

  def sort(self, tree: Any) -> Parts:
    """A tree of this structure -> what is shared, and what is held."""
    leaves = self.treedef.flatten_up_to(tree)
    pairs = list(zip(leaves, self.leaves))
    shared = [x if s is None else None for x, s in pairs]
    held = [None if s is None else x for x, s in pairs]
    return Parts(*map(self.treedef.unflatten, (shared, held)))

  def join(self, parts: Parts) -> Any:
    """Undoes `sort`."""
    one = lambda a, b: b if a is None else a
    return jax.tree.map(
      one, parts.shared, parts.held, is_leaf=lambda x: x is None
    )

  def take(self, held: Any, role: jax.Array) -> Any:
    """Whole arrays -> what the worker of `role` holds of them."""

    def one(s, x):
      rows = s.rows(x, s.holding.size)
      return s.array(exchange.pick(rows, s.plan.at, role), s.small)

    return self.map(one, held)

  def put(self, held: Any, mine: Any, role: jax.Array) -> Any:
    """Whole arrays with what the worker of `role` holds replaced by `mine`."""

    def one(s, x, part):
      rows, new = s.rows(x, s.holding.size), s.rows(part, s.small)
      at = jnp.asarray(s.plan.at)[role]
      return s.array(rows.at[at].set(new, mode="drop"), s.holding.size)

    return self.map(one, held, mine)

  def own(self, mine: Any, role: jax.Array) -> Any:
    """What a worker holds -> the fragments that it owns, (O, c)."""
    one = lambda s, x: exchange.pick(s.rows(x, s.small), s.plan.own, role)
    return self.map(one, mine)

  def to_owners(
    self,
    mine: Any,
    role: jax.Array,
    axis: str,
    wire_dtype: DTypeLike | None = None,
  ) -> Any:
    """What workers hold -> means over the holders, (O, c), float32."""
    send = lambda plan, x: exchange.to_owners(plan, x, role, axis, wire_dtype)
    rows = lambda s, x: s.shaped(x, s.small)
    sums = self._together(send, mine, before=rows)
    return self.map(lambda s, x: x.reshape(x.shape[0], -1), sums)

  def pieces(self, owned: Any) -> Any:
    """Owned fragments in the form in which an optimizer sees them."""
    return self.map(lambda s, x: s.piece(x), owned)

  def rows_of(self, pieces: Any) -> Any:
    """Undoes `pieces`."""
    return self.map(lambda s, x: s.rows_of(x), pieces)

  def to_holders(self, owned: Any, role: jax.Array, axis: str) -> Any:
    """Owners' fragments (O, c) -> what each worker holds."""
    send = lambda plan, x: exchange.to_holders(plan, x, role, axis)
    rows = self._together(send, owned, before=lambda s, x: s.reshaped(x))
    return self.map(lambda s, x: s.array(x, s.small), rows)

  def to_all(self, owned: Any, role: jax.Array, axis: str) -> Any:
    """Owners' fragments (O, c) -> whole arrays on every worker."""
    send = lambda plan, x: exchange.to_all(plan, x, role, axis)
    rows = self._together(send, owned)
    return self.map(lambda s, x: s.array(x, s.holding.size), rows)

  def everywhere(self, parts: Parts, role: jax.Array, axis: str) -> Any:
    """The whole tree, on every worker, of what the worker of `role` holds."""
    held = self.to_all(self.own(parts.held, role), role, axis)
    return self.join(parts._replace(held=held))

  def scale(self, tree: Any, up: bool) -> Any:
    """Arrays divided by their coverage (up), or multiplied by it; else as is.

    Those that sum over sampled units, and those by which sampled blocks write
    to the residual stream.
    """

    def one(x, s):
      factor = 1.0 if s is None else s.factor
      if factor == 1.0:
        return x
      return (x * (factor if up else 1 / factor)).astype(x.dtype)

    leaves = self.treedef.flatten_up_to(tree)
    return self.treedef.unflatten(map(one, leaves, self.leaves))

  def map(self, fn, *trees: Any) -> Any:
    """fn(sampled, leaf, ...) on the held leaves; None stays."""
    columns = zip(self.leaves, *map(self.treedef.flatten_up_to, trees))
    return self.treedef.unflatten(
      None if s is None else fn(s, *xs) for s, *xs in columns
    )

  def _together(self, fn, tree: Any, before=lambda s, x: x) -> Any:
    """fn(plan, before(sampled, x)), small arrays of one plan side by side.

    One array waits for the other: else all their messages, and copies in the
    order of rows, would be in memory at once.
    """
    leaves = self.treedef.flatten_up_to(tree)
    groups: dict[tuple, list[int]] = {}
    for i, (s, x) in enumerate(zip(self.leaves, leaves)):
      if s is not None:
        alone = i if x.size >= SMALL else None
        groups.setdefault((id(s.plan), x.dtype, alone), []).append(i)
    out: list[Any] = [None] * len(leaves)
    sent = None
    for members in groups.values():
      xs = [leaves[i] for i in members]
      # Both sides are used again: what is not, a compiler takes out.
      xs, sent = jax.lax.optimization_barrier((xs, sent))
      if sent is not None:
        out = [x if y is None else y for x, y in zip(out, sent)]
      rows = [before(self.leaves[i], x) for i, x in zip(members, xs)]
      joined = rows[0]
      if len(rows) > 1:
        rows = [x.reshape(x.shape[0], -1) for x in rows]
        joined = jnp.concatenate(rows, axis=1)
      ends = np.cumsum([x.shape[1] for x in rows])[:-1]
      result = fn(self.leaves[members[0]].plan, joined)
      sent = [None] * len(leaves)
      for i, x in zip(members, jnp.split(result, ends, axis=1)):
        sent[i] = out[i] = x
    return self.treedef.unflatten(out)


def of_variables(nets: Subnetworks) -> tuple[Subnetworks, Subnetworks]:
  """Subnetworks of `Variables` -> those of params and of model_state."""
  params, state = nets.treedef.children()
  split = params.num_leaves
  return (
    Subnetworks(params, nets.leaves[:split]),
    Subnetworks(state, nets.leaves[split:]),
  )


def all_shared(tree: Any) -> Subnetworks:
  """A tree of which nothing is sampled."""
  leaves, treedef = jax.tree.flatten(tree)
  return Subnetworks(treedef, (None,) * len(leaves))


def cut(
  structure: Structure, draws: list[dict[str, assignments.Holding]]
) -> Subnetworks:
  """The subnetworks by tables of holdings.

  Args:
    structure: of the model.
    draws: by family; what is not in it is shared. Several are equal but for
      who holds what.
  """
  plans: dict[Any, exchange.Plan] = {}

  def one(leaf: Leaf) -> Sampled | None:
    if not leaf.family or leaf.family not in draws[0]:
      return None
    holdings = [holdings[leaf.family] for holdings in draws]
    first = holdings[0]
    cell = math.prod(leaf.shape) // math.prod(first.size)
    pieces = first.owners.shape[1]
    whole = cell % pieces != 0
    # Families with equal tables share a plan, and so their messages.
    tables = [x.tobytes() for holding in holdings for x in holding[1:]]
    key = (first.size, whole, *tables)
    if key not in plans:
      # Draws share their messages where these go by distance.
      even = len(holdings) == 1
      each = [exchange.make_plan(x, whole, even) for x in holdings]
      plans[key] = exchange.together(each)
    return Sampled(leaf, first, plans[key], 1 if whole else pieces)

  return Subnetworks(structure.treedef, tuple(map(one, structure.leaves)))
