"""Which blocks go on which stage: neighbours together, the heaviest stage light."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from distrain_jax import stages
from distrain_jax.stages import Block


class Partition(NamedTuple):
  """Blocks on stages; prints as a table."""

  stages: tuple[tuple[Block, ...], ...]
  flops: tuple[float, ...]  # of each stage's pass forward

  @property
  def imbalance(self) -> float:
    """The heaviest stage's operations over the mean: 1 is perfect.

    A pipeline goes at the pace of its slowest stage, so that this is what it
    loses.
    """
    return max(self.flops) * len(self.flops) / max(sum(self.flops), 1e-30)

  def __str__(self) -> str:
    rows = [
      f"stage {s}: {f / 1e6:.3g} MFLOP forward: {', '.join(b.name for b in cut)}"
      for s, (cut, f) in enumerate(zip(self.stages, self.flops))
    ]
    return "\n".join([*rows, f"imbalance {self.imbalance:.3f} (1: none)"])


def partition(
  blocks: Sequence[Block],
  count: int,
  *,
  shapes: Any,
  example: Any,
  inputs: str | None = None,
) -> Partition:
  """Cuts a network into stages, the slowest of which is as fast as can be.

  Args:
    blocks: of the whole network.
    count: how many stages.
    shapes: the network's params, or `Variables`, as arrays or shapes.
    example: a micro-batch, as arrays or shapes.
    inputs: see `stages.inputs_and_targets`.

  Raises:
    ValueError: if there are fewer blocks than stages, or they do not chain.
  """
  blocks = stages.check_blocks(blocks)
  flops = block_flops(blocks, shapes=shapes, example=example, inputs=inputs)
  cuts = cut_evenly(flops, count)
  cut = tuple(tuple(blocks[i] for i in part) for part in cuts)
  return Partition(cut, tuple(sum(flops[i] for i in part) for part in cuts))


def block_flops(
  blocks: Sequence[Block], *, shapes: Any, example: Any, inputs: str | None
) -> list[float]:
  """Floating-point operations of each block's pass forward.

  As XLA counts them before it optimizes the program; nothing is compiled, and
  blocks of one kind are counted once.
  """
  x, targets = stages.inputs_and_targets(example, inputs)
  flows = stages.abstract_streams(blocks, shapes, x, targets)
  params, model_state = stages.parts(shapes)
  key = jax.eval_shape(lambda: jax.random.key(0))
  known: dict[Any, float] = {}
  found = []
  for block, flow in zip(blocks, flows):
    own = stages.of_block(block.name, params, model_state)
    kind = block.name if block.kind is None else block.kind
    kind = (kind, stages.described(flow))
    if kind not in known:
      if block.loss is not None:
        lowered = jax.jit(block.loss).lower(*own, flow, targets, key)
      else:
        lowered = jax.jit(block.forward).lower(*own, flow, key)
      known[kind] = float((lowered.cost_analysis() or {}).get("flops", 0.0))
    found.append(known[kind])
  return found


def cut_evenly(costs: Sequence[float], count: int) -> list[range]:
  """Positions of neighbours, in `count` parts, the largest sum least.

  Of equally good cuts, the one whose earlier parts are shorter.

  >>> [list(part) for part in cut_evenly([1, 1, 1, 3], 2)]
  [[0, 1, 2], [3]]
  """
  n = len(costs)
  if not 1 <= count <= n:
    raise ValueError(
      f"stages: {n} blocks cannot be cut into {count} stages: each needs a "
      f"block. Use 1 to {n} stages, or a deeper network."
    )
  upto = np.concatenate([[0.0], np.cumsum(costs)])
  # best[j][i]: the least maximum of the first i blocks in j parts.
  best = np.full((count + 1, n + 1), np.inf)
  best[0, 0] = 0.0
  start = np.zeros((count + 1, n + 1), int)
  for j in range(1, count + 1):
    for i in range(j, n + 1):
      starts = range(j - 1, i)
      worst = [max(best[j - 1, k], upto[i] - upto[k]) for k in starts]
      at = int(np.argmin(worst))
      best[j, i], start[j, i] = worst[at], starts[at]
  parts, end = [], n
  for j in range(count, 0, -1):
    parts.append(range(start[j, end], end))
    end = int(start[j, end])
  return parts[::-1]
