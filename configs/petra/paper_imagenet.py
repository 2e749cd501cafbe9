r"""PETRA on ImageNet (arXiv 2406.02052): a RevNet on 10 or 18 devices.

  python launch/train.py --config=configs/petra/paper_imagenet.py:revnet50 \
    --workdir=runs/petra_imagenet

30,421,608 parameters; `:revnet34` has 22,327,784, `:revnet18` 12,215,912. The
data: see configs/imagenet_resnet50.py. With `:revnet50,32` images of 32 x 32
instead: `tfds build imagenet_resized/32x32 --file_format=array_record`.

The paper's: one residual block a stage, micro-batches of 64, k of them an
update, a rate of 0.1 for 256 images, 90 epochs with 5 of warm-up and a tenth of
the rate after 30, 60 and 80. Its table, with the best k of 1 to 32: 71.0 %,
73.5 % and 74.8 %, where back-propagation has 70.8 %, 73.2 % and 75.4 %; with
32 x 32, 54.6 %, 56.1 % and 59.6 % for 54.6 %, 56.4 % and 59.7 %. k = 4 and 2 here
are its public commands'.

Not run yet: 90 epochs are 3.8e18 floating-point operations with the RevNet-50.
"""

from ml_collections import ConfigDict

from distrain_jax.train import default_config, model_config

MODELS = ("revnet18", "revnet34", "revnet50")
MICRO = 64  # images


def get_config(arg: str | None = "revnet50"):
  """A model; ',32' takes small images, ',quick' 20 steps."""
  name, *rest = (arg or "revnet50").split(",")
  if name not in MODELS or not {*rest} <= {"32", "quick"}:
    raise ValueError(
      f"configs/petra/paper_imagenet.py:{arg}: one of {', '.join(MODELS)}, and "
      "',32' for small images, ',quick' for few steps."
    )
  small = "32" in rest
  k = 2 if small else 4
  c = default_config()
  epoch = 0.99 * 1_281_167 / (MICRO * k)
  c.steps = 20 if "quick" in rest else round(90 * epoch)
  c.batch_size = MICRO * k
  c.mesh = ConfigDict({"stage": -1, "data": 1})
  c.data.name = "imagenet_resized/32x32" if small else "imagenet2012"
  c.data.image_size = None if small else 224
  c.data.validation_fraction = 0.01  # of the training images
  c.data.augment = (
    ("pad_crop:4", "flip") if small else ("random_resized_crop", "flip")
  )
  c.model = model_config(name, stem="cifar" if small else "imagenet")
  c.method.name = "petra"  # or pipeline: the same stages, synchronously
  c.method.accumulate = k
  c.optimizer.name = "momentum"
  c.optimizer.nesterov = True
  c.optimizer.learning_rate = 0.1 * c.batch_size / 256
  c.optimizer.schedule = "step"
  c.optimizer.drops = (30 / 90, 60 / 90, 80 / 90)
  c.optimizer.warmup_steps = c.steps // 18  # 5 epochs
  c.optimizer.weight_decay = 1e-4
  c.evaluation.every = round(epoch)
  c.evaluation.batch_size = 720  # a multiple of 10, 18 and 8
  c.checkpoint.every = round(epoch)
  return c.lock()
