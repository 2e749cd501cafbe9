"""Meta-training of learned optimizers, as pure functions (`dj.mulo_meta`).

task = mlp_task(data, widths=(32, 32, 32))
run = trainer([training(task)], outer_adamw(steps), Settings(pairs=8))
state = run.init(init_theta(key), key)
state, metrics = run.step(state, (task.data,), key)
"""

from distrain_jax.learned.meta.inner import Problem as Problem
from distrain_jax.learned.meta.inner import Training as Training
from distrain_jax.learned.meta.inner import training as training
from distrain_jax.learned.meta.networks import ConvNet as ConvNet
from distrain_jax.learned.meta.networks import Decoder as Decoder
from distrain_jax.learned.meta.networks import conv_task as conv_task
from distrain_jax.learned.meta.networks import text_task as text_task
from distrain_jax.learned.meta.pes import Pair as Pair
from distrain_jax.learned.meta.pes import Settings as Settings
from distrain_jax.learned.meta.pes import attribute as attribute
from distrain_jax.learned.meta.pes import truncation as truncation
from distrain_jax.learned.meta.saving import restore as restore
from distrain_jax.learned.meta.saving import save as save
from distrain_jax.learned.meta.tasks import MLP as MLP
from distrain_jax.learned.meta.tasks import Task as Task
from distrain_jax.learned.meta.tasks import cross_entropy as cross_entropy
from distrain_jax.learned.meta.tasks import mlp_task as mlp_task
from distrain_jax.learned.meta.tasks import teacher_data as teacher_data
from distrain_jax.learned.meta.testing import trained as trained
from distrain_jax.learned.meta.trainer import MetaState as MetaState
from distrain_jax.learned.meta.trainer import MetaTraining as MetaTraining
from distrain_jax.learned.meta.trainer import outer_adamw as outer_adamw
from distrain_jax.learned.meta.trainer import trainer as trainer
