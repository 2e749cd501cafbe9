r"""PETRA on text: a reversible decoder on four stages.

  python launch/train.py --config=configs/petra/text.py --workdir=runs/petra_text \
    --devices=4

803,968 parameters as configs/text.py's Llama; attention and feed-forward parts
are couplings of two streams. AdamW suffers from delays more than SGD: its rate
is half of configs/text.py's.

Not run to the end; `launch/reproduce.py petra_text` trains a smaller one.
"""

from ml_collections import ConfigDict

from distrain_jax.train import import_config, model_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = import_config("../text.py", beside=__file__).get_config(arg)
  with c.unlocked():
    c.mesh = ConfigDict({"stage": -1, "data": 1})
    c.model = model_config("rev_llama", preset="tiny")
    c.method.name = "petra"  # or pipeline: the same stages, synchronously
    c.method.accumulate = 4  # micro-batches of 8 sequences
    c.optimizer.learning_rate = 1.5e-3
  return c
