"""Learned optimizers as optax transforms: muLO and VeLO; muP; meta-training.

mup = mup_info(params, names=names)
tx = mulo(mup=mup)                     # the shipped weights
updates, state = tx.update(grads, state, params)
tx = velo(theta, num_steps=1000)       # which reads the loss, too
updates, state = tx.update(grads, state, params, value=loss)
"""

from distrain_jax.learned.convert import theta_from_torch as theta_from_torch
from distrain_jax.learned.convert import theta_to_torch as theta_to_torch
from distrain_jax.learned.coordinates import Coordinates as Coordinates
from distrain_jax.learned.coordinates import Probe as Probe
from distrain_jax.learned.coordinates import coord_check as coord_check
from distrain_jax.learned.coordinates import (
  draw_coordinates as draw_coordinates,
)
from distrain_jax.learned.coordinates import flax_probe as flax_probe
from distrain_jax.learned.kinds import MuInfo as MuInfo
from distrain_jax.learned.mup import mup_info as mup_info
from distrain_jax.learned.mup import mup_multipliers as mup_multipliers
from distrain_jax.learned.mup_optimizers import mup_adamw as mup_adamw
from distrain_jax.learned.mup_optimizers import mup_sgd as mup_sgd
from distrain_jax.learned.mup_optimizers import scale_by_mup as scale_by_mup
from distrain_jax.learned.step import MuloState as MuloState
from distrain_jax.learned.step import Rule as Rule
from distrain_jax.learned.step import mulo_init as mulo_init
from distrain_jax.learned.step import mulo_step as mulo_step
from distrain_jax.learned.storage import load_theta as load_theta
from distrain_jax.learned.storage import save_theta as save_theta
from distrain_jax.learned.theta import Theta as Theta
from distrain_jax.learned.theta import check_theta as check_theta
from distrain_jax.learned.theta import decay_rates as decay_rates
from distrain_jax.learned.theta import init_theta as init_theta
from distrain_jax.learned.transform import mulo as mulo
from distrain_jax.learned.transform import scale_by_mulo as scale_by_mulo
from distrain_jax.learned.unpickle import theta_from_pickle as theta_from_pickle
from distrain_jax.learned.velo import VeloRule as VeloRule
from distrain_jax.learned.velo import VeloState as VeloState
from distrain_jax.learned.velo import check_velo_theta as check_velo_theta
from distrain_jax.learned.velo import init_velo_theta as init_velo_theta
from distrain_jax.learned.velo import scale_by_velo as scale_by_velo
from distrain_jax.learned.velo import velo as velo
from distrain_jax.learned.velo import velo_init as velo_init
from distrain_jax.learned.velo import velo_step as velo_step
from distrain_jax.learned.velo import (
  velo_theta_from_haiku as velo_theta_from_haiku,
)
