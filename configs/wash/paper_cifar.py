r"""WASH's ResNet-18s on CIFAR-10 or CIFAR-100 (arXiv 2405.17517), and PAPA's.

  python launch/train.py --config=configs/wash/paper_cifar.py:cifar10 \
    --workdir=runs/wash_cifar10

11,173,962 parameters a member; `:cifar100` has 11,220,132. The data: `tfds
build cifar10 --file_format=array_record` (or cifar100), once, on a machine with
TensorFlow. A member a device; the papers have 3, 5 or 10, so
--config.batch_size is 64 times the devices.

The recipe is that of PAPA's code (arXiv 2304.03094), which WASH follows: SGD
with momentum 0.9, a rate of 0.1 with a cosine to 1e-4, weight decay 1e-4, 300
epochs of 64 images, 2 % of the images held out; members differ in their initial
model, their order of the data and their mixup, CutMix, label smoothing and
random erasing (`:cifar10,alike`: only in the first two). The rate, 0.001, is
WASH's for CIFAR as far as we could recover it, decreasing by depth. PAPA's
settings: `:cifar10,papa` pulls every tenth step by 0.01 x learning rate / peak;
`:cifar10,papa_all` averages every five epochs.

Other than there: weight decay spares norms and biases; which of the 81 settings
a member gets is drawn by our own random numbers.

Not run yet: 1.5e17 floating-point operations a member.
"""

from distrain_jax.data import mixing_grid
from distrain_jax.train import import_config

CLASSES = {"cifar10": 10, "cifar100": 100}
MEMBERS = 8
ROWS = 64  # of a member and step
METHODS = {
  "wash": {"name": "wash", "rate": 1e-3},
  "papa": {"name": "papa", "every": 10, "alpha": 0.99},
  "papa_all": {"name": "papa", "variant": "all"},
}


def get_config(arg: str | None = "cifar10"):
  """`:cifar10` or `:cifar100`, and what comes after.

  `,papa` or `,papa_all` (or `,wash`); `,alike` without mixing; `,quick` for 20
  steps.
  """
  name, *more = (arg or "cifar10").split(",")
  methods = [x for x in more if x in METHODS] or ["wash"]
  known = {"alike", "quick", *METHODS}
  if name not in CLASSES or not set(more) <= known or len(methods) > 1:
    raise ValueError(
      f"configs/wash/paper_cifar.py:{arg}: one of {', '.join(CLASSES)}, then "
      f"one of {', '.join(METHODS)}, ',alike' for members that see the images "
      "alike, ',quick' for few steps."
    )
  base = import_config("../cifar10_resnet.py", beside=__file__)
  c = base.get_config("quick" if "quick" in more else None)
  with c.unlocked():
    c.mesh = {"population": -1}
  if "quick" not in more:
    c.steps = round(300 * 49_000 / ROWS)
  c.batch_size = MEMBERS * ROWS
  c.method.update(METHODS[methods[0]])
  c.data.name = name
  c.data.validation_fraction = 0.02
  c.loss.label_smoothing = 0.0  # the members' own settings have it
  if "alike" not in more:
    grid = mixing_grid(MEMBERS, c.seed)
    c.population.mixup = tuple(x.mixup for x in grid)
    c.population.cutmix = tuple(x.cutmix for x in grid)
    c.population.smoothing = tuple(x.smoothing for x in grid)
    c.population.erasing = tuple(x.erasing for x in grid)
  c.optimizer.name = "momentum"
  c.optimizer.nesterov = False
  c.optimizer.learning_rate = 0.1
  c.optimizer.final_fraction = 1e-3
  c.optimizer.warmup_steps = 0
  c.optimizer.weight_decay = 1e-4
  c.evaluation.members = True
  c.evaluation.recalibrate = 5
  return c
