"""SDP and its baselines on text: equal updates, and equal FLOPs.

Python's standard library, byte by byte; a Llama of 82,208 parameters, of which
all but the embeddings and norms are sampled; eight workers, 16 rows of 64 bytes
an update. Forward masking is also trained for 1 / coverage as many updates, at
which it has done as many floating-point operations in what is sampled. One
learning rate for all.
"""

from configs import text

TITLE = "Text, a Llama of 82,208 parameters, 8 workers, 1,024 bytes an update"
METRIC = "validation_loss"
FOLLOWS = ("steps", "optimizer.warmup_steps", "evaluation.members")
UNIT = "nats a byte"
CLAIM = ("block forward, 1/2, equal FLOPs", 0.0)
STEPS = 240
RATE = 1.6e-2  # DDP ends best at it, of this, its half and its quarter
COVERAGES = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25}
DDP = {"name": "ddp"}
# What a model with as many units as a worker's subnetwork has.
SIZES = {
  "1/2": {"mlp": 64, "heads": 4, "kv_heads": 4},
  "1/4": {"mlp": 32, "heads": 2, "kv_heads": 2},
}
DROPPED = {  # as much as at a coverage of 1/2
  "ddp, dropout 1/2": {"dropout": 0.5},
  "ddp, stochastic depth 1/2": {"stochastic_depth": 0.5},
}


def sdp(level: str, masking: str, coverage: str, rescale: str = "none"):
  return {
    "name": "sdp",
    "level": level,
    "masking": masking,
    "coverage": COVERAGES[coverage],
    "rescale": rescale,
  }


LEVELS, MASKINGS = ("neuron", "block"), ("forward", "backward")
EQUAL = ", equal FLOPs"
ROWS = {
  "ddp": DDP,
  **{
    f"{level} {masking}, {c}": sdp(level, masking, c)
    for level in LEVELS
    for masking in MASKINGS
    for c in COVERAGES
  },
  **{
    f"{level} forward, {c}, rescaled in {when}": sdp(level, "forward", c, when)
    for level in LEVELS
    for c in ("1/2",)
    for when in ("train", "test")
  },
  **{
    f"{level} forward, {c}{EQUAL}": sdp(level, "forward", c)
    for level, c in (("neuron", "1/2"), ("block", "1/2"), ("block", "1/4"))
  },
  **{f"ddp, {c} of the units": DDP for c in SIZES},
  f"ddp, 1/2 of the units{EQUAL}": DDP,
  **dict.fromkeys(DROPPED, DDP),
}


def against(row: str) -> str:
  """The row that it is compared with."""
  del row
  return "ddp"


def config(row: str):
  """One row's config, but for the seed."""
  c = text.get_config()
  name, _, rest = row.partition(", ")
  coverage = rest.partition(",")[0].partition(" ")[0]
  with c.unlocked():
    c.steps = STEPS
    if row.endswith(EQUAL):
      c.steps = round(STEPS / COVERAGES[coverage])
    c.batch_size = 16
    c.data.length = 64
    size = {"embed": 32, "layers": 4, "heads": 8, "kv_heads": 8, "head_dim": 4}
    c.model.update(size, mlp=128)
    if row.endswith(("units", f"units{EQUAL}")):
      c.model.update(SIZES[coverage])
    c.model.update(DROPPED.get(row, {}))
    c.optimizer.learning_rate = RATE
    c.optimizer.warmup_steps = c.steps // 10
    c.evaluation.every = 0
    c.evaluation.members = name != "ddp"
    c.checkpoint.every = 0
    c.method.update(ROWS[row])
  return c
