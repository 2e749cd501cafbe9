"""PETRA against back-propagation on text, with SGD and with AdamW.

Python's standard library, byte by byte; a reversible decoder of four layers on
eight stages; 960 micro-batches of 4 rows of 64 bytes, four of them an update.
Back-propagation is on one device.
Rates from the best for back-propagation to one that is too low for it.
"""

from ml_collections import ConfigDict

from configs.petra import text

TITLE = (
  "Text, a reversible decoder of 82,208 parameters, 8 stages, AdamW and SGD"
)
METRIC = "validation_loss"
FOLLOWS = (
  "mesh",
  "optimizer.learning_rate",
  "optimizer.name",
  "optimizer.weight_decay",
  "optimizer.nesterov",
)
UNIT = "nats a byte"
CLAIM = ("petra, sgd at 0.01", 5.0)
K, ROWS_MICRO, STEPS = 4, 4, 240
SGD = {"name": "momentum", "nesterov": True, "weight_decay": 0.0}
OPTIMIZERS = {
  "adamw at 0.008": {"name": "adamw", "learning_rate": 8e-3},
  "adamw at 0.002": {"name": "adamw", "learning_rate": 2e-3},
  "sgd at 0.4": SGD | {"learning_rate": 0.4},
  "sgd at 0.1": SGD | {"learning_rate": 0.1},
  "sgd at 0.01": SGD | {"learning_rate": 0.01},
}
PREDICTED = ("adamw at 0.008", "adamw at 0.002", "sgd at 0.4", "sgd at 0.1")
BACK = {"name": "ddp"}
PETRA = {"name": "petra"}
ROWS = {
  **{f"back-propagation, {name}": BACK for name in OPTIMIZERS},
  **{f"petra, {name}": PETRA for name in OPTIMIZERS},
  "petra, true inputs, adamw at 0.008": {**PETRA, "buffer": "input"},
  "petra, scaled by delay, adamw at 0.008": {**PETRA, "delay_exponent": 0.5},
  **{f"petra, predicting, {x}": {**PETRA, "predict": 1.0} for x in PREDICTED},
}


def against(row: str) -> str:
  """Back-propagation with the same optimizer."""
  return f"back-propagation, {row.rpartition(', ')[2]}"


def config(row: str):
  """One row's config, but for the seed."""
  c = text.get_config()
  with c.unlocked():
    c.steps = STEPS
    c.batch_size = K * ROWS_MICRO
    c.data.length = 64
    size = {"embed": 32, "layers": 4, "heads": 8, "kv_heads": 8, "head_dim": 4}
    c.model.update(size, mlp=128)
    c.optimizer.update(OPTIMIZERS[row.rpartition(", ")[2]])
    c.optimizer.warmup_steps = c.steps // 10
    c.evaluation.every = 0
    c.checkpoint.every = 0
    c.method.update(ROWS[row], accumulate=K)
    if c.method.name == "ddp":
      c.mesh = ConfigDict({"data": 1})
  return c
