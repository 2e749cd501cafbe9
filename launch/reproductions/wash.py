"""WASH and its neighbours on images: populations of four, equal updates.

Fashion-MNIST, a ResNet-18 of a quarter of the width in its form for large
images, which takes 7 x 7 values to its blocks here. Each member but DART's starts
from a model of its own and sees 32 images an update, in an order of its own.
BatchNorm's statistics are estimated anew for every model that is evaluated.
One learning rate for all, with a cosine to 0. `ddp` is one model that sees all
128 images of an update.
"""

from configs.wash import fashion_mnist
from launch import populations_table as shared

TITLE = "Fashion-MNIST, a narrow ResNet-18, populations of 4"
METRIC, UNIT, SCORES = shared.METRIC, shared.UNIT, shared.SCORES
CLAIM = shared.average_near_ensemble("wash, rate 0.5, tied", 1.0)
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
  "wash, rate 0.01": wash(0.01),
  "wash, rate 0.05": wash(0.05),
  "wash, rate 0.5": wash(0.5),
  "wash, rate 0.05, tied": wash(0.05, tied=True),
  "wash, rate 0.5, tied": wash(0.5, tied=True),
  "wash and optimizer, rate 0.05": wash(0.05, shuffle_optimizer=True),
  "sparta, rate 0.05": {
    "name": "sparta",
    "rate": 0.05,
    "layer_schedule": "decreasing",
  },
  "papa": PAPA,
  "papa, alpha 0.9": {**PAPA, "alpha": 0.9},
  "papa-all": {**PAPA, "variant": "all", **LATE},
  "papa-2": {**PAPA, "variant": "pair", **LATE},
  "dart": {"name": "dart", "joint_steps": STEPS // 2, "every": 2 * EVERY},
  "ddp": {"name": "ddp"},
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
    c.method.rate = None  # the config's own
    c.method.update(ROWS[row])
    # DART's first phase trains one model.
    c.population.same_init = row == "dart"
    if row == "ddp":
      c.mesh = {"data": DEVICES}
      c.evaluation.members = False
  return c
