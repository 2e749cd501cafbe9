r"""Fashion-MNIST with a narrow ResNet-18: minutes on 2 CPU cores.

  python launch/train.py --config=configs/fashion_mnist.py \
    --workdir=runs/fashion_mnist --devices=8

703,578 parameters. The data: `sudo apt-get install dataset-fashion-mnist`
(Debian, Ubuntu); elsewhere see distrain_jax/data/idx_source.py.
"""

from ml_collections import ConfigDict

from distrain_jax.train import default_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  steps = {None: 420, "quick": 20}
  if arg not in steps:
    raise ValueError(f"configs/fashion_mnist.py:{arg}: only :quick, or none.")
  c = default_config()
  c.steps = steps[arg]  # an epoch is 421.875
  c.batch_size = 128
  c.data.name = "fashion_mnist"
  c.data.augment = ("pad_crop:2", "flip")
  # The form for small images, 16 channels at first instead of 64.
  c.model = ConfigDict({"name": "resnet18", "stem": "cifar", "width": 0.25})
  c.optimizer.name = "momentum"
  c.optimizer.nesterov = True
  c.optimizer.learning_rate = 0.1
  c.optimizer.warmup_steps = 20
  c.optimizer.weight_decay = 5e-4
  c.evaluation.every = 100
  c.checkpoint.every = 100
  return c.lock()
