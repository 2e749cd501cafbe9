r"""WASH on scikit-learn's digits: four MLPs that stay averageable.

  python launch/train.py --config=configs/wash/digits.py --workdir=runs/wash \
    --devices=4

42,634 parameters a member, 20 s on 2 busy CPU cores. The members start from
different models and see the data in orders of their own. `test_accuracy` is
that of their average; the other scores of the last lines are the members' own,
their ensembles' and their greedy soup's. Three seeds (jax 0.10.2): the average
0.976, the ensemble 0.978. The average of a plain ensemble is of no use, 0.24:
--config.method.name=ensemble.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  c = default_config()
  c.steps = quick_or(2000, arg)
  c.batch_size = 128  # 32 a member
  c.mesh = {"population": -1}
  c.method.name = "wash"  # at its own default rate, 0.01
  c.data.name = "digits"
  c.model = model_config("mlp", widths=(128, 128, 128))
  c.optimizer.name = "momentum"
  c.optimizer.learning_rate = 0.05
  c.optimizer.weight_decay = 1e-4
  c.evaluation.every = 500
  c.evaluation.members = True
  c.checkpoint.every = 500
  return c.lock()
