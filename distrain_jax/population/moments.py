"""The parts of an optimizer's state that follow the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from distrain_jax.method import Params


def split(
  name: str, opt_state: optax.OptState, params: Params
) -> tuple[list[Params], Any]:
  """The trees of an optimizer's state that are like the parameters.

  Args:
    name: of the factory, for errors.
    opt_state: made by `tx.init(params)`.
    params: or their shapes.

  Returns:
    `(trees, rebuild)`, with `rebuild(trees)` the state.

  Raises:
    ValueError: if the state has other floating arrays: where a coordinate's
      share of them lies cannot be told.
  """
  wanted, shapes = jax.tree.structure(params), _shapes(params)

  def is_moment(x):
    alike = jax.tree.structure(x) == wanted and _shapes(x) == shapes
    return alike and all(map(_is_floating, jax.tree.leaves(x)))

  parts, treedef = jax.tree.flatten(opt_state, is_leaf=is_moment)
  found = list(map(is_moment, parts))
  for part, moment in zip(parts, found):
    if not moment and _is_floating(part) and jnp.ndim(part):
      raise ValueError(
        f"{name}: shuffle_optimizer=True moves what belongs to a coordinate "
        "with it, but this optimizer's state has an array of shape "
        f"{jnp.shape(part)} that is not part of a tree like the parameters. "
        "Use an optimizer whose moments are such trees (sgd with momentum, "
        "adam, adamw, lion), or shuffle_optimizer=False."
      )

  def rebuild(moments):
    rest = iter(moments)
    return treedef.unflatten(
      [next(rest) if moment else part for part, moment in zip(parts, found)]
    )

  return [part for part, moment in zip(parts, found) if moment], rebuild


def _shapes(tree) -> list[tuple[int, ...]]:
  return [jnp.shape(x) for x in jax.tree.leaves(tree)]


def _is_floating(x) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)
