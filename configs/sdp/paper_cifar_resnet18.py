r"""SDP's ResNet-18 on CIFAR-10 or CIFAR-100 (arXiv 2507.09029), block level.

  python launch/train.py --config=configs/sdp/paper_cifar_resnet18.py:cifar10 \
    --workdir=runs/sdp_cifar10

11,173,962 parameters; `:cifar100` has 11,220,132. The data: `tfds build cifar10
--file_format=array_record` (or cifar100), once, on a machine with TensorFlow.

The paper's: the model and data; residual blocks that are masked in the forward
pass too, its best variant; stem and classifier outside of the blocks; 1 /
coverage as many epochs as the baseline, so that what is masked does as many
floating-point operations; a worker's batch of 64.

What could not be recovered, and is our choice: 8 workers, a coverage of 1/2 (the
paper stays near its baseline above 0.3), masks in turn round the workers,
gradients divided by the number of holders, and the recipe: that of
configs/cifar10_resnet.py, its rate in proportion to the batch, with a warm-up.
Statistics are estimated anew for the whole model before each evaluation.

Not the paper's: it counts eight blocks, but three change the shape and are
shared here. The other five have 57 % of the parameters; each has four holders,
and workers hold 0.15M to 6.2M of their 6.3M parameters, all in buffers as long
as the longest. With --config.method.assignment=balanced that is 4.7M, but there
are only two different subnetworks then.

Not run yet: 4.3e16 floating-point operations, 1.3 times the baseline's, since
what is shared sees all epochs.
"""

from distrain_jax.train import import_config

CLASSES = {"cifar10": 10, "cifar100": 100}


def get_config(arg: str | None = "cifar10"):
  """`:cifar10` or `:cifar100`; `:cifar10,quick` takes 20 steps."""
  name, _, quick = (arg or "cifar10").partition(",")
  if name not in CLASSES or quick not in ("", "quick"):
    raise ValueError(
      f"configs/sdp/paper_cifar_resnet18.py:{arg}: one of {', '.join(CLASSES)}, "
      "and ',quick' for few steps."
    )
  base = import_config("../cifar10_resnet.py", beside=__file__)
  c = base.get_config(quick or None)
  coverage, old = 0.5, c.batch_size
  c.batch_size = 8 * 64
  per_epoch = 49_000 / c.batch_size
  if not quick:
    c.steps = round(200 / coverage * per_epoch)
  c.method.name = "sdp"
  c.method.level = "block"
  c.method.coverage = coverage
  c.method.masking = "forward"
  c.method.assignment = "cyclic"  # or shuffled, or balanced: see above
  c.data.name = name
  c.optimizer.learning_rate *= c.batch_size / old
  c.optimizer.warmup_steps = min(c.steps // 2, round(5 * per_epoch))
  c.evaluation.recalibrate = 20  # 10,240 images
  return c
