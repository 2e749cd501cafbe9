r"""SDP on text: half of a tiny Llama's hidden units and heads each.

  python launch/train.py --config=configs/sdp/text.py --workdir=runs/sdp \
    --devices=8

803,968 parameters; data, model and optimizer of configs/text.py. Each of the
eight workers holds one of the two key-value heads, with the query heads that
read it, and 176 of the 352 hidden units of every layer: 435,328 parameters.
Embeddings, norms and the output are shared by all.

Not run to the end; `launch/reproduce.py sdp` trains a smaller model's 240 steps.
"""

from distrain_jax.train import import_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = import_config("../text.py", beside=__file__).get_config(arg)
  c.method.name = "sdp"
  c.method.level = "neuron"
  c.method.coverage = 0.5
  c.method.masking = "forward"
  # At the end also the mean of the workers' own models, and their ensemble.
  c.evaluation.members = True
  return c
