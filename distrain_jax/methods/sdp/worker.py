"""One worker of SDP: what it has, and what it does in a step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from distrain_jax import gradients, spmd, variables
from distrain_jax.elementwise import check_elementwise
from distrain_jax.method import (
  Batch,
  LossFn,
  Metrics,
  Params,
  StatefulLoss,
  Variables,
)
from distrain_jax.methods.sdp import diagnosis, moving, resharding, updates
from distrain_jax.methods.sdp.cutting import Cut, Model
from distrain_jax.methods.sdp.subnetworks import Parts

DRAWS = 8  # of shuffled masks that are drawn anew, before the first comes again


class SDPState(NamedTuple):
  """Bytes a parameter that is sampled, with Adam, gradient included, for a
  coverage C: 16 C in float32; with shard_optimizer 8 C + 8/N; with
  param_dtype=bfloat16 16 C, or 4 C + 12/N. What is shared counts with C = 1.
  Backward masking holds all parameters and their optimizer for C of them.
  Blocks that are held whole have a sharded optimizer always: 8 C + 12/N, with
  the longest worker's share of all blocks for C (see `whole`).
  """

  step: jax.Array  # (), int32
  # Shared: equal on all workers; with backward masking all parameters. Held
  # and whole: this worker's own.
  params: Parts
  model_state: Parts  # of () for a loss without it
  # What tx updates: this worker's; None where those are the parameters.
  masters: Params | None
  opt_state: optax.OptState


class Here(NamedTuple):
  """Where a worker stands in a step."""

  role: jax.Array  # (), its row in all tables: draw * N + worker
  params: Cut
  stats: Cut
  update: updates.Holders | updates.Owners


class Worker(NamedTuple):
  """The options of `sdp`, checked; its methods are those of a `Method`."""

  loss_fn: LossFn | StatefulLoss
  tx: optax.GradientTransformation
  axis: str
  model: Model
  tables: Mapping[str, Any]  # options of `tables.hold`
  forward: bool
  rescale: str
  shard_optimizer: bool
  redraw_every: int | None
  accumulate: int
  clip_norm: float | None
  wire_dtype: DTypeLike | None
  param_dtype: DTypeLike | None

  def init(self, key: jax.Array, model: Params | Variables) -> SDPState:
    del key  # nothing random here
    here = self._here(jnp.zeros((), jnp.int32))
    params, model_state = variables.split(self.loss_fn, model)
    self.model.check(Variables(params, model_state))
    check_elementwise("sdp", self.tx, params)
    cut, stats = here.params, here.stats
    taken, blocks = cut.take(params, here.role)
    me = jax.lax.axis_index(self.axis)
    targets = cut.merge(
      here.update.targets(taken, here.role), cut.blocks.pieces(blocks, me)
    )
    masters = None
    if self.param_dtype is not None:
      masters = targets = gradients.cast(targets, jnp.float32)
    elif blocks:
      masters = cut.only_blocks(targets)
    kept = Parts(self._low(params), None)
    if self.forward:
      kept = self._low(taken)
      kept = kept._replace(whole=_packed(cut, here.role, self._low(blocks)))
    sorted_stats, blocks = stats.take(model_state, here.role)
    return SDPState(
      step=jnp.zeros((), jnp.int32),
      params=kept,
      model_state=sorted_stats._replace(
        whole=_packed(stats, here.role, blocks)
      ),
      masters=masters,
      opt_state=self.tx.init(targets),
    )

  def step(
    self, state: SDPState, batch: Batch, key: jax.Array
  ) -> tuple[SDPState, Metrics]:
    here = self._here(state.step)
    key = spmd.worker_key(key, state.step, self.axis)
    loss, aux, grads, model_state = self._local(here, state, batch, key)
    loss, aux = jax.lax.pmean((loss, aux), self.axis)
    grads, norm = self._means(here, grads)
    if self.clip_norm is not None:
      scale = gradients.clip_scale(norm, self.clip_norm)
      grads = gradients.scale_tree(grads, scale)
    new = self._updated(here, state, grads)
    stats = updates.average(here.stats, model_state, here.role, self.axis)
    new = new._replace(step=state.step + 1, model_state=stats)
    metrics = {**aux, "loss": loss, "grad_norm": norm}
    if self.redraw_every is None:
      return new, metrics
    # All that was sent before is an input of the conditional: XLA for CPU keeps
    # no order between messages in it and beside it.
    due = new.step % self.redraw_every == 0
    stay = lambda *x: x
    return jax.lax.cond(due, self._moved, stay, new, metrics)

  def params(self, state: SDPState) -> Params | Variables:
    here = self._here(state.step)
    cut, stats = here.params, here.stats
    tree = state.params.shared
    if self.forward:
      tree = cut.nets.everywhere(state.params, here.role, self.axis)
      _, blocks = cut.split(state.masters if cut.blocks.layouts else {})
      tree = cut.merge(tree, cut.blocks.to_all(self._low(blocks), self.axis))
    if self.rescale == "test":
      tree = cut.scale(tree, up=False)
    if not isinstance(self.loss_fn, StatefulLoss):
      return tree
    model_state = stats.nets.everywhere(state.model_state, here.role, self.axis)
    means = stats.blocks.to_owners(
      state.model_state.whole, here.role, self.axis
    )
    blocks = stats.blocks.to_all(means, self.axis)
    return Variables(tree, stats.merge(model_state, blocks))

  def member(self, fn: Callable[[Any], Any], state: SDPState) -> Any:
    here = self._here(state.step)

    def one_set(same: int):
      tree, model_state = self._own(here, state, same)
      if self.rescale == "train":
        tree = here.params.scale(tree, up=True)
      if not self.forward:
        tree = state.params.shared
      return fn(variables.own(self.loss_fn, tree, model_state))

    return here.params.blocks.switch(here.role, one_set)

  def reshard(self, state: SDPState, workers: int) -> SDPState:
    mine = state.params.held, state.params.whole, state.masters
    stacked = jax.tree.leaves((mine, state.opt_state))
    old = len(stacked[0]) if stacked else workers
    return resharding.reshard(
      state,
      self._cut(old),
      self._cut(workers),
      self.tx,
      draw=(self._draw(state.step, old), self._draw(state.step, workers)),
      forward=self.forward,
      owners=self.shard_optimizer,
    )

  def _draws(self, workers: int) -> int:
    if self.redraw_every is None:
      return 1
    return workers if self.tables["assignment"] == "rolling" else DRAWS

  def _draw(self, step: jax.Array, workers: int) -> jax.Array:
    """Which draw is in force."""
    return (step // (self.redraw_every or 1)) % self._draws(workers)

  def _cut(self, workers: int) -> tuple[Cut, Cut]:
    draws = self._draws(workers)
    return self.model.cut(
      workers, self.forward, self.param_dtype, draws, **self.tables
    )

  def _here(self, step: jax.Array) -> Here:
    me, n = jax.lax.axis_index(self.axis), jax.lax.axis_size(self.axis)
    params, stats = self._cut(n)
    how = updates.Owners if self.shard_optimizer else updates.Holders
    update = how(params.nets, self.axis, self.wire_dtype)
    return Here(self._draw(step, n) * n + me, params, stats, update)

  def _low(self, tree: Any) -> Any:
    if self.param_dtype is None:
      return tree
    return gradients.cast(tree, self.param_dtype)

  def _local(self, here: Here, state: SDPState, batch, key):
    """This worker's loss, aux, gradients (Parts) and statistics (Parts)."""
    cut, stats = here.params, here.stats
    loss_fn = _before(self._whole_of(here, state), self.loss_fn)
    gradient = gradients.gradient_fn(loss_fn, self.accumulate)
    if self.forward:
      gradient = diagnosis.checked(gradient, cut, stats)

    def one_set(same: int):
      g = gradient(*self._own(here, state, same), batch, key)
      return (
        g.loss,
        g.aux,
        cut.pack(g.grads, same),
        stats.pack(g.model_state, same),
      )

    return cut.blocks.switch(here.role, one_set)

  def _whole_of(self, here: Here, state: SDPState):
    """(what this worker trains) -> what its loss is a function of."""

    def whole(tree):
      if not self.forward:
        return here.params.put(state.params.shared, tree, here.role)
      if self.rescale == "train":
        return here.params.scale(tree, up=True)
      return tree

    return whole

  def _trained(self, here: Here, state: SDPState) -> Parts:
    """What this worker trains, without blocks."""
    if self.forward:
      return state.params
    return here.params.take(state.params.shared, here.role)[0]

  def _own(self, here: Here, state: SDPState, same: int) -> tuple[Any, Any]:
    """What a worker trains whose blocks are those of role `same`, as trees."""
    cut, stats = here.params, here.stats
    if self.forward:
      held = cut.blocks.unpack(state.params.whole, same)
    else:
      every = cut.split(state.params.shared)[1]
      held = {n: every[n] for n in cut.blocks.of(same)}
    tree = cut.merge(cut.nets.join(self._trained(here, state)), held)
    held = stats.blocks.unpack(state.model_state.whole, same)
    return tree, stats.merge(stats.nets.join(state.model_state), held)

  def _means(self, here: Here, grads: Parts) -> tuple[Any, jax.Array]:
    """Means over the holders, like what tx updates; and their norm."""
    cut = here.params
    of_blocks = cut.blocks.to_owners(
      grads.whole, here.role, self.axis, self.wire_dtype
    )
    means, square = here.update.means(grads, here.role)
    if of_blocks:
      own = gradients.squared_norm(of_blocks)
      square += jax.lax.psum(own, self.axis)
    return cut.merge(means, of_blocks), jnp.sqrt(square)

  def _updated(self, here: Here, state: SDPState, grads: Any) -> SDPState:
    """The state with new parameters, masters and optimizer."""
    cut, parts = here.params, self._trained(here, state)
    targets = here.update.targets(parts, here.role)
    targets = _filled(state.masters, targets)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, targets)
    changes, opt_state = self.tx.update(grads, state.opt_state, targets)
    targets = optax.apply_updates(targets, changes)
    rest, blocks = cut.split(self._low(targets))
    if self.forward:
      params = here.update.publish(rest, parts, here.role)
      held = cut.blocks.to_holders(blocks, here.role, self.axis)
      params = params._replace(whole=held)
    else:
      params = here.update.publish_to_all(rest, parts, here.role)
      every = cut.blocks.to_all(blocks, self.axis)
      params = Parts(cut.merge(params.shared, every), None)
    masters = state.masters
    if masters is not None:
      keep = lambda m, t: None if m is None else t
      masters = jax.tree.map(keep, masters, targets, is_leaf=_is_none)
    return state._replace(params=params, masters=masters, opt_state=opt_state)

  def _moved(self, state: SDPState, metrics: Metrics):
    """To the holders of the next draw, before its first step."""
    old, new = self._here(state.step - 1), self._here(state.step)
    mover = moving.Mover(
      old.params, old.stats, old.role, new.role, self.axis, self.shard_optimizer
    )
    return mover(state, self.tx, self._low, self.forward), metrics


def _packed(cut: Cut, role: jax.Array, blocks: Any) -> Any:
  """The buffers of all blocks' arrays that the worker of `role` holds."""
  return cut.blocks.switch(role, lambda same: cut.blocks.pack(blocks, same))


def _is_none(x) -> bool:
  return x is None


def _filled(masters: Params | None, targets: Any) -> Any:
  """What tx updates: masters, and where there are none the parameters."""
  if masters is None:
    return targets
  # A block is not among the targets, only among the masters.
  if isinstance(masters, dict) and isinstance(targets, dict):
    targets = {**masters, **targets}
  one = lambda m, t: t if m is None else m
  return jax.tree.map(one, masters, targets, is_leaf=_is_none)


def _before(fn, loss_fn):
  """loss_fn of fn(params)."""
  if isinstance(loss_fn, StatefulLoss):
    return loss_fn._replace(fn=_before(fn, loss_fn.fn))
  return lambda params, *rest: loss_fn(fn(params), *rest)
