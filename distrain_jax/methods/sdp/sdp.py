"""SDP: each worker holds and trains a subnetwork, and no worker the whole.

Singh, Khalid, Oyallon and Belilovsky, "Model Parallelism With Subnetwork Data
Parallelism", 2025, https://arxiv.org/abs/2507.09029.

Every worker trains an end-to-end subnetwork on its own data: a fixed part of
the hidden units, heads and channels (neuron level) or of the residual blocks
(block level). Parts overlap, and after every step the workers that hold a
parameter average its gradient. No activation is ever sent.

With forward masking a worker's arrays have the small shapes: its parameters,
gradients, optimizer, products and activations shrink with the coverage. With
backward masking it runs the whole model forward, trains what it holds, and
receives the rest after every update.

Where the paper leaves a choice open: masks are deterministic and balanced
(`assignments`), gradients are divided by the number of holders, and the model
to evaluate is the whole one.
"""

from collections.abc import Collection
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import gradients, spmd, variables
from distrain_jax.elementwise import check_elementwise
from distrain_jax.method import (
  LossFn,
  Method,
  Params,
  StatefulLoss,
  Variables,
)
from distrain_jax.methods.sdp import (
  cutting,
  diagnosis,
  resharding,
  tables,
  updates,
)
from distrain_jax.methods.sdp.subnetworks import Parts

MASKINGS = ("forward", "backward")
RESCALES = ("none", "train", "test")


class SDPState(NamedTuple):
  """Bytes a parameter that is sampled, with Adam, gradient included, for a
  coverage C: 16 C in float32; with shard_optimizer 8 C + 8/N; with
  param_dtype=bfloat16 16 C, or 4 C + 12/N. What is shared counts with C = 1.
  Backward masking holds all parameters and their optimizer for C of them.
  Blocks that are held whole have a sharded optimizer always: 8 C + 12/N.
  """

  step: jax.Array  # (), int32
  # Shared: equal on all workers; with backward masking all parameters. Held
  # and whole: this worker's own.
  params: Parts
  model_state: Parts  # of () for a loss without it
  # What tx updates: this worker's; None where those are the parameters.
  masters: Params | None
  opt_state: optax.OptState


