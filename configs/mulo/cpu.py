r"""Meta-training of the weights that the package ships, on CPU cores.

  python launch/meta_train.py --config=configs/mulo/cpu.py --workdir=runs/mulo
  python launch/meta_train.py --config=configs/mulo/cpu.py:sp --workdir=runs/sp

MLPs of three hidden layers of 16 to 64 units on images of 8 x 8 and 7 x 7
pixels. `:sp` is the same without muP.
"""

from configs.mulo.tiny import default, task


def get_config(arg: str | None = None):
  """`:sp`: standard parametrisation, with its own scale of a step."""
  c = default()
  c.steps = 3000
  c.tasks.digits_16 = task("digits", 16)
  c.tasks.digits_32 = task("digits", 32)
  c.tasks.fashion_16 = task("fashion_mnist", 16, pool=4)
  c.tasks.fashion_64 = task("fashion_mnist", 64, pool=4)
  c.pairs = 4
  c.truncation = 20
  c.min_length = 50
  c.max_length = 500
  if arg == "sp":
    c.mup = False
    c.step_mult = 0.001
  return c.lock()
