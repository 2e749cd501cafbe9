r"""Fashion-MNIST with a narrow ResNet-18: minutes on 2 CPU cores.

  python launch/train.py --config=configs/fashion_mnist.py \
    --workdir=runs/fashion_mnist --devices=8

701,178 parameters. The data: `sudo apt-get install dataset-fashion-mnist`
(Debian, Ubuntu); elsewhere see distrain_jax/data/idx_source.py.

Two epochs, 4 minutes on 2 busy CPU cores with 8 simulated devices (jax 0.10.2):
test accuracy 0.905, with ddp and zero1 on eight workers and with one worker
(loss 0.258, 0.258, 0.262: each worker normalises by its own batch).
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = default_config()
  c.steps = quick_or(840, arg)  # 422 are an epoch
  c.batch_size = 128
  c.data.name = "fashion_mnist"
  c.data.augment = ("pad_crop:1", "flip")
  # The form for small images, 16 channels at first instead of 64.
  c.model = model_config("resnet18", stem="cifar", width=0.25)
  c.optimizer.learning_rate = 4e-3
  c.optimizer.warmup_steps = 20
  c.optimizer.b2 = 0.99
  c.optimizer.weight_decay = 0.05
  c.evaluation.every = 200
  c.checkpoint.every = 200
  return c.lock()
