r"""Python's standard library, byte by byte, with a tiny Llama.

  python launch/train.py --config=configs/text.py --workdir=runs/text \
    --devices=8

803,968 parameters, 1.6 MB of text. 6 minutes on 2 busy CPU cores with 8
simulated devices (jax 0.10.2): 2.40 bits a byte of the test files, with ddp and
zero1 on eight workers and with one worker. It is a fifth of an epoch: more
--config.steps help.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = default_config()
  c.steps = quick_or(400, arg)
  c.batch_size = 32  # sequences: 4,096 bytes a step
  c.data.name = "stdlib_text"
  c.data.length = 128
  c.model = model_config("llama", preset="tiny")
  c.method.clip_norm = 1.0
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.1
  c.evaluation.every = 100
  c.checkpoint.every = 100
  return c.lock()
