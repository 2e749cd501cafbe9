"""ACCO and its baselines on text, at equal tokens and updates.

Python's standard library, byte by byte; a Llama of 25,080 parameters; eight
workers, 32 rows of 128 bytes an update for every method. All have one learning
rate; DDP and ACCO are also trained at twice that rate, where DDP learns more.
"""

from configs import text

TITLE = "Text, a tiny Llama, 8 workers, 4,096 bytes an update"
METRIC = "validation_loss"
UNIT = "nats a byte"
CLAIM = ("acco", 0.5)  # not more than so many per cent above its baseline
RATE = 4e-3
WARMUP = 48  # synchronous steps: a tenth
TWICE = ", twice the rate"

# Name of a row -> options of its method. An update has two micro-batches a
# worker: ACCO has one in each of its halves.
DDP = {"name": "ddp", "accumulate": 2}
ACCO = {"name": "acco", "accumulate": 1}
DPU = {"name": "dpu", "accumulate": 2}
ROWS = {
  "ddp": DDP,
  "zero1": {"name": "zero1", "accumulate": 2},
  "acco": ACCO,
  "acco, estimate in bfloat16": ACCO | {"estimate_dtype": "bfloat16"},
  "acco, estimate in int8": ACCO | {"estimate_dtype": "int8"},
  "acco, warmup": ACCO | {"warmup": WARMUP},
  "dpu": DPU,
  "dpu, warmup": DPU | {"warmup": WARMUP},
  "weight_prediction": {"name": "weight_prediction", "accumulate": 2},
  "local_sgd": {"name": "local_sgd", "accumulate": 2, "sync_every": 8},
  "diloco": {"name": "diloco", "accumulate": 2, "sync_every": 30},
  "ddp" + TWICE: DDP,
  "acco" + TWICE: ACCO,
}


def against(row: str) -> str:
  """The row that it is compared with."""
  return "ddp" + TWICE if row == "acco" + TWICE else "ddp"


def config(row: str):
  """One row's config, but for the seed."""
  c = text.get_config()
  with c.unlocked():
    c.steps = 480
    c.batch_size = 32
    size = {"embed": 24, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 64}
    c.model.update(size)
    c.optimizer.learning_rate = 2 * RATE if row.endswith(TWICE) else RATE
    c.optimizer.warmup_steps = 48
    c.evaluation.every = 0
    c.checkpoint.every = 240
    c.method.update(ROWS[row])
  return c
