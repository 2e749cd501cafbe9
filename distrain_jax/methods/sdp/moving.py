"""What workers hold, moved to the holders of the next draw.

Array by array: a worker has one whole array of the model for a moment, and
never the model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from distrain_jax.methods.sdp import exchange
from distrain_jax.methods.sdp.cutting import Cut
from distrain_jax.methods.sdp.sampled import Sampled

NOT_MOVED = -1  # in place of a parameter


class Mover(NamedTuple):
  """From one draw's roles to the next one's."""

  cuts: Cut
  stats: Cut
  old: jax.Array  # this worker's role, ()
  new: jax.Array
  axis: str
  owners: bool  # whether the optimizer is sharded over them

  def __call__(
    self,
    state: Any,
    tx: optax.GradientTransformation,
    low: Callable[[Any], Any],
    forward: bool,
  ) -> Any:
    """An `SDPState` after the move; low casts to the parameters' dtype."""
    nets, blocks = self.cuts.nets, self.cuts.blocks
    masters = state.masters
    if masters is not None:
      one = lambda x, i: None if x is None else self._of_tx(x, i)
      is_none = lambda x: x is None
      masters = jax.tree.map(one, masters, self._numbers(), is_leaf=is_none)
    opt_state = optax.tree_map_params(
      tx, self._of_tx, state.opt_state, self._numbers()
    )
    params, model_state = state.params, state.model_state
    if forward:
      params = params._replace(held=nets.map(self._held, params.held))
      if blocks.layouts:
        # Their owners stay where they are.
        pieces = low(self.cuts.split(masters)[1])
        whole = blocks.to_holders(pieces, self.new, self.axis)
        params = params._replace(whole=whole)
    stats = self.stats.blocks
    means = stats.to_owners(model_state.whole, self.old, self.axis)
    return state._replace(
      params=params,
      model_state=model_state._replace(
        held=self.stats.nets.map(self._held, model_state.held),
        whole=stats.to_holders(means, self.new, self.axis),
      ),
      masters=masters,
      opt_state=opt_state,
    )

  def _numbers(self) -> Any:
    """In place of each parameter its number among those of which parts move."""
    leaves = self.cuts.nets.leaves
    rest = self.cuts.nets.treedef.unflatten(
      NOT_MOVED if s is None else i for i, s in enumerate(leaves)
    )
    blocks = {
      name: kept.treedef.unflatten([NOT_MOVED] * len(kept.leaves))
      for name, kept in self.cuts.blocks.layouts.items()
    }
    return self.cuts.merge(rest, blocks)

  def _of_tx(self, x: jax.Array, i: int) -> jax.Array:
    """What the optimizer has of a parameter."""
    if i == NOT_MOVED or x.ndim == 0:
      return x
    s = self.cuts.nets.leaves[i]
    if not self.owners:
      return self._held(s, x)
    rows = exchange.to_all(s.plan, s.rows_of(x), self.old, self.axis)
    return s.piece(exchange.pick(rows, s.plan.fragments, self.new))

  def _held(self, s: Sampled, x: jax.Array) -> jax.Array:
    own = exchange.pick(s.rows(x, s.small), s.plan.own, self.old)
    rows = exchange.to_all(s.plan, own, self.old, self.axis)
    return s.array(exchange.pick(rows, s.plan.at, self.new), s.small)
