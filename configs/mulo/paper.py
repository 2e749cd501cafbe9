r"""muLO_M as published: three widths on ImageNet at 32 x 32, on one GPU or more.

  python launch/meta_train.py --config=configs/mulo/paper.py --workdir=runs/m

Thérien et al., 2024, https://arxiv.org/abs/2406.00153, appendix C. Images:
TFDS's imagenet_resized/32x32, prepared; 16 GB of float32 on every device. The
paper says 103 hours of an A6000. We have not run it.
"""

from configs.mulo.tiny import default, task


def get_config(arg: str | None = None):
  """`:s`: the single width of muLO_S."""
  c = default()
  c.steps = 5000
  for width in (128,) if arg == "s" else (128, 512, 1024):
    data = "imagenet_resized/32x32"
    c.tasks[f"imagenet_{width}"] = task(data, width, batch_size=4096)
  return c.lock()
