r"""PETRA on Fashion-MNIST: a narrow RevNet-18, one block a stage.

  python launch/train.py --config=configs/petra/fashion_mnist.py \
    --workdir=runs/petra --devices=10

177,594 parameters. The ten stages of the paper, an eighth of its channels; its
optimizer (SGD, Nesterov's momentum 0.9, decay of matrices and kernels) and its
learning rate of 0.1 for 256 images an update. The data as for
configs/fashion_mnist.py.

Not run to the end; `launch/reproduce.py petra` trains half an epoch of it, three
seeds: validation loss 0.663 with an update a micro-batch, 0.381 by back-propagation.
"""

from ml_collections import ConfigDict

from distrain_jax.train import import_config, model_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = import_config("../fashion_mnist.py", beside=__file__).get_config(arg)
  with c.unlocked():
    c.mesh = ConfigDict({"stage": -1, "data": 1})
    c.model = model_config("revnet18", stem="cifar", width=1 / 8)
    c.batch_size = 128
    c.method.name = "petra"  # or pipeline: the same stages, synchronously
    c.method.accumulate = 2  # micro-batches of 64
    c.optimizer.name = "momentum"
    c.optimizer.nesterov = True
    c.optimizer.learning_rate = 0.05
    c.optimizer.weight_decay = 5e-4
    c.evaluation.batch_size = 400  # a multiple of 10 and 8
  return c
