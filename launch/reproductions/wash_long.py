"""WASH on images in longer runs: two epochs a member, where `wash` has half of one.

Everything as there but the steps, and half of its weight decay, which has four
times as long to take away what members began with.
"""

from launch import populations_table as shared
from launch.reproductions import wash

TITLE = "Fashion-MNIST, a narrow ResNet-18, populations of 4, 4,000 steps"
METRIC, UNIT, SCORES = shared.METRIC, shared.UNIT, shared.SCORES
NEAR = "wash, rate 0.2, tied"
CLAIM = shared.average_near_ensemble(NEAR, 1.0)
draw = shared.draw
DEVICES, FOLLOWS, against = wash.DEVICES, wash.FOLLOWS, wash.against
STEPS = 4000
ROWS = {row: wash.ROWS[row] for row in (shared.INDEPENDENT, NEAR)}


def config(row: str):
  """One row's config, but for the seed."""
  c = wash.config(row)
  c.steps = STEPS
  c.optimizer.weight_decay /= 2
  return c
