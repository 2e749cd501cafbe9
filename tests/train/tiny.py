"""The smallest run that has all of what a resumed one must find again.

Dropout needs the keys, AdamW with warm-up its moments and count, the batches
end in the middle of an epoch, and every step is logged.
"""

from ml_collections import ConfigDict

from distrain_jax.train import default_config


def get_config(arg: str | None = None):
  """`:pair` has two workers, `:stages` PETRA on four stages.

  A sum of two is the same bits in any order, so in any number of processes.
  """
  c = default_config()
  if arg == "pair":
    c.mesh = ConfigDict({"data": 2, "tensor": -1})
  c.steps = 50
  c.batch_size = 48
  c.data.name = "digits"
  c.data.augment = ("pad_crop:1",)
  c.model = ConfigDict({"name": "mlp", "widths": (24,), "dropout": 0.2})
  if arg == "stages":  # an update a step, of two micro-batches
    c.mesh = ConfigDict({"stage": 4})
    c.model = ConfigDict({"name": "rev_mlp", "width": 8, "hidden": 8})
    c.model.update(blocks=2, dropout=0.2)
    c.method.update(name="petra", accumulate=2)
  c.method.clip_norm = 1.0
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 7
  c.optimizer.weight_decay = 0.01
  c.evaluation.every = 20
  c.evaluation.batch_size = 128  # 197 rows: the last batch is padded
  c.checkpoint.every = 6
  c.log.every = 1
  return c.lock()
