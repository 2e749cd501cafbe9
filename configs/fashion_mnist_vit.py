r"""Fashion-MNIST with a small Vision Transformer: minutes on 2 CPU cores.

  python launch/train.py --config=configs/fashion_mnist_vit.py \
    --workdir=runs/fashion_mnist_vit --devices=8

138,890 parameters. The data: `sudo apt-get install dataset-fashion-mnist`
(Debian, Ubuntu); elsewhere see distrain_jax/data/idx_source.py.

Four epochs, 16 minutes on 2 crowded CPU cores, 7 minutes of their time, with 8
simulated devices (jax 0.10.2): test accuracy 0.848, loss 0.409, with ddp on
eight workers, one run. A convolutional network learns faster from so few
images: see configs/fashion_mnist.py.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = default_config()
  c.steps = quick_or(1680, arg)  # 422 are an epoch
  c.batch_size = 128
  c.data.name = "fashion_mnist"
  c.data.augment = ("pad_crop:1", "flip")
  c.model = model_config("vit")  # 49 patches of 4 x 4 pixels
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 100
  c.optimizer.b2 = 0.99
  c.optimizer.weight_decay = 0.05
  c.evaluation.every = 400
  c.checkpoint.every = 400
  return c.lock()
