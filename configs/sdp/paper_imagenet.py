r"""SDP on ImageNet (arXiv 2507.09029), block level: a ResNet-50 or a ViT S/16.

  python launch/train.py --config=configs/sdp/paper_imagenet.py:resnet50 \
    --workdir=runs/sdp_imagenet

25,557,032 parameters; `:vit_s16` has 21,974,632. The data: see
configs/imagenet_resnet50.py.

The paper's: the data; convolutional networks and transformers; blocks that are
masked in the forward pass too, its best variant; 1 / coverage as many epochs as
the baseline. Its fourth version did not reach the baseline here.

What could not be recovered, and is our choice: which models, 8 workers, a
coverage of 1/2, masks in turn round the workers, gradients divided by the number
of holders, and the recipes. The ResNet's is that of
configs/imagenet_resnet50.py; the ViT's is that of Beyer et al., arXiv 2205.01580,
for 90 epochs, without their RandAugment and mixup.

Of the ResNet's 16 blocks the four that change the shape are shared here; the
others have 61 % of the parameters. Every worker holds six of the twelve, 2.9M
to 12.6M of their 15.5M parameters, all in buffers as long as the longest. With
--config.method.assignment=balanced that is 7.8M, but there are only two
different subnetworks then. The ViT's blocks are alike: every worker holds six
of twelve, with what is shared 11,327,848 parameters.

Not run yet: 3.8e18 floating-point operations with the ResNet, 1.4 times the
baseline's, since what is shared sees all epochs; 3.2e18 with the ViT.
"""

from distrain_jax.train import import_config, model_config

MODELS = ("resnet50", "vit_s16")


def get_config(arg: str | None = "resnet50"):
  """`:resnet50` or `:vit_s16`; `:resnet50,quick` takes 20 steps."""
  name, _, quick = (arg or "resnet50").partition(",")
  if name not in MODELS or quick not in ("", "quick"):
    raise ValueError(
      f"configs/sdp/paper_imagenet.py:{arg}: one of {', '.join(MODELS)}, and "
      "',quick' for few steps."
    )
  base = import_config("../imagenet_resnet50.py", beside=__file__)
  c = base.get_config(quick or None)
  coverage = 0.5
  c.method.name = "sdp"
  c.method.level = "block"
  c.method.coverage = coverage
  c.method.masking = "forward"
  c.method.assignment = "cyclic"  # or shuffled; balanced: see above
  warmup = c.optimizer.warmup_steps
  if not quick:
    c.steps = round(c.steps / coverage)
  if name == "vit_s16":
    with c.unlocked():
      c.model = model_config("vit", preset="S/16")
    c.model.positions = "sincos"
    c.loss.label_smoothing = 0.0
    c.method.clip_norm = 1.0
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.weight_decay = 0.1  # times the rate
    warmup = min(c.steps // 2, 10_000)
  else:
    c.evaluation.recalibrate = 20  # 20,480 images
  c.optimizer.warmup_steps = warmup
  return c
