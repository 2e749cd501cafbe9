"""What a worker of SDP computes, without the others and on one device.

For measurements: tables, cuts and losses are those of `sdp`, but a subnetwork
is taken from the whole model on the spot, and no message is sent.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distrain_jax import gradients
from distrain_jax.method import (
  Batch,
  LossFn,
  Params,
  StatefulLoss,
  Variables,
)
from distrain_jax.methods.sdp import cutting, diagnosis, tables
from distrain_jax.methods.sdp.cutting import Cut
from distrain_jax.methods.sdp.sdp import sdp


class Alone(NamedTuple):
  """The subnetworks of all workers; made by `alone`; static.

  Workers are given twice: `me`, whose units are meant, may be traced; `worker`
  is a number, of any worker that holds the same whole blocks as `me` (see
  `whole.Blocks.switch`), or `me` itself.
  """

  loss_fn: LossFn | StatefulLoss
  model: cutting.Model
  params: Cut
  stats: Cut
  forward: bool
  scaled: bool  # while training

  @property
  def workers(self) -> int:
    return self.params.blocks.workers

  def own(self, whole: Variables, me: jax.Array | int, worker: int):
    """The parameters that it trains and the statistics that it has."""

    def one(cut: Cut, tree):
      parts, blocks = cut.take(tree, me)
      held = {name: blocks[name] for name in cut.blocks.of(worker)}
      return cut.merge(cut.nets.join(parts), held)

    pairs = zip((self.params, self.stats), whole)
    return Variables(*(one(cut, tree) for cut, tree in pairs))

  def gradient(
    self,
    whole: Variables,
    batch: Batch,
    key: jax.Array,
    me: jax.Array | int,
    worker: int,
  ) -> gradients.Gradient:
    """Its loss on these rows and the gradient of what it trains."""

    def given(tree):
      if not self.forward:
        return self.params.put(whole.params, tree, me)
      return self.params.scale(tree, up=True) if self.scaled else tree

    def before(fn):
      return lambda params, *rest: fn(given(params), *rest)

    loss_fn = self.loss_fn
    if isinstance(loss_fn, StatefulLoss):
      loss_fn = loss_fn._replace(fn=before(loss_fn.fn))
    else:
      loss_fn = before(loss_fn)
    gradient = gradients.gradient_fn(loss_fn)
    if self.forward:
      gradient = diagnosis.checked(gradient, self.params, self.stats)
    return gradient(*self.own(whole, me, worker), batch, key)

  def spread(self, mine: Params, me: jax.Array | int) -> Params:
    """A tree like what it trains -> the whole model's, 0 where it holds none.

    In float32 or wider.
    """
    like = self.model.whole.params
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), like)
    mine = jax.tree.map(gradients.at_least_float32, mine)
    return self.params.put(zeros, mine, me)


def _wide(x):
  return jnp.promote_types(x.dtype, jnp.float32)


def alone(
  loss_fn: LossFn | StatefulLoss,
  *,
  workers: int,
  names: Any,
  shapes: Any,
  masking: str = "forward",
  rescale: str = "none",
  writers: Any = None,
  redraw_every: int | None = None,
  **options: Any,
) -> Alone:
  """The subnetworks that `sdp` would train, each to be run by itself.

  Args:
    loss_fn, names, shapes, masking, rescale, writers: as of `sdp`.
    workers: how many.
    redraw_every: as of `sdp`; the subnetworks are those of the first draw.
    **options: of `cut`, as of `sdp`.

  Raises:
    ValueError: as `sdp`, and for a number of workers that cannot share so.
  """
  # Made for its refusals alone.
  structure = {"names": names, "shapes": shapes, "writers": writers}
  how = {"masking": masking, "rescale": rescale, "redraw_every": redraw_every}
  sdp(loss_fn, optax.identity(), **structure, **how, **options)
  forward = masking == "forward"
  model, (params, stats) = cut(
    **structure, workers=workers, forward=forward, **options
  )
  scaled = rescale == "train"
  return Alone(loss_fn, model, params, stats, forward, scaled)


def cut(
  names: Any,
  shapes: Any,
  *,
  workers: int,
  forward: bool = True,
  coverage: tables.Coverage = 0.5,
  level: str = "neuron",
  blocks: Collection[str] = (),
  assignment: tables.Assignment = "cyclic",
  seed: int = 0,
  shared: Collection[str] = (),
  writers: Any = None,
) -> tuple[cutting.Model, tuple[Cut, Cut]]:
  """(the model, (its parameters, its statistics)) as `sdp` cuts them."""
  coverage = tables.of_levels(level, coverage)
  tables.check(level, coverage, assignment)
  model = cutting.read(
    names,
    shapes,
    level=level,
    assignment=assignment,
    shared=shared,
    blocks=blocks,
    writers=writers,
  )
  how = {"level": level, "coverage": coverage, "assignment": assignment}
  return model, model.cut(workers, forward, None, seed=seed, **how)
