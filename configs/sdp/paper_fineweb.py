r"""SDP's pre-training: a Llama on FineWeb (arXiv 2507.09029), block level.

  python launch/train.py --config=configs/sdp/paper_fineweb.py:134M \
    --workdir=runs/sdp_fineweb --config.data.folder=data/fineweb

134,105,856, 501,007,872 or 1,104,218,112 parameters; data, models and optimizer
of configs/fineweb_llama.py, whose head says how to prepare the data.

The paper's: FineWeb with 134M parameters, in its fifth version with 1B as well;
8 workers; transformer blocks that are masked in the forward pass too, its best
variant; 1 / coverage as many steps as the baseline. With 1B it reports a
validation loss of 2.437, DDP's being 2.452, and 28 % less peak memory, for its
best variant and a coverage that we do not know.

What could not be recovered, and is our choice: the sizes of the 1B model (those
of Llama 3.2 1B, with a vocabulary of 32,000), the coverage of 1/2, masks in turn
round the workers, gradients divided by the number of holders, rows, rates and
steps. 500M is ours altogether.

Every worker holds half of the layers, and embeddings and output whole:
91,629,312, 299,656,704 and 617,646,080 parameters (68, 60 and 56 %).
--config.method.shard_optimizer=True makes their optimizer's state smaller still.
For neuron level: --config.method.level=neuron.

Not run yet: 6 floating-point operations a parameter held and token are 2.9e18,
3.6e19 and 1.6e20, more than the baseline's, since what is shared sees all steps.
"""

from distrain_jax.train import import_config


def get_config(arg: str | None = "134M"):
  """`:134M`, `:500M` or `:1B`; `:134M,quick` takes 20 steps."""
  base = import_config("../fineweb_llama.py", beside=__file__)
  c = base.get_config(arg)
  coverage = 0.5
  c.method.name = "sdp"
  c.method.level = "block"
  c.method.coverage = coverage
  c.method.masking = "forward"
  if not (arg or "").endswith(",quick"):
    c.steps = round(c.steps / coverage)
    c.optimizer.warmup_steps = c.steps // 50
  return c
