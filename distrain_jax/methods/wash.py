"""WASH: a population whose members swap a few weights after every step.

Fournier, Nabli, Aminbeidokhti, Pedersoli, Belilovsky and Oyallon, "WASH: Train
your Ensemble with Communication-Efficient Weight Shuffling, then Average",
2024, https://arxiv.org/abs/2405.17517.

Members stay close enough for their average to be as good as their ensemble,
although a shuffle changes neither their average nor their distance from it.

The default exchange differs from the paper in what coordinates have to do with
each other, not in what happens to one: it is chosen with its layer's rate and
permuted uniformly. But chosen coordinates lie one a stratum, and N permutations,
a Latin square, serve all of a step's. So a member sends each other one K/N-th of
the K chosen values, and no index. Of two coordinates' deviations from the average
the expected product becomes 0, and -1/(N - 1) of what it was for those that stand
among the same N chosen ones.
"""

import functools
from typing import Any

import jax
import optax

from distrain_jax.method import LossFn, Method, StatefulLoss
from distrain_jax.population import members, moments, sparse, swapping

SHUFFLES = ("latin_square", "independent")


def wash(
  loss_fn: LossFn | StatefulLoss,
  tx: optax.GradientTransformation,
  *,
  axis: str = "population",
  rate: float = 0.01,
  layer_schedule: str = "decreasing",
  equal_volume: bool = False,
  depths: Any = None,
  exclude: tuple[str, ...] = (),
  shuffle_optimizer: bool = False,
  shuffle: str = "latin_square",
  period: int = 1,
  stop_after: int | None = None,
  tied: bool = False,
  relative_rate: sparse.Schedule | None = None,
  accumulate: int = 1,
  clip_norm: float | None = None,
  learning_rates: tuple[float, ...] | None = None,
  leave: tuple[int, ...] = (),
  inner: str | None = None,
) -> Method:
  """WASH around any loss, optimizer and pytree.

  Every member takes its own step on its own rows; then some coordinates are
  permuted among the members. Running statistics are never moved.

  Args:
    loss_fn: `(params, batch, key) -> (loss, aux)`, or `stateful(...)`, whose
      statistics are each member's own whatever its `stats`. Its key is this
      member's own for this step.
    tx: each member's own optimizer; it sees that member's gradient.
    axis: the mesh (or vmap) axis of the members.
    rate: fraction of the coordinates that a shuffle moves in the layer with
      the highest rate, in [0, 1]. 0 is `ensemble` to the bit. The number of
      shuffles of a coordinate in the whole run is what carries over between
      tasks: tens of them keep members averageable, a few hurt them.
    layer_schedule: "decreasing" from `rate` in the first layer to 0 in the
      last, as in the paper; "constant"; or "increasing".
    equal_volume: scales the layers' rates so that as many coordinates move as
      with "constant", of those that are not excluded.
    depths: a tree like the parameters with the layer of each leaf, from 0, or
      of each index of its first axis, where layers are stacked:
      `models.depths`. None: every leaf is a layer, in the tree's order.
    exclude: patterns of paths, such as "*/scale" or "stage_0_*/bias", of
      parameters that stay with their members: their layers' others move as
      they did. `*` may span several parts of a path.
    shuffle_optimizer: the optimizer's moments move with their coordinates.
    shuffle: "latin_square", see above; or "independent", every coordinate with
      its own coin and permutation: the paper's law, by gathering all members
      on each. It is there to compare with.
    period: steps from one shuffle to the next. Volume counts, not frequency:
      `rate` is of one shuffle.
    stop_after: shuffles end with this many steps; None: never. Members that
      are shuffled while the learning rate goes to 0 are worse alone.
    tied: a shuffle takes place with the chance `relative_rate(step)`.
    relative_rate: (step) -> learning rate relative to its peak, in [0, 1].
    accumulate: micro-batches that each member's share is cut into.
    clip_norm: largest global norm of a member's own gradient; None: no
      clipping.
    learning_rates: a factor of the updates of each member, by its number;
      None: 1.
    leave: numbers of members that are not there (any more): a population of N
      has the first N numbers without them. When it adopts a state, members
      whose numbers it has go on as they were; other numbers, and members that
      are not finite, start from the average of the rest. So with as many members
      as before, who left is replaced; name who left earlier, too.
    inner: a second axis, of members that share a device; see `distribute`.

  Returns:
    A `Method`; its `params` is the members' average. `run.init(...,
    per_worker=True)` starts them from different models. Metrics: loss,
    grad_norm (means over members, before clipping), worst_loss, worst_member
    and loss_fn's aux.

  Raises:
    ValueError: if an option is out of range, or the optimizer's state is not
      made of trees like the parameters although it is to be shuffled; from
      `init`, if depths, patterns or that state do not fit the model.
  """
  options = members.Options(
    axis, accumulate, clip_norm, learning_rates, leave, inner
  )
  chosen = sparse.Sparse(
    rate,
    layer_schedule,
    equal_volume,
    depths,
    period,
    stop_after,
    tied,
    relative_rate,
    exclude,
  )
  if shuffle not in SHUFFLES:
    raise ValueError(
      f"wash: `shuffle` is one of {', '.join(SHUFFLES)}; got {shuffle!r}."
    )

  def exchange(member: members.Member, rates, key):
    trees, rebuild = [member.params], None
    if shuffle_optimizer:
      moved, rebuild = moments.split("wash", member.opt_state, member.params)
      trees += moved
    if shuffle == "independent":
      trees = swapping.shuffle_independently(trees, rates, key, options.axes)
    else:
      parts = functools.partial(swapping.shuffle_parts, axes=options.axes)
      trees = swapping.exchange_chosen(trees, rates, key, parts, options.axes)
    member = member._replace(params=trees[0])
    if rebuild is not None:
      member = member._replace(opt_state=rebuild(trees[1:]))
    return member

  def can_follow(params):
    if shuffle_optimizer:
      moments.split("wash", jax.eval_shape(tx.init, params), params)

  return sparse.population(
    "wash", loss_fn, tx, options, chosen, exchange, can_follow
  )
