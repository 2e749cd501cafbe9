"""SDP and its baselines on images: equal updates, and equal FLOPs.

Fashion-MNIST, a ResNet-18 of an eighth of the width; eight workers, 128 images
an update. At block level the five residual blocks that keep the shape are held
whole, at neuron level the channels inside of all eight are sampled. BatchNorm's
statistics are estimated anew for every model that is evaluated, the baselines'
too. One learning rate for all.
"""

from configs import fashion_mnist

TITLE = "Fashion-MNIST, a narrow ResNet-18, 8 workers, 128 images an update"
METRIC = "validation_loss"
FOLLOWS = ("steps", "evaluation.members")
UNIT = "nats an image"
CLAIM = ("block forward, 1/2", 0.0)
STEPS = 200
COVERAGES = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25}
EQUAL = ", equal FLOPs"
DDP = {"name": "ddp"}
NARROW = "ddp, half as wide"
DROPPED = {  # as much as at a coverage of 1/2
  "ddp, dropout 1/2": {"dropout": 0.5},
  "ddp, stochastic depth 1/2": {"stochastic_depth": 0.5},
  NARROW: {"width": 1 / 16},
}


def sdp(level: str, masking: str, coverage: str):
  return {
    "name": "sdp",
    "level": level,
    "masking": masking,
    "coverage": COVERAGES[coverage],
  }


ROWS = {
  "ddp": DDP,
  **{
    f"{level} {masking}, {c}": sdp(level, masking, c)
    for level in ("neuron", "block")
    for masking in ("forward", "backward")
    for c in COVERAGES
  },
  **{
    f"{level} forward, 1/2{EQUAL}": sdp(level, "forward", "1/2")
    for level in ("neuron", "block")
  },
  **dict.fromkeys(DROPPED, DDP),
  f"{NARROW}{EQUAL}": DDP,
}


def against(row: str) -> str:
  """The row that it is compared with."""
  del row
  return "ddp"


def config(row: str):
  """One row's config, but for the seed."""
  c = fashion_mnist.get_config()
  with c.unlocked():
    c.steps = STEPS
    if row.endswith(EQUAL):  # a quarter of the FLOPs, where all is narrower
      c.steps *= 4 if row.startswith(NARROW) else 2
    c.model.width = 1 / 8
    c.model.update(DROPPED.get(row.removesuffix(EQUAL), {}))
    c.optimizer.learning_rate = 8e-3
    c.evaluation.every = 0
    c.evaluation.recalibrate = 8
    c.evaluation.members = ROWS[row]["name"] == "sdp"
    c.checkpoint.every = 0
    c.method.update(ROWS[row])
  return c
