"""SDP beside DDP after as many floating-point operations, at three coverages.

Text and forward masking as in launch/reproductions/sdp.py, for 1 / coverage as
many updates: as many operations in what is sampled, so that what is shared is
computed more often than by DDP. With backward masking a step computes as much as
DDP's, and as many updates are as many operations.
"""

from launch.reproductions import sdp as table

TITLE = "Text, a Llama of 82,208 parameters, 8 workers: equal FLOPs"
METRIC, UNIT = table.METRIC, table.UNIT
FOLLOWS = table.FOLLOWS
CLAIM = ("block, 1/2", 0.0)
ROWS = {
  "ddp": table.DDP,
  **{
    f"{level}, {coverage}": table.sdp(level, "forward", coverage)
    for level in table.LEVELS
    for coverage in table.COVERAGES
  },
}


def against(row: str) -> str:
  """The row that it is compared with."""
  del row
  return "ddp"


def config(row: str):
  """One row's config, but for the seed."""
  c = table.config("ddp")
  with c.unlocked():
    c.method.update(ROWS[row])
    c.steps = round(table.STEPS / (c.method.coverage or 1))
    c.optimizer.warmup_steps = c.steps // 10
  return c
