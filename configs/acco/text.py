r"""ACCO on text: a tiny Llama, eight workers, bytes of Python's own library.

  python launch/train.py --config=configs/acco/text.py --workdir=runs/acco \
    --devices=8

803,968 parameters, 1.6 MB of text; data, model and optimizer of configs/text.py.
A worker has four sequences a step, two in each half of a round. The same with
another method: --config.method.name=ddp --config.method.accumulate=2.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = default_config()
  c.steps = quick_or(400, arg)
  c.batch_size = 32  # sequences: 4,096 bytes a step
  c.method.name = "acco"
  c.method.accumulate = 1  # micro-batches a half, of two sequences
  c.method.clip_norm = 1.0
  c.data.name = "stdlib_text"
  c.data.length = 128
  c.model = model_config("llama", preset="tiny")
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.1
  c.evaluation.every = 100
  c.checkpoint.every = 100
  return c.lock()
