r"""SDP on Fashion-MNIST: half of a narrow ResNet-18's optional blocks each.

  python launch/train.py --config=configs/sdp/fashion_mnist.py \
    --workdir=runs/sdp_fashion_mnist --devices=8

701,178 parameters; data, model and optimizer of configs/fashion_mnist.py. The
five residual blocks that keep the shape have 397,312 of them; each is held by
four of the eight workers, two or three by each, and left out by the others. The
stem, the three blocks that change the shape and the classifier are shared by
all.

Not run to the end; `launch/reproduce.py sdp_images` trains 200 steps of one half
as wide: validation loss 0.470 at a coverage of 1/2, 0.434 by DDP.
"""

from distrain_jax.train import import_config


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = import_config("../fashion_mnist.py", beside=__file__).get_config(arg)
  c.method.name = "sdp"
  c.method.level = "block"
  c.method.coverage = 0.5
  c.method.masking = "forward"
  # No worker has trained the whole model, whose statistics are other ones.
  c.evaluation.recalibrate = 8
  # At the end also the mean of the workers' own models, and their ensemble.
  c.evaluation.members = True
  return c
