r"""CIFAR-10 with a ResNet-18, as it is usually trained.

  python launch/train.py --config=configs/cifar10_resnet.py \
    --workdir=runs/cifar10

11,173,962 parameters; with --config.model.name=resnet50, 23,520,842. The data:
`tfds build cifar10 --file_format=array_record`, once, on a machine with
TensorFlow.

Not run yet: 200 epochs are 3.3e16 floating-point operations, a quarter of an
hour or so on one current GPU. Others report 0.95 for this recipe.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  epoch = 49_000 / 128
  c = default_config()
  c.steps = quick_or(round(200 * epoch), arg)
  c.batch_size = 128
  c.data.name = "cifar10"
  c.data.validation_fraction = 0.02  # 1,000 of the 50,000
  c.data.augment = ("pad_crop:4", "flip")
  c.data.in_memory = True  # 150 MB
  c.model = model_config("resnet18", stem="cifar")
  c.model.norm = "batch"  # or group
  c.model.width = 1.0  # times 64 channels
  c.model.dtype = "float32"  # of the computation; bfloat16 on GPUs and TPUs
  c.loss.label_smoothing = 0.0
  c.optimizer.name = "momentum"
  c.optimizer.nesterov = True
  c.optimizer.learning_rate = 0.1
  c.optimizer.weight_decay = 5e-4
  c.evaluation.every = 2000
  c.evaluation.batch_size = 512
  c.checkpoint.every = 2000
  return c.lock()
