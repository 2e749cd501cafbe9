"""What a shuffle holds on a TPU, as the oldest supported JAX compiles it.

Not `core`: the XLA of jax 0.12 lays even a loop's state into fast memory, if all
of it fits, and copies it out again.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import distrain_jax as dj
from distrain_jax import inspect
from distrain_jax.population import members

N, KEY = 8, jax.random.key(0)


def test_leaves_that_fit_a_tpus_fast_memory_are_held_once():
  """Without `coordinates.in_place` 44 % of the parameters live meanwhile.

  With its loop alone, 100 %. The heap grows by more than what lives: by 16 KiB a
  copy, and by the packing.
  """
  layers, width = 16, 1024
  names = [f"layer_{i}" for i in range(layers)]

  def deep(params, batch, key):
    del key
    forward = lambda x, name: jnp.tanh(x @ params[name])
    return jnp.mean(functools.reduce(forward, names, batch["x"]) ** 2), {}

  def compiled(name, **options):
    method = getattr(dj, name)(deep, optax.sgd(0.1, momentum=0.9), **options)
    run = dj.distribute(method, inspect.mesh("v5e:2x4", {method.axis: -1}))
    leaf = jax.ShapeDtypeStruct((N, width, width), jnp.float32)
    state = run.abstract(KEY, dict.fromkeys(names, leaf), per_worker=True)
    batch = {"x": jax.ShapeDtypeStruct((N * 16, width), jnp.float32)}
    key = jax.eval_shape(lambda: KEY)
    return inspect.compile(run, state, batch, key, with_buffers=True)

  alone = compiled("ensemble")
  shuffled = compiled("wash", rate=0.001, layer_schedule="constant")
  size = layers * width**2 * 4
  assert alone.buffers.during(members.SCOPE) is None
  assert 0 < shuffled.buffers.during(members.SCOPE) < 0.05 * size
  more = shuffled.memory.temporaries - alone.memory.temporaries
  assert more < 0.25 * size
