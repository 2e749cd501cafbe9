"""Distributed training in JAX: methods as pure functions over pytrees.

  method = dj.ddp(loss_fn, tx)            # or zero1, ...
  run = dj.distribute(method, mesh)       # or dj.simulate(method, workers=8)
  state = run.init(key, params)
  state, metrics = run.step(state, batch, key)

Importing this starts no backend; `models`, `data`, `soups`, `inspect` and
`train` load on use.
"""

import importlib

from distrain_jax import spmd as spmd
from distrain_jax import stages as stages
from distrain_jax.learned import MuInfo as MuInfo
from distrain_jax.learned import coord_check as coord_check
from distrain_jax.learned import flax_probe as flax_probe
from distrain_jax.learned import init_theta as init_theta
from distrain_jax.learned import init_velo_theta as init_velo_theta
from distrain_jax.learned import load_theta as load_theta
from distrain_jax.learned import mulo as mulo
from distrain_jax.learned import mup_adamw as mup_adamw
from distrain_jax.learned import mup_info as mup_info
from distrain_jax.learned import mup_multipliers as mup_multipliers
from distrain_jax.learned import mup_sgd as mup_sgd
from distrain_jax.learned import save_theta as save_theta
from distrain_jax.learned import scale_by_mulo as scale_by_mulo
from distrain_jax.learned import scale_by_mup as scale_by_mup
from distrain_jax.learned import scale_by_velo as scale_by_velo
from distrain_jax.learned import theta_from_pickle as theta_from_pickle
from distrain_jax.learned import theta_from_torch as theta_from_torch
from distrain_jax.learned import theta_to_torch as theta_to_torch
from distrain_jax.learned import velo as velo
from distrain_jax.learned import velo_theta_from_haiku as velo_theta_from_haiku
from distrain_jax.method import Method as Method
from distrain_jax.method import StatefulLoss as StatefulLoss
from distrain_jax.method import Variables as Variables
from distrain_jax.method import stateful as stateful
from distrain_jax.methods import acco as acco
from distrain_jax.methods import dart as dart
from distrain_jax.methods import ddp as ddp
from distrain_jax.methods import diloco as diloco
from distrain_jax.methods import dpu as dpu
from distrain_jax.methods import ensemble as ensemble
from distrain_jax.methods import fsdp as fsdp
from distrain_jax.methods import guard as guard
from distrain_jax.methods import local_sgd as local_sgd
from distrain_jax.methods import papa as papa
from distrain_jax.methods import petra as petra
from distrain_jax.methods import pipeline as pipeline
from distrain_jax.methods import sdp as sdp
from distrain_jax.methods import sparta as sparta
from distrain_jax.methods import subnetwork_alignment as subnetwork_alignment
from distrain_jax.methods import subnetwork_load as subnetwork_load
from distrain_jax.methods import wash as wash
from distrain_jax.methods import weight_prediction as weight_prediction
from distrain_jax.methods import zero1 as zero1
from distrain_jax.rounds import Counted as Counted
from distrain_jax.runners import Run as Run
from distrain_jax.runners import distribute as distribute
from distrain_jax.runners import simulate as simulate

_PACKAGES = ("data", "inspect", "models", "soups", "train")


def __getattr__(name: str):
  if name in _PACKAGES:
    return importlib.import_module(f"distrain_jax.{name}")
  if name == "mulo_meta":
    return importlib.import_module("distrain_jax.learned.meta")
  raise AttributeError(f"module 'distrain_jax' has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *_PACKAGES, "mulo_meta"])
