"""ACCO against DDP by learning rate, on a larger model than acco.py's.

Python's standard library, byte by byte; the tiny Llama, 803,968 parameters;
eight workers, 200 updates of 32 rows of 128 bytes, half as many updates as
configs/text.py has: twelve runs of about a minute on two idle cores. Two rates,
since one may favour either method.
"""

from configs import text

TITLE = "Text, a Llama of 803,968 parameters, 8 workers, 4,096 bytes an update"
METRIC = "validation_loss"
UNIT = "nats a byte"
STEPS = 200
RATES = (2e-3, 4e-3)
# An update has two micro-batches a worker: ACCO has one in each of its halves.
METHODS = {
  "ddp": {"name": "ddp", "accumulate": 2},
  "acco": {"name": "acco", "accumulate": 1},
}
ROWS = {f"{m}, {r:g}": METHODS[m] for m in METHODS for r in RATES}
CLAIM = ("acco, 0.004", 0.5)  # not more than so many per cent above DDP


def against(row: str) -> str:
  """DDP: at the same rate for ACCO, at the lower one for DDP itself."""
  name, rate = row.split(", ")
  return f"ddp, {rate if name == 'acco' else format(RATES[0], 'g')}"


def config(row: str):
  """One row's config, but for the seed."""
  name, rate = row.split(", ")
  c = text.get_config()
  with c.unlocked():
    c.steps = STEPS
    c.optimizer.learning_rate = float(rate)
    c.optimizer.warmup_steps = STEPS // 10
    c.evaluation.every = 0
    c.checkpoint.every = STEPS // 2
    c.method.update(METHODS[name])
  return c
