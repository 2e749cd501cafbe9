"""VeLO, a learned optimizer of two networks, as an optax transform.

tx = velo(theta, num_steps=1000)
updates, state = tx.update(grads, state, params, value=loss)
"""

from distrain_jax.learned.velo.convert import (
  velo_theta_from_haiku as velo_theta_from_haiku,
)
from distrain_jax.learned.velo.step import VeloRule as VeloRule
from distrain_jax.learned.velo.step import VeloState as VeloState
from distrain_jax.learned.velo.step import velo_init as velo_init
from distrain_jax.learned.velo.step import velo_step as velo_step
from distrain_jax.learned.velo.theta import check_velo_theta as check_velo_theta
from distrain_jax.learned.velo.theta import init_velo_theta as init_velo_theta
from distrain_jax.learned.velo.theta import velo_shapes as velo_shapes
from distrain_jax.learned.velo.transform import scale_by_velo as scale_by_velo
from distrain_jax.learned.velo.transform import velo as velo
