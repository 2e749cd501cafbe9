"""The trainer: one loop for any method, and its config.

config = train.default_config()
config.data, config.model = ..., ...
result = train.train(train.build(config), "runs/mine")
"""

from distrain_jax.train.checkpoint import Checkpoints as Checkpoints
from distrain_jax.train.config import default_config as default_config
from distrain_jax.train.config import import_config as import_config
from distrain_jax.train.config import model_config as model_config
from distrain_jax.train.config import quick_or as quick_or
from distrain_jax.train.curves import draw as draw
from distrain_jax.train.evaluate import evaluator as evaluator
from distrain_jax.train.experiment import Experiment as Experiment
from distrain_jax.train.experiment import Program as Program
from distrain_jax.train.experiment import build as build
from distrain_jax.train.experiment import program as program
from distrain_jax.train.interrupt import EXIT_CODE as EXIT_CODE
from distrain_jax.train.interrupt import Interrupted as Interrupted
from distrain_jax.train.loop import BadStep as BadStep
from distrain_jax.train.loop import Result as Result
from distrain_jax.train.loop import train as train
from distrain_jax.train.metrics import read_metrics as read_metrics
from distrain_jax.train.recalibrate import recalibrator as recalibrator
