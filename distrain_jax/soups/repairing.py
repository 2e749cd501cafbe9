"""REPAIR: an averaged network whose units vary as much as the members' do.

Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation
Repair", 2022, https://arxiv.org/abs/2211.08403.

Averaged weights give pre-activations of too little variance, more so with every
layer. Here each channel of the average is rescaled and shifted so that its mean
and standard deviation are the weighted means of the members'. As in the paper,
the outputs of the network itself are left alone; unlike there, statistics are
those of all batches together, and the corrected network has them exactly.

`repair` takes models and batches, for what is done once. `repairer` makes a
function that corrects the averages that the members of a population become
while they train, inside their step, by the rows that they just saw.

Letters in shapes: k batches, c channels out of a layer.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from distrain_jax.population.averages import Repair
from distrain_jax.soups import averages, channels

EXACT = 1e-4  # how near a statistic has to come, of mean and deviation


class Repaired(NamedTuple):
  """What `repair` returns."""

  model: Any
  layers: tuple[str, ...]  # which were corrected, in the order of the calls
  left: dict[str, str]  # the other Dense and Conv layers -> why not


def repair(
  module: nn.Module,
  models: Sequence[Any],
  batches: Iterable[Any],
  *,
  weights: Sequence[float] | None = None,
  inputs: str = "image",
  layers: Callable[[str], bool] | None = None,
) -> Repaired:
  """The weighted average of models, its Dense and Conv layers corrected.

  With (m, s) mean and deviation of a channel's pre-activation y over all rows
  (and places of a convolution), for the average, and (M, S) the weighted means
  of the members': y becomes (y - m) S / s + M, by new kernels and biases. At
  first all layers at once, in one pass over the batches: what is before a layer
  is corrected batch by batch when its y is measured. Of several batches that is
  a good guess; further passes, at most one a layer, make it exact on them.

  A layer without a bias has no place for the shift and is left as it is. In our
  models a BatchNorm or GroupNorm follows it. Where BatchNorm follows a layer,
  with a bias or not, its own statistics undo any rescaling and shift: nothing
  has to be done there but to estimate them anew for the average, which the
  caller does in any network with BatchNorm, after this (`train.recalibrator`,
  or `config.evaluation.recalibrate`). Such networks are run in training mode
  here, by the statistics of the batches. A layer with a bias before any other
  norm is corrected as all others.

  Args:
    module: a Linen module, `apply(variables, x, train=...)`, which calls each
      of its `nn.Dense`, `nn.Conv` or our layers of these names at most once.
    models: its members: params, or `Variables`, as for `uniform`.
    batches: of training data; rows count alike.
    weights: of the members; None: equal.
    inputs: key of the module's input in a batch.
    layers: (path, as "stage_0_block_0/conv_0") -> whether to correct it; None:
      all but the layer that is called last, whose outputs are the network's.

  Raises:
    ValueError: as `weighted`; for no batches; if there is nothing to correct;
      for a layer that is called twice or stacked by `nn.scan`: its channels
      have several statistics but one place in the parameters (or none).
  """
  if weights is None:
    merged = averages.uniform(models)
    weights = [1 / len(models)] * len(models)
  else:
    merged = averages.weighted(models, weights)
    weights = averages.check_weights("repair", weights, len(models))
  batches = [batch[inputs] for batch in batches]
  if not batches:
    raise ValueError(
      "repair: `batches` is empty, but the layers' statistics are to be those "
      "of some batches. Pass at least one."
    )
  chosen, left = channels.chosen(module, models[0], batches[0], layers)
  forward = jax.jit(lambda *args: channels.measure(module, chosen, *args))
  rows = [len(x) for x in batches]
  first, seen = [], [[] for _ in models]
  for x in batches:
    each = [forward(model, x, None) for model in models]
    first.append(forward(merged, x, _weighted(weights, each)))
    for of_model, statistics in zip(seen, each):
      of_model.append(statistics)
  target = _weighted(weights, [_pool(x, rows) for x in seen])
  model = channels.corrected(merged, _pool(first, rows), target)
  for _ in chosen:
    own = _pool([forward(model, x, None) for x in batches], rows)
    if all(_near(own[name], target[name]) for name in chosen):
      break
    model = channels.corrected(model, own, target)
  return Repaired(model, chosen, left)


def repairer(
  module: nn.Module,
  model: Any,
  example: Any,
  *,
  inputs: str = "image",
  layers: Callable[[str], bool] | None = None,
  pooled: bool = True,
) -> Repair:
  """REPAIR as a part of a step: `papa(..., variant="all", repair=...)`.

      shapes = models.zoo.abstract(module, batch["image"])
      mend = soups.repairer(module, shapes, batch["image"])
      method = dj.papa(loss_fn, tx, variant="all", every=500, repair=mend)

  Each member measures its own model (M, S are the members' means) on its own
  rows of the step, then the average, whose layers are corrected as they are
  measured, as in `repair` with one batch: its statistics on those rows are then
  the members' means, to rounding. It costs two forward passes on these rows.

  The code released with PAPA (https://arxiv.org/abs/2304.03094) takes several
  batches for it, of convolutions only, and measures each member's average on
  that member's own data: copies of one average are corrected differently, and
  none is exact on other members' data. Here an average that all members become
  is measured on the rows of all of them: it stays one model, judged by N times
  as many rows, for two all-reduces a layer of c numbers each.

  Args:
    module, inputs, layers: as for `repair`.
    model: one member's params or `Variables`, or their shapes.
    example: an input, or its shape; the number of its rows does not matter.
    pooled: False: averages are measured on each member's own rows, whoever
      shares them, as in that code.

  Raises:
    ValueError: as `repair`, for the module and its layers, at once.
  """
  chosen, _ = channels.chosen(module, model, example, layers)
  measure = functools.partial(channels.measure, module, chosen)

  def run(own, average, rows, mean, sharing):
    x = rows.batch[inputs]
    target = mean(measure(own, x))
    over = lambda a: a
    if pooled and sharing is not None:
      over = functools.partial(jax.lax.pmean, axis_name=sharing)
    return channels.corrected(
      average, measure(average, x, target, over), target
    )

  return run


def _pool(batches, rows) -> dict[str, np.ndarray]:
  """Statistics of all rows, in float64, from those of each batch."""

  def one(*found):
    mean, deviation = np.moveaxis(np.array(found, np.float64), 1, 0)  # (k, c)
    whole = np.average(mean, 0, rows)
    apart = np.square(mean - whole[None])
    variance = np.average(np.square(deviation) + apart, 0, rows)
    return np.stack([whole, np.sqrt(variance)])

  return jax.tree.map(one, *batches)


def _weighted(weights, each):
  """The weighted mean of the members' statistics."""
  mean = lambda *xs: sum(w * x for w, x in zip(weights, xs))
  return jax.tree.map(mean, *each)


def _near(own, target) -> bool:
  """Whether means and deviations are what they should be."""
  return bool(np.all(np.abs(own - target) <= EXACT * np.abs(target).sum(0)))
