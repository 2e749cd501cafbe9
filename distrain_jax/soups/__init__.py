"""Soups: models averaged, ensembled, and looked at on the way between them.

Pure functions over any list of pytrees, `Variables(params, model_state)`
included; no trainer is needed. `soups.runs` reads the models of a run's folder,
`soups.judging` scores them on its data, `soups.picture` draws.

  soup = soups.uniform(models)            # or weighted, greedy(models, score)
  apart = soups.consensus_distance(models)
  along = soups.path(models[0], models[1], loss)
  soups.barrier(along)
"""

from distrain_jax.soups.averages import Greedy as Greedy
from distrain_jax.soups.averages import Scored as Scored
from distrain_jax.soups.averages import greedy as greedy
from distrain_jax.soups.averages import uniform as uniform
from distrain_jax.soups.averages import weighted as weighted
from distrain_jax.soups.channels import repairable as repairable
from distrain_jax.soups.distances import Consensus as Consensus
from distrain_jax.soups.distances import Distance as Distance
from distrain_jax.soups.distances import (
  consensus_distance as consensus_distance,
)
from distrain_jax.soups.ensembles import ensemble_logits as ensemble_logits
from distrain_jax.soups.ensembles import evaluate_ensemble as evaluate_ensemble
from distrain_jax.soups.paths import Path as Path
from distrain_jax.soups.paths import barrier as barrier
from distrain_jax.soups.paths import interpolate as interpolate
from distrain_jax.soups.paths import layer_paths as layer_paths
from distrain_jax.soups.paths import path as path
from distrain_jax.soups.repairing import Repaired as Repaired
from distrain_jax.soups.repairing import repair as repair
from distrain_jax.soups.repairing import repairer as repairer
from distrain_jax.soups.trees import layers as layers
from distrain_jax.soups.trees import unstack as unstack
