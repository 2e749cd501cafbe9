"""WASH and its neighbours on images: populations of four, equal updates.

Fashion-MNIST, a ResNet-18 of a quarter of the width in its form for large
images, which takes 7 x 7 values to its blocks here. Each member but DART's starts
from a model of its own and sees 32 images an update, in an order of its own.
BatchNorm's statistics are estimated anew for every model that is evaluated.
One learning rate and one weight decay for all, with a cosine to 0. `ddp` is one
model that sees all 128 images of an update. The volume of a rate that is tied to
the learning rate is half of the same constant rate's.
"""

from configs.wash import fashion_mnist
from launch import populations_table as shared

TITLE = "Fashion-MNIST, a narrow ResNet-18, populations of 4"
METRIC, UNIT, SCORES = shared.METRIC, shared.UNIT, shared.SCORES
CLAIM = shared.average_near_ensemble("wash, rate 0.2, tied", 1.0)
draw = shared.draw
DEVICES = 4
FOLLOWS = ("mesh", "evaluation.members", "population.same_init")
STEPS = 1000
EVERY = 50  # steps between the averages of PAPA-all, PAPA-2 and DART
PAPA = {"name": "papa"}
LATE = {"every": EVERY, "stop_after": STEPS - EVERY}


def wash(rate: float, **options):
  return {"name": "wash", "rate": rate, **options}


ROWS = {
  shared.INDEPENDENT: {"name": "ensemble"},
  "wash, rate 0.2, tied": wash(0.2, tied=True),
  "wash and optimizer, rate 0.2, tied": wash(
    0.2, tied=True, shuffle_optimizer=True
  ),
  "sparta, rate 0.2, tied": {
    "name": "sparta",
    "rate": 0.2,
    "tied": True,
    "layer_schedule": "decreasing",
  },
  "papa": PAPA,
  "papa-all": {**PAPA, "variant": "all", **LATE},
  "dart": {"name": "dart", "joint_steps": STEPS // 2, "every": 2 * EVERY},
  "ddp": {"name": "ddp"},
  "wash, rate 0.02, tied": wash(0.02, tied=True),
  "wash, rate 1, tied": wash(1.0, tied=True),
  "wash, rate 0.2": wash(0.2),
  "wash, rate 0.2, stopped": wash(0.2, stop_after=7 * STEPS // 10),
  "papa, alpha 0.9": {**PAPA, "alpha": 0.9},
  "papa-2": {**PAPA, "variant": "pair", **LATE},
}


def against(row: str) -> str:
  """The row that it is compared with."""
  del row
  return shared.INDEPENDENT


def config(row: str):
  """One row's config, but for the seed."""
  c = fashion_mnist.get_config()
  with c.unlocked():
    c.steps = STEPS
    c.checkpoint.every = 0
    c.method.rate = c.method.tied = None  # the config's own
    c.method.update(ROWS[row])
    # DART's first phase trains one model.
    c.population.same_init = row == "dart"
    if row == "ddp":
      c.mesh = {"data": DEVICES}
      c.evaluation.members = False
  return c
