r"""ImageNet with a ResNet-50: 90 epochs, as in Goyal et al., arXiv 1706.02677.

  python launch/train.py --config=configs/imagenet_resnet50.py \
    --workdir=runs/imagenet

25,557,032 parameters. The data: `tfds build imagenet2012
--file_format=array_record`, once, on a machine with TensorFlow and the two
archives of ILSVRC 2012. The test split is the 50,000 images that papers call
validation.

Not run yet: 90 epochs are 2.8e18 floating-point operations, hours on eight
current GPUs if the CPUs can decode as fast. Others report 0.76 to 0.77.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  batch = 1024
  epoch = 0.99 * 1_281_167 / batch
  c = default_config()
  c.steps = quick_or(round(90 * epoch), arg)
  c.batch_size = batch
  c.data.name = "imagenet2012"
  c.data.image_size = 224
  c.data.validation_fraction = 0.01  # of the training images
  c.data.augment = ("random_resized_crop", "flip")
  c.model = model_config("resnet50", stem="imagenet")
  c.model.norm = "batch"  # or group
  c.model.width = 1.0  # times 64 channels
  c.model.dtype = "bfloat16"  # of the computation; parameters are float32
  c.loss.label_smoothing = 0.1
  c.optimizer.name = "momentum"
  c.optimizer.nesterov = True
  c.optimizer.learning_rate = 0.1 * batch / 256
  c.optimizer.warmup_steps = c.steps // 18  # 5 epochs
  c.optimizer.weight_decay = 1e-4
  c.evaluation.every = round(epoch)
  c.evaluation.batch_size = batch
  c.checkpoint.every = round(epoch)
  return c.lock()
