"""The same state for another number of workers: everything is cut anew."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distrain_jax import layout
from distrain_jax.methods.sdp.cutting import Cut
from distrain_jax.methods.sdp.subnetworks import Parts, Subnetworks


def reshard(
  state: Any,
  old: tuple[Cut, Cut],
  new: tuple[Cut, Cut],
  tx: optax.GradientTransformation,
  *,
  draw: tuple[jax.Array, jax.Array],
  forward: bool,
  owners: bool,
) -> Any:
  """A global state of the old cuts' workers as one of the new cuts'.

  Args:
    state: an `SDPState`, worker axes included.
    old: cuts of parameters and of statistics, for the state's workers.
    new: for another number of workers.
    tx: the optimizer.
    draw: the one in force, of the old cuts and of the new.
    forward: whether workers hold no more than they train.
    owners: whether the optimizer is sharded over them.
  """
  (cuts, stats), (new_cuts, new_stats) = old, new
  nets, workers = cuts.nets, new_cuts.blocks.workers
  roles, new_roles = (
    k * n + jnp.arange(n) for k, n in zip(draw, (cuts.blocks.workers, workers))
  )
  whole = _whole(nets, state.params, roles) if forward else state.params.shared
  rest, _ = cuts.split(whole)
  after = _after((cuts, roles), (new_cuts, new_roles), rest, owners)

  def one(x, to):
    """One array (N, ...) of what the optimizer has of a parameter."""
    if x is None or isinstance(x, optax.MaskedNode):
      return x  # a label or a mask leaves the parameter out
    if x.ndim == 1:  # a scalar of tx's in the place of a parameter
      return jnp.broadcast_to(x[0], (workers,))
    return to(x)

  opt_state = optax.tree_map_params(
    tx,
    one,
    state.opt_state,
    after,
    transform_non_params=lambda x: jnp.broadcast_to(x[0], (workers,)),
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  masters = state.masters
  if masters is not None:
    is_none = lambda x: x is None
    masters = jax.tree.map(one, masters, after, is_leaf=is_none)
  params = state.params
  if forward:
    params = _stack(new_cuts.nets, rest, new_roles)
    if cuts.blocks.layouts:
      blocks = cuts.blocks.whole(cuts.split(state.masters)[1])
      params = params._replace(
        whole=new_cuts.blocks.stack(blocks, new_roles[0])
      )
    else:
      params = params._replace(whole=state.params.whole)
  model_state = _whole(stats.nets, state.model_state, roles)
  model_state = _stack(new_stats.nets, model_state, new_roles)
  buffers = state.model_state.whole
  if stats.blocks.layouts:
    blocks = stats.blocks.first_holders(buffers, roles[0])
    buffers = new_stats.blocks.stack(blocks, new_roles[0])
  return state._replace(
    params=params,
    model_state=model_state._replace(whole=buffers),
    masters=masters,
    opt_state=opt_state,
  )


def _after(old, new, rest: Any, owners: bool) -> Any:
  """In place of each parameter: (N, ...) of the old cut -> of the new one."""
  (cuts, roles), (new_cuts, new_roles) = old, new
  workers = new_cuts.blocks.workers
  shared = new_cuts.nets.sort(rest).shared
  pieces = jax.eval_shape(
    lambda x: layout.make_layout(x, workers).pieces(x, 0), shared
  )
  pieces = new_cuts.nets.treedef.flatten_up_to(pieces)

  def of_leaf(before, after, like, piece):
    def to(x):
      if before is None:
        x = x.reshape(-1)[: like.size].reshape(like.shape) if owners else x[0]
      else:
        owned = before.rows_of(x) if owners else x
        whole = before.merge if owners else before.whole
        x = whole(owned, roles)
      if after is None:
        if owners:
          return layout.restack(x.reshape(1, -1), piece, workers)
        return jnp.broadcast_to(x, (workers, *x.shape))
      if owners:
        return jax.vmap(after.piece)(after.stack_owned(x, new_roles))
      return after.stack(x, new_roles)

    return to

  def of_block(leaf):
    piece = jax.ShapeDtypeStruct(leaf.piece_shape, leaf.dtype)
    return lambda x: layout.restack(x, piece, workers)

  leaves = cuts.nets.treedef.flatten_up_to(rest)
  columns = zip(cuts.nets.leaves, new_cuts.nets.leaves, leaves, pieces)
  rest = cuts.nets.treedef.unflatten(of_leaf(*x) for x in columns)
  blocks = {
    name: x.treedef.unflatten(map(of_block, x.leaves))
    for name, x in new_cuts.blocks.layouts.items()
  }
  return cuts.merge(rest, blocks)


def _whole(nets: Subnetworks, parts: Parts, roles: jax.Array) -> Any:
  held = nets.map(lambda s, x: s.whole(x, roles), parts.held)
  return nets.join(parts._replace(held=held))


def _stack(nets: Subnetworks, tree: Any, roles: jax.Array) -> Parts:
  parts = nets.sort(tree)
  held = nets.map(lambda s, x: s.stack(x, roles), parts.held)
  return parts._replace(held=held)
