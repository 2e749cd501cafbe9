r"""WASH on text: tiny Llamas on bytes of Python's own library.

  python launch/train.py --config=configs/wash/text.py \
    --workdir=runs/wash_text --devices=4

803,968 parameters a member; data, model and optimizer of configs/text.py. Each
member starts from a model of its own and has its own order of the data. AdamW's
moments move with their weights (--config.method.shuffle_optimizer=False: they
stay).

Not run to the end yet.
"""

from distrain_jax.train import import_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = import_config("../text.py", beside=__file__).get_config(arg)
  c.mesh = {"population": -1}
  c.method.name = "wash"
  c.method.rate = 0.05
  c.method.shuffle_optimizer = True
  c.evaluation.every = 0
  c.evaluation.members = True
  return c
