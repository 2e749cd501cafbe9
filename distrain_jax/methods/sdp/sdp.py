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
receives the rest after every update. Beside the workers' axis a mesh may have
others; what a worker holds lies replicated over them.

Where the paper leaves a choice open: masks are deterministic and balanced
(`assignments`), gradients are divided by the number of holders, and the model
to evaluate is the whole one.
"""

from collections.abc import Collection
from typing import Any

import optax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distrain_jax import gradients
from distrain_jax.method import LossFn, Method, StatefulLoss
from distrain_jax.methods.sdp import cutting, tables
from distrain_jax.methods.sdp.subnetworks import Parts
from distrain_jax.methods.sdp.worker import SDPState, Worker

MASKINGS = ("forward", "backward")
RESCALES = ("none", "train", "test")


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
  redraw_every: int | None = None,
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
      out by their bytes; "nested": see `rings.nested`; or a function, see
      `tables.Assignment`.
    seed: of the shuffle.
    redraw_every: steps after which the masks are drawn anew; what is held moves
      to its new holders, with its optimizer's state. With assignment="shuffled"
      `worker.DRAWS` draws take turns; "rolling" moves every window on by one group, as
      FedRolex does (https://arxiv.org/abs/2212.01548). None: never.
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
  coverage = tables.of_levels(level, coverage)
  tables.check(level, coverage, assignment)
  tables.check_redraw(assignment, redraw_every)
  gradients.check_accumulate("sdp", accumulate)
  gradients.check_clip_norm("sdp", clip_norm)
  gradients.check_dtype("sdp", "wire_dtype", wire_dtype)
  gradients.check_dtype("sdp", "param_dtype", param_dtype)
  model = cutting.read(
    names,
    shapes,
    level=level,
    assignment=assignment,
    shared=shared,
    blocks=blocks,
    writers=writers,
  )
  held_by = {"level": level, "coverage": coverage, "assignment": assignment}
  worker = Worker(
    loss_fn=loss_fn,
    tx=tx,
    axis=axis,
    model=model,
    tables={**held_by, "seed": seed},
    forward=masking == "forward",
    rescale=rescale,
    shard_optimizer=shard_optimizer,
    redraw_every=redraw_every,
    accumulate=accumulate,
    clip_norm=clip_norm,
    wire_dtype=wire_dtype,
    param_dtype=param_dtype,
  )
  # Others of these may have the same shapes, with other parts in them.
  placed_by = {
    "assignment": getattr(assignment, "__qualname__", assignment),
    "seed": seed if assignment == "shuffled" else None,
    "redraw_every": redraw_every,
    "shared": "/".join(shared) or None,
  }
  placed_by = {k: v for k, v in placed_by.items() if v is not None}
  split = Parts(shared=P(), held=P(axis), whole=P(axis))
  return Method(
    "sdp",
    axis,
    init=worker.init,
    step=worker.step,
    params=worker.params,
    specs=SDPState(P(), split, split, P(axis), P(axis)),
    reshard=worker.reshard,
    layout=", ".join(f"{k}={v}" for k, v in placed_by.items()),
    member=worker.member,
  )


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