def sdp(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  names: Any,
  shapes: Any,
  axis: str = "data",
  coverage: tables.Coverage = 0.5,
  level: str = "neuron",
  blocks: Collection[str] = (),
  masking: str = "forward",
  assignment: tables.Assignment = "cyclic",
  seed: int = 0,
  rescale: str = "none",
  writers: Any = None,
  shard_optimizer: bool = False,
  shared: tuple[str, ...] = (),
  accumulate: int = 1,
  clip_norm: float | None = None,
  wire_dtype: DTypeLike | None = None,
  param_dtype: DTypeLike | None = None,
) -> Method:
  """Subnetwork data parallelism around a loss that runs on what it is given.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`. With
      forward masking its params are a subnetwork's: the same tree with shorter
      axes, which it must take its sizes from. Its key is this worker's own.
    tx: an elementwise optimizer; it sees trees of the parameters' structure.
    names: one logical name an axis of every parameter: the parameters' tree
      with a tuple of strings in place of each array (for our models
      `models.logical_names`); with a stateful loss `Variables` of two such.
    shapes: the whole model's params (or Variables), or their
      ShapeDtypeStructs; only shapes and dtypes are read.
    axis: the mesh (or vmap) axis of the workers.
    coverage: the fraction of each family of units that a worker holds, a
      multiple of 1/N, so that all have equally many holders. Where N workers do
      not divide the units some hold one more than others, and those have an
      empty place: zeros, which stay zeros. With level="both" a pair, of the
      layers and of their units (of 1/holders then), or one number for each.
    level: "neuron": units of the axes heads, hidden, inner, mlp; "block":
      layers that are stacked along the axis `layers`, and `blocks`; or "both".
    blocks: top-level keys of the parameters (and of each of the model's other
      collections) that loss_fn runs without, such as `models.blocks`: residual
      blocks that are not stacked. They are held whole, see `whole`.
    masking: "forward" or "backward".
    assignment: "cyclic": worker w's window starts at group w in all layers;
      "shuffled": elsewhere in each; "balanced": as cyclic, with `blocks` dealt
      out by their bytes; "nested": see `assignments.nested`; or a function, see
      `tables.Assignment`.
    seed: of the shuffle.
    rescale: what makes up for what is absent. "train": products that sum over
      sampled units, and what sampled blocks write, are divided by the coverage
      while training; "test": the whole model's are multiplied by it; "none".
    writers: True in place of each parameter in which the output of its
      residual block is linear (`models.branch_writers`); for rescale at block
      level.
    shard_optimizer: each parameter has one owner among its holders, which has
      its optimizer's state and updates it; shared ones are cut as by zero1.
    shared: names (or kinds of names) that are not sampled.
    accumulate: micro-batches that each worker's share is cut into.
    clip_norm: largest global norm of the averaged gradient, in which every
      parameter counts once; None: no clipping.
    wire_dtype: dtype in which gradients travel; None: their own.
    param_dtype: dtype of the parameters that the loss sees; float32 masters
      are then kept with the optimizer. None: the parameters' own, no masters.

  Returns:
    A `Method`. Metrics: loss (the mean over the subnetworks), grad_norm and
    loss_fn's aux. Its params are the whole model.

  Raises:
    ValueError: if an option is out of range or names do not fit; from `init`,
      if the workers cannot share the units so, a parameter would have no
      holder, or tx is not elementwise; from `step`, if the loss does not run
      on smaller shapes.
  """
  _check(masking, rescale, level, writers, loss_fn)
  if level == "both" and isinstance(coverage, Real):
    coverage = (coverage, coverage)
  tables.check(level, coverage, assignment)
  gradients.check_accumulate("sdp", accumulate)
  gradients.check_clip_norm("sdp", clip_norm)
  gradients.check_dtype("sdp", "wire_dtype", wire_dtype)
  gradients.check_dtype("sdp", "param_dtype", param_dtype)
  forward = masking == "forward"
  options = {"level": level, "coverage": coverage, "assignment": assignment}
  model = cutting.read(
    _as_variables(names),
    _as_variables(shapes),
    level=level,
    shared=shared,
    blocks=() if level == "neuron" else tuple(blocks),
    layered=assignment in ("shuffled",) or callable(assignment),
    writers=writers,
  )

  def low(tree):
    return tree if param_dtype is None else gradients.cast(tree, param_dtype)

  def cut(workers: int):
    return model.cut(workers, forward, param_dtype, seed=seed, **options)

  def here():
    me, n = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    params, stats = cut(n)
    how = updates.Owners if shard_optimizer else updates.Holders
    return me, params, stats, how(params.nets, axis, wire_dtype)

  def init(key, variables_):
    del key  # nothing random here
    me, cuts, stats, update = here()
    params, model_state = variables.split(loss_fn, variables_)
    model.check(Variables(params, model_state))
    check_elementwise("sdp", tx, params)
    taken, blocks = cuts.take(params, me)
    targets = cuts.merge(
      update.targets(taken, me), cuts.blocks.pieces(blocks, me)
    )
    masters = None
    if param_dtype is not None:
      masters = targets = gradients.cast(targets, jnp.float32)
    elif blocks:
      masters = cuts.only_blocks(targets)
    if forward:
      held = cuts.blocks.switch(me, lambda w: cuts.blocks.pack(low(blocks), w))
      kept = low(taken)._replace(whole=held)
    else:
      kept = Parts(low(params), None)
    sorted_stats, blocks = stats.take(model_state, me)
    held = stats.blocks.switch(me, lambda w: stats.blocks.pack(blocks, w))
    return SDPState(
      step=jnp.zeros((), jnp.int32),
      params=kept,
      model_state=sorted_stats._replace(whole=held),
      masters=masters,
      opt_state=tx.init(targets),
    )

  def local_loss(cuts, state, me):
    """The loss of what this worker trains."""

    def whole(tree):
      if forward:
        return cuts.scale(tree, up=True) if rescale == "train" else tree
      return cuts.put(state.params.shared, tree, me)

    return _before(whole, loss_fn)

  def trained(cuts, state, me):
    """What this worker trains of what is not a block: Parts."""
    if forward:
      return state.params
    return cuts.take(state.params.shared, me)[0]

  def own(cuts, stats, state, me, worker: int):
    """What a worker that holds the same as `worker` trains, as trees."""
    if forward:
      held = cuts.blocks.unpack(state.params.whole, worker)
    else:
      every = cuts.split(state.params.shared)[1]
      held = {n: every[n] for n in cuts.blocks.of(worker)}
    tree = cuts.merge(cuts.nets.join(trained(cuts, state, me)), held)
    held = stats.blocks.unpack(state.model_state.whole, worker)
    return tree, stats.merge(stats.nets.join(state.model_state), held)

  def step(state: SDPState, batch, key):
    key = spmd.worker_key(key, state.step, axis)
    me, cuts, stats, update = here()
    gradient = gradients.gradient_fn(local_loss(cuts, state, me), accumulate)
    if forward:
      gradient = diagnosis.checked(gradient, cuts, stats)

    def one_set(worker: int):
      g = gradient(*own(cuts, stats, state, me, worker), batch, key)
      grads, blocks = cuts.split(g.grads)
      grads = cuts.nets.sort(grads)
      grads = grads._replace(whole=cuts.blocks.pack(blocks, worker))
      rest, blocks = stats.split(g.model_state)
      rest = stats.nets.sort(rest)
      rest = rest._replace(whole=stats.blocks.pack(blocks, worker))
      return g.loss, g.aux, grads, rest

    loss, aux, grads, model_state = cuts.blocks.switch(me, one_set)
    loss, aux = jax.lax.pmean((loss, aux), axis)
    of_blocks = cuts.blocks.to_owners(grads.whole, axis, wire_dtype)
    grads, square = update.means(grads)
    if of_blocks:
      square += jax.lax.psum(gradients.squared_norm(of_blocks), axis)
    grads, norm = cuts.merge(grads, of_blocks), jnp.sqrt(square)
    if clip_norm is not None:
      scale = gradients.clip_scale(norm, clip_norm)
      grads = gradients.scale_tree(grads, scale)
    parts = trained(cuts, state, me)
    targets = _filled(state.masters, update.targets(parts, me))
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, targets)
    changes, opt_state = tx.update(grads, state.opt_state, targets)
    targets = optax.apply_updates(targets, changes)
    rest, blocks = cuts.split(low(targets))
    if forward:
      params = update.publish(rest, parts, me)
      held = cuts.blocks.to_holders(blocks, axis)
      params = params._replace(whole=held)
    else:
      params = update.publish_to_all(rest, parts, me)
      every = cuts.blocks.to_all(blocks, axis)
      params = Parts(cuts.merge(params.shared, every), None)
    masters = state.masters
    if masters is not None:
      keep = lambda m, t: None if m is None else t
      masters = jax.tree.map(keep, masters, targets, is_leaf=_is_none)
    new = SDPState(
      step=state.step + 1,
      params=params,
      model_state=updates.average(stats, model_state, axis),
      masters=masters,
      opt_state=opt_state,
    )
    return new, {**aux, "loss": loss, "grad_norm": norm}

  def params(state: SDPState):
    me, cuts, stats, _ = here()
    if forward:
      tree = cuts.nets.everywhere(state.params, me, axis)
      _, blocks = cuts.split(state.masters if cuts.blocks.layouts else {})
      tree = cuts.merge(tree, cuts.blocks.to_all(low(blocks), axis))
    else:
      tree = state.params.shared
    if rescale == "test":
      tree = cuts.scale(tree, up=False)
    if not isinstance(loss_fn, StatefulLoss):
      return tree
    model_state = stats.nets.everywhere(state.model_state, me, axis)
    blocks = stats.blocks.to_owners(state.model_state.whole, axis)
    blocks = stats.blocks.to_all(blocks, axis)
    return Variables(tree, stats.merge(model_state, blocks))

  def member(fn, state: SDPState):
    me, cuts, stats, _ = here()

    def one_set(worker: int):
      tree, model_state = own(cuts, stats, state, me, worker)
      if rescale == "train" and forward:
        tree = cuts.scale(tree, up=True)
      if not forward:
        tree = state.params.shared
      return fn(variables.own(loss_fn, tree, model_state))

    return cuts.blocks.switch(me, one_set)

  def reshard(state: SDPState, workers: int) -> SDPState:
    mine = state.params.held, state.params.whole, state.masters
    stacked = jax.tree.leaves((mine, state.opt_state))
    old = len(stacked[0]) if stacked else workers
    how = {"forward": forward, "owners": shard_optimizer}
    return resharding.reshard(state, cut(old), cut(workers), tx, **how)

  split = Parts(shared=P(), held=P(axis), whole=P(axis))
  specs = SDPState(P(), split, split, P(axis), P(axis))
  return Method("sdp", axis, init, step, params, specs, reshard, member=member)


