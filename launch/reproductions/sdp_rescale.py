"""What makes up for what is absent: nothing, or a factor in the whole model.

Text and forward masking as in launch/reproductions/sdp.py, whose table also has
a factor in training. Each row is compared with the same masks without rescaling,
which train the same parameters and differ in the model that is evaluated.
"""

from launch.reproductions import sdp as table

TITLE = "Text, a Llama of 82,208 parameters, 8 workers: rescaling"
METRIC, UNIT = table.METRIC, table.UNIT
FOLLOWS = ()
CLAIM = ("block, 1/2, in test", 0.0)
WHEN = {"": "none", ", in test": "test"}
ROWS = {
  f"{level}, {coverage}{how}": table.sdp(level, "forward", coverage, when)
  for level in table.LEVELS
  for coverage in table.COVERAGES
  for how, when in WHEN.items()
}


def against(row: str) -> str:
  """The row that it is compared with."""
  return ", ".join(row.split(", ")[:2])


def config(row: str):
  """One row's config, but for the seed."""
  c = table.config("ddp")
  with c.unlocked():
    c.method.update(ROWS[row])
  return c
