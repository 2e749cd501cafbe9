r"""scikit-learn's digits by a learned optimizer: muLO's shipped weights.

  python launch/train.py --config=configs/digits_mulo.py --workdir=runs/mulo \
    --devices=8

26,122 parameters. 12 s on 2 CPU cores with 8 simulated devices (jax 0.10.2):
test accuracy 0.97, loss 0.15 to 0.17, of 400 images (3 seeds), nothing tuned but
that the step fades. With --config.method.name=zero1 and
--config.method.shard=leaves the same numbers. AdamW of configs/digits.py in as
many steps: 0.975 and 0.094. Three times as many overfit: loss 0.39 to 0.47.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = default_config()
  c.steps = quick_or(100, arg)
  c.batch_size = 128
  c.data.name = "digits"
  c.model = model_config("mlp", widths=(128, 128), mup=True)
  c.optimizer.name = "mulo"
  c.optimizer.learning_rate = 1.0  # the step's size is learned
  c.optimizer.schedule = "linear"
  c.evaluation.every = 25
  c.checkpoint.every = 50
  return c.lock()
