r"""Meta-training that shows the thing work: one small task, minutes.

  python launch/meta_train.py --config=configs/mulo/tiny.py --workdir=runs/tiny

Meta-loss (mean training loss of a trajectory) from 2.3 to about 1.8.
"""

from ml_collections import ConfigDict


def task(data: str, width: int, **fields) -> ConfigDict:
  """An MLP of three hidden layers of `width` units."""
  c = ConfigDict({"data": data, "widths": (width,) * 3})
  c.pool = 1  # images are averaged over pool x pool pixels
  c.batch_size = 64
  c.update(fields)
  return c


def default() -> ConfigDict:
  """Every field, with the values of the paper where they cost nothing."""
  c = ConfigDict()
  c.seed = 0  # the only randomness
  c.steps = 400  # meta-steps
  c.tasks = ConfigDict()  # name -> task; all weigh the same
  c.mup = True  # False: standard parametrisation, for comparison
  c.architecture = "small_fc"  # muLO's; velo: configs/mulo/velo.py
  c.lstm = 16  # velo's units of the LSTM; 512 as published
  c.bank = 8  # velo's networks that are mixed; 256 as published
  c.interp_mult = 1.0  # velo's, of a mixture; 100 as published, without muP
  c.step_mult = 0.01  # scale of a learned step; 0.001 is usual without muP
  c.exp_mult = 0.001
  c.feature_eps = 1e-5
  c.update_norm = ""  # small_fc's; rms: a step over its root mean square
  c.eps_scaling = ""  # small_fc's; fan_in: epsilons that follow the width
  c.pairs = 8  # of each task
  c.truncation = 50  # inner steps of a meta-step
  c.sigma = 0.01  # deviation of the noise on theta
  c.min_length = 100  # of a trajectory, log-uniform
  c.max_length = 1000
  c.estimator = "pes"  # pes, ancestor, truncated, noise_reuse
  c.augment = 1.0  # largest rescaling of parameters; 1: none
  c.learning_rate = 3e-3  # of theta, at its peak
  c.final_learning_rate = 1e-3
  c.warmup = 100  # meta-steps, at most a tenth of them
  c.weight_decay = 1e-4  # of theta
  c.log_every = 10  # meta-steps
  c.save_every = 50  # meta-steps
  return c


def get_config(arg: str | None = None) -> ConfigDict:
  """`:quick` takes 2 meta-steps."""
  c = default()
  c.tasks.teacher_32 = task("teacher", 32)
  c.tasks.teacher_32.widths = (32, 32)
  c.truncation = 20
  c.min_length = 40
  c.max_length = 100
  if arg == "quick":
    c.steps = c.log_every = c.save_every = 2
    c.pairs, c.truncation = 2, 2
    c.tasks.teacher_32.widths = (4,)
  return c.lock()
