"""Which optimizers may be sharded flat: found by trying, not by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax.elementwise import check_elementwise

PARAMS = {"w": jnp.ones((6, 4)), "b": jnp.zeros(5)}
WARM = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 1000, 10_000)


def by_ndim(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def by_path(params):
  named_w = lambda path, x: jax.tree_util.keystr(path) == "['w']"
  return jax.tree_util.tree_map_with_path(named_w, params)


def labelled(w, b):
  return optax.multi_transform({"w": w, "b": b}, {"w": "w", "b": "b"})


def stateless(update):
  """A user's own: `update(updates, params) -> updates`."""
  return optax.GradientTransformation(
    lambda params: optax.EmptyState(),
    lambda updates, state, params=None: (update(updates, params), state),
  )


# It moves zeros too, and so the padding of the pieces.
pull_to_one = stateless(
  lambda updates, params: jax.tree.map(
    lambda g, p: g - 0.1 * (1.0 - p), updates, params
  )
)

ELEMENTWISE = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": optax.adam(1e-3),
  "adamw masked by ndim": optax.adamw(1e-3, mask=by_ndim),
  "adamw masked by path": optax.adamw(1e-3, mask=by_path),
  "adamw masked by a tree": optax.adamw(1e-3, mask={"w": True, "b": False}),
  "adamw from a warm-up": optax.adamw(WARM),
  "adagrad": optax.adagrad(0.1),
  "lion": optax.lion(1e-4),
  "yogi": optax.yogi(1e-3),
  "zero_nans": optax.chain(optax.zero_nans(), optax.sgd(0.1)),
  "own: pull to one": optax.chain(pull_to_one, optax.scale(-0.1)),
  "clip each": optax.chain(optax.clip(1.0), optax.adam(1e-3)),
  "MultiSteps": optax.MultiSteps(optax.adam(1e-3), 4),
  "multi_transform": labelled(optax.adam(1e-3), optax.sgd(0.1)),
  "hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=WARM),
}


def shrink(x, most):
  return x * jnp.minimum(1.0, most / (jnp.linalg.norm(x) + 1e-9))


by_leaf_norm = stateless(
  lambda updates, _: jax.tree.map(lambda g: shrink(g, 1.0), updates)
)
by_mean = stateless(
  lambda updates, _: jax.tree.map(lambda g: g - g.mean(), updates)
)
by_param_norm = stateless(
  lambda updates, params: jax.tree.map(
    lambda g, p: g * jnp.linalg.norm(p), updates, params
  )
)
small_norm = optax.chain(
  optax.adam(1e-3),
  stateless(lambda u, _: jax.tree.map(lambda g: shrink(g, 10.0), u)),
)


def last_two():
  """The mean of the last two gradients, from a state with an axis of its own."""

  def init(params):
    return jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), params)

  def update(updates, state, params=None):
    del params
    push = lambda old, g: jnp.stack([old[1], g])
    state = jax.tree.map(push, state, updates)
    return jax.tree.map(lambda x: x.mean(0), state), state

  return optax.GradientTransformation(init, update)


NEEDS_MORE = {
  "adafactor": optax.adafactor(1e-3),
  "adafactor, factored": optax.adafactor(1e-3, min_dim_size_to_factor=2),
  "clip_by_global_norm": optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(1e-3)
  ),
  "clipped after adam": optax.chain(
    optax.adam(1e-3), optax.clip_by_global_norm(1.0)
  ),
  "block rms": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
  "adaptive clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
  "centralized": optax.chain(optax.centralize(), optax.sgd(0.1)),
  "lamb": optax.lamb(1e-3),
  "lamb from a warm-up": optax.lamb(WARM),
  "lars": optax.lars(1e-3),
  "muon": optax.contrib.muon(1e-3),
  "dadapt": optax.contrib.dadapt_adamw(),
  "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
  "MultiSteps of a norm": optax.MultiSteps(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), 8
  ),
  "a norm of the smallest leaf only": labelled(optax.adam(1e-3), small_norm),
  "clipped far above": optax.chain(
    optax.zero_nans(), optax.clip_by_global_norm(1e3), optax.sgd(0.1)
  ),
  "own: leaf norm": by_leaf_norm,
  "own: leaf mean": by_mean,
  "own: parameter norm": by_param_norm,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_taken(name):
  check_elementwise("zero1", ELEMENTWISE[name], PARAMS)


@pytest.mark.parametrize("name", NEEDS_MORE)
def test_optimizers_that_need_more_than_one_element_are_refused(name):
  with pytest.raises(ValueError, match=r"zero1 shards the optimizer element"):
    check_elementwise("zero1", NEEDS_MORE[name], PARAMS)


def test_a_state_with_axes_of_its_own_is_refused():
  # Elementwise as it is, but nobody knows how to cut it for other workers.
  with pytest.raises(ValueError, match=r"state\['b'\] has shape \(2, 5\)"):
    check_elementwise("zero1", last_two(), PARAMS)


def test_the_message_says_which_leaf_and_what_to_do():
  only_w = labelled(by_leaf_norm, optax.sgd(0.1))
  with pytest.raises(ValueError) as e:
    check_elementwise("zero1", only_w, PARAMS)
  assert "updates params['w'] differently" in str(e.value)
  assert "zero1(..., clip_norm=...)" in str(e.value)
  assert "use ddp" in str(e.value)


def test_it_is_judged_while_tracing_and_from_shapes_alone():
  shapes = jax.eval_shape(lambda: PARAMS)
  check_elementwise("zero1", optax.adam(1e-3), shapes)
  check = functools.partial(check_elementwise, "zero1", by_leaf_norm)
  with pytest.raises(ValueError, match="element by element"):
    jax.jit(lambda params: check(params))(PARAMS)
  with pytest.raises(ValueError, match="element by element"):
    jax.vmap(check)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))


def test_nan_checks_of_the_user_do_not_trip_it():
  tx = optax.adam(2e-3)
  with jax.debug_nans(True):
    check_elementwise("zero1", tx, PARAMS)


def test_bfloat16_and_scalar_leaves_are_judged_alike():
  params = {"w": jnp.ones((3, 3), jnp.bfloat16), "s": jnp.ones(())}
  check_elementwise("zero1", optax.adam(1e-3), params)
  with pytest.raises(ValueError, match="element by element"):
    check_elementwise("zero1", by_leaf_norm, params)
  assert np.ndim(params["s"]) == 0