def _check(masking, rescale, level, writers, loss_fn) -> None:
  for field, value, known in (
    ("masking", masking, MASKINGS),
    ("rescale", rescale, RESCALES),
  ):
    if value not in known:
      raise ValueError(f"sdp: `{field}` is {', '.join(known)}; got {value!r}.")
  if rescale != "none" and masking == "backward":
    raise ValueError(
      f"sdp: rescale={rescale!r} makes up for what is absent, but with "
      "masking='backward' every worker runs the whole model. Set "
      "rescale='none'."
    )
  if rescale != "none" and level != "neuron" and writers is None:
    raise ValueError(
      f"sdp: rescale={rescale!r} at level={level!r} needs `writers`: True in "
      "place of each parameter in which its block's output is linear, such as "
      "models.branch_writers(model, example)."
    )
  if isinstance(loss_fn, StatefulLoss) and loss_fn.stats != "averaged":
    raise ValueError(
      f"sdp: stats={loss_fn.stats!r} has no meaning between subnetworks; use "
      "stateful(loss_fn, stats='averaged'): the mean over the holders."
    )


def _is_none(x) -> bool:
  return x is None


def _filled(masters, targets):
  """What tx updates: masters, and where there are none the parameters."""
  if masters is None:
    return targets
  # A block is not among the targets, only among the masters.
  if isinstance(masters, dict) and isinstance(targets, dict):
    targets = {**masters, **targets}
  one = lambda m, t: t if m is None else m
  return jax.tree.map(one, masters, targets, is_leaf=_is_none)


def _as_variables(tree) -> Variables:
  if isinstance(tree, Variables):
    return tree if tree.model_state else tree._replace(model_state=())
  return Variables(tree, ())


def _before(fn, loss_fn):
  """loss_fn of fn(params)."""
  if isinstance(loss_fn, StatefulLoss):
    return loss_fn._replace(fn=_before(fn, loss_fn.fn))
  return lambda params, *rest: loss_fn(fn(params), *rest)
