r"""WASH's ResNet-50s on ImageNet (arXiv 2405.17517).

  python launch/train.py --config=configs/wash/paper_imagenet.py \
    --workdir=runs/wash_imagenet

25,557,032 parameters a member; the data of configs/imagenet_resnet50.py. A
member a device; the papers have 3, so --config.batch_size is 256 times the
devices.

The recipe is that of PAPA's code (arXiv 2304.03094): SGD with momentum 0.9, a
rate of 0.1 with a cosine to 1e-4, weight decay 1e-4, 90 epochs of 256 images.
The rate, 0.05, is WASH's for ImageNet as far as we could recover it, decreasing
by depth. All members see the images alike; settings of their own are
config.population.mixup and its neighbours.

Not run yet: 2.8e18 floating-point operations a member.
"""

from distrain_jax.train import import_config

MEMBERS = 8
ROWS = 256  # of a member and step


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  base = import_config("../imagenet_resnet50.py", beside=__file__)
  c = base.get_config(arg)
  epoch = 0.98 * 1_281_167 / ROWS
  with c.unlocked():
    c.mesh = {"population": -1}
  if arg is None:
    c.steps = round(90 * epoch)
  c.batch_size = MEMBERS * ROWS
  c.method.name = "wash"
  c.method.rate = 0.05
  c.data.validation_fraction = 0.02
  c.loss.label_smoothing = 0.0
  c.optimizer.nesterov = False
  c.optimizer.learning_rate = 0.1
  c.optimizer.final_fraction = 1e-3
  c.optimizer.warmup_steps = 0
  c.evaluation.every = round(epoch)
  c.evaluation.members = True
  c.evaluation.recalibrate = 5
  c.checkpoint.every = round(epoch)
  return c
