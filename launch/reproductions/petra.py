"""PETRA against back-propagation on images, by micro-batches an update.

Fashion-MNIST, a RevNet-18 of an eighth of the width on ten stages, one block
each as in the paper; 416 micro-batches of 64 images, k of them an update; the
paper's optimizer and rate, 0.1 for 256 images an update. Back-propagation is on one
device, with BatchNorm over the same micro-batches; its statistics are estimated
anew for every model that is evaluated.
"""

from ml_collections import ConfigDict

from configs.petra import fashion_mnist

DEVICES = 10
TITLE = "Fashion-MNIST, a narrow RevNet-18, 10 stages, micro-batches of 64"
METRIC = "validation_loss"
FOLLOWS = (
  "mesh",
  "steps",
  "batch_size",
  "optimizer.learning_rate",
  "optimizer.warmup_steps",
)
UNIT = "nats an image"
CLAIM = ("petra, k = 16", 5.0)
MICRO_BATCHES, MICRO = 416, 64
METHODS = {
  "back-propagation": {"name": "ddp"},
  "petra": {"name": "petra"},
  "petra, true inputs": {"name": "petra", "buffer": "input"},
  "petra, predicting": {"name": "petra", "predict": 1.0},
}
ROWS = {
  f"{name}, k = {k}": {**METHODS[name], "accumulate": k}
  for name, ks in (
    ("back-propagation", (1, 4, 16)),
    ("petra", (1, 4, 16)),
    ("petra, true inputs", (1,)),
    ("petra, predicting", (1, 4)),
  )
  for k in ks
}


def against(row: str) -> str:
  """Back-propagation with as many micro-batches an update."""
  return f"back-propagation, {row.rpartition(', ')[2]}"


def config(row: str):
  """One row's config, but for the seed."""
  c = fashion_mnist.get_config()
  k = ROWS[row]["accumulate"]
  with c.unlocked():
    c.steps = MICRO_BATCHES // k
    c.batch_size = MICRO * k
    c.optimizer.learning_rate = 0.1 * c.batch_size / 256
    c.optimizer.warmup_steps = c.steps // 10
    c.evaluation.every = 0
    c.evaluation.batch_size = 500  # a multiple of 10
    c.evaluation.recalibrate = 8
    c.checkpoint.every = 0
    c.method.update(ROWS[row])
    if c.method.name == "ddp":
      c.mesh = ConfigDict({"data": 1})
  return c
