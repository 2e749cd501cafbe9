r"""Meta-training of a small VeLO under muP: a demonstration, minutes.

  python launch/meta_train.py --config=configs/mulo/velo.py --workdir=runs/velo

An LSTM of 16 units and a bank of 8 networks, 5,057 numbers, on one small task.
Meta-loss (mean training loss of a trajectory) from 3.1 to 1.36; four minutes
beside much other work on two CPU cores, a third of them compiling.
"""

from configs.mulo.tiny import default, task


def get_config(arg: str | None = None):
  """`:quick` takes 2 meta-steps."""
  c = default()
  c.steps = 1000
  c.architecture = "velo"
  # Ten times and a hundred times the muP authors': it learns in minutes.
  c.step_mult, c.interp_mult = 0.01, 100.0
  c.tasks.teacher_16 = task("teacher", 16)
  c.tasks.teacher_16.widths = (16, 16)
  c.truncation = 20
  c.min_length = 40
  c.max_length = 100
  c.log_every = 20
  if arg == "quick":
    c.steps = c.log_every = c.save_every = 2
    c.pairs, c.truncation, c.lstm, c.bank = 2, 2, 4, 2
    c.tasks.teacher_16.widths = (4,)
  return c.lock()
