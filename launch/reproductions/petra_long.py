"""PETRA on images in longer runs: four epochs, where `petra` has half of one.

Sixteen micro-batches an update, where the gap of `petra` is smallest; all else
is as there.
"""

from launch.reproductions import petra

TITLE = (
  "Fashion-MNIST, a narrow RevNet-18, 10 stages, four epochs of "
  "micro-batches of 64, 16 an update"
)
METRIC, UNIT, DEVICES = petra.METRIC, petra.UNIT, petra.DEVICES
FOLLOWS, against = petra.FOLLOWS, petra.against
CLAIM = petra.CLAIM
EPOCHS = 4
ROWS = {
  row: petra.ROWS[row] for row in ("back-propagation, k = 16", "petra, k = 16")
}


def config(row: str):
  """One row's config, but for the seed."""
  c = petra.config(row)
  c.steps = EPOCHS * 55_000 // c.batch_size
  c.optimizer.warmup_steps = c.steps // 10
  return c
