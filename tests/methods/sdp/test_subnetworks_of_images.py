"""Subnetworks of a ResNet and a ViT against the whole one, units zeroed.

In training, so that BatchNorm takes its statistics from what a worker computes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax import models

pytestmark = pytest.mark.core

N, KEY = 4, jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
MODELS = {
  "resnet18": {"width": 1 / 8, "stem": "cifar", "classes": 3},
  "vit": {"embed": 16, "heads": 4, "mlp": 12, "layers": 2, "classes": 3},
}


def noisy(tree):
  """No scale is zero, so that every unit counts."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: np.asarray(x + 0.3 * rng.normal(size=x.shape), np.float32), tree
  )


@functools.cache
def made(name):
  """(model, its variables, names, numbers, the numbers that workers hold)."""
  model = models.create(name, **MODELS[name])
  start = models.init(model, KEY, IMAGES)
  variables = start._replace(params=noisy(start.params))
  of = functools.partial(models.logical_names, model, IMAGES)
  names = dj.Variables(of(), {c: of(collection=c) for c in start.model_state})
  alone = not start.model_state  # then params are all that there is
  loss = lambda params, rows, key: (0.0, {})
  stateful = dj.stateful(lambda params, state, rows, key: (0.0, ({}, state)))
  method = dj.sdp(
    loss if alone else stateful,
    optax.sgd(0.1),
    names=names.params if alone else names,
    shapes=variables.params if alone else variables,
    coverage=0.5,
  )
  leaves, treedef = jax.tree.flatten(variables)
  ends = np.cumsum([x.size for x in leaves])
  numbers = treedef.unflatten(
    np.arange(end - x.size, end, dtype=np.float32).reshape(x.shape)
    for x, end in zip(leaves, ends)
  )
  run = dj.simulate(method, workers=N)
  state = run.init(KEY, numbers.params if alone else numbers)
  ids = [state.params] if alone else [state.params, state.model_state]
  return model, variables, names, numbers, toys.numpy(ids)


def run(model, variables):
  """Logits, their gradient by the parameters, and the new statistics."""

  def loss(params):
    logits, new = model.apply(
      {"params": params, **variables.model_state},
      IMAGES,
      train=True,
      mutable=list(variables.model_state),
      rngs={"dropout": KEY},
    )
    weights = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32))
    return jnp.sum(logits * weights.reshape(logits.shape)), (logits, dict(new))

  (_, (logits, new)), grads = jax.value_and_grad(loss, has_aux=True)(
    variables.params
  )
  return logits, dj.Variables(grads, new)


@pytest.mark.parametrize("name", MODELS)
def test_a_subnetwork_is_the_whole_one_with_absent_units_zeroed(name):
  model, variables, names, numbers, ids = made(name)
  flat = np.concatenate([x.ravel() for x in jax.tree.leaves(variables)])
  apply = jax.jit(functools.partial(run, model))
  for w in range(N):
    here = [toys.of_worker(part, w) for part in ids]
    here = dj.Variables(*here, *([{}] if len(here) == 1 else []))
    mine = jax.tree.map(lambda x: flat[x.astype(int)], here)
    there = jax.tree.map(np.isin, numbers, here)
    zeroed = jax.tree.map(np.multiply, variables.params, there.params)
    logits, got = apply(mine)
    expected, dense = apply(variables._replace(params=zeroed))
    toys.near(logits, expected, 5e-5)

    def check(held, g, d, whole):
      at = np.searchsorted(whole.ravel(), held.ravel())
      toys.near(np.ravel(g), np.ravel(d)[at], 2e-4)

    jax.tree.map(check, here, got, dense, numbers)
    missing = jax.tree.map(lambda x: not x.all(), there)
    expected = jax.tree.map(
      lambda x, axes: (
        bool({"heads", "mlp"} & set(axes))
        or any(a and a.startswith("inner") for a in axes)
      ),
      variables,
      names,
    )
    assert missing == expected
