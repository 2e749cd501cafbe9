r"""WASH on Fashion-MNIST: four narrow ResNet-18s that stay averageable.

  python launch/train.py --config=configs/wash/fashion_mnist.py \
    --workdir=runs/wash_fashion_mnist --devices=4

701,818 parameters a member, in the form for large images: its blocks see 7 x 7
values, which is what makes it minutes; the data of configs/fashion_mnist.py.
Each member starts from a model of its own and sees the data in an order of its
own. The optimizer is that of the paper's setting on CIFAR, with a cosine to 0;
see paper_cifar.py. The statistics of BatchNorm are estimated anew for every
model that is evaluated, since no member has trained their average.

Half an epoch a member, three seeds (jax 0.10.2, `launch/reproduce.py wash`): test
accuracy 0.826 of the average, 0.822 of the members. Members that train alone have
0.830, their ensemble 0.839, their average 0.263. The decay is a hundred times the
paper's: so short a run would else keep the differences that members began with,
which no shuffle takes away (average 0.770 at 1e-4 and a constant rate of 0.05).
"""

from distrain_jax.train import import_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = import_config("../fashion_mnist.py", beside=__file__).get_config(arg)
  with c.unlocked():
    if arg is None:
      c.steps = 1000
    c.mesh = {"population": -1}
  c.batch_size = 128  # 32 a member
  c.method.name = "wash"
  c.method.rate = 0.2  # 100 shuffles of a coordinate of the first layer
  c.method.tied = True  # to the learning rate: members end undisturbed
  c.model.stem = "imagenet"
  c.model.width = 1 / 4
  c.optimizer.name = "momentum"
  c.optimizer.learning_rate = 0.1
  c.optimizer.weight_decay = 1e-2  # takes away what members began with
  c.evaluation.every = 0
  c.evaluation.batch_size = 512
  c.evaluation.members = True
  c.evaluation.recalibrate = 8
  c.checkpoint.every = 400
  return c
