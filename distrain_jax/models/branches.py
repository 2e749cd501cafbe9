"""Residual branches: which can be left out, and what scales their output."""

from typing import Any

import flax.linen as nn
import jax

from distrain_jax.models import zoo
from distrain_jax.models.layers import Writer


def blocks(model: nn.Module, example: Any) -> tuple[str, ...]:
  """The residual blocks that a model runs without where they are not given.

  Those of a ResNet that keep the shape; all of a transformer whose blocks are
  not stacked (stacked ones are left out as indices on the axis `layers`).

  Args:
    model: a module; one of another library names its own by a method
      `optional_blocks() -> tuple of str`, or has none.
    example: as for `zoo.init`.

  Returns:
    Top-level keys of its parameters, and of `batch_stats` where it has that,
    in the order in which the blocks run.

  Raises:
    ValueError: for a block of which there are no parameters.

  >>> import jax.numpy as jnp
  >>> model = zoo.create("llama", layers=2, scan=False)
  >>> blocks(model, jnp.zeros((1, 8), jnp.int32))
  ('block_0', 'block_1')
  """
  named = getattr(model, "optional_blocks", tuple)()
  params = zoo.abstract(model, example).params
  for name in named:
    if name not in params:
      raise ValueError(
        f"{type(model).__name__}.optional_blocks: {name!r} is no top-level key "
        f"of the parameters, which are {', '.join(map(repr, params))}."
      )
  return tuple(named)


def branch_writers(model: nn.Module, example: Any) -> Any:
  """The arrays by which the output of a residual branch is linear.

  Multiplying those of a branch by s multiplies what it adds to the stream by s:
  attention's `out` and the feed-forward part's `down` with their biases, scale
  and bias of a residual block's last norm.

  Args:
    model: a module that marks them (`layers.Writer`), or has no branches.
    example: as for `zoo.init`.

  Returns:
    A pytree of bools of the parameters' structure; nothing is computed.

  >>> import jax.numpy as jnp
  >>> model = zoo.create("llama", layers=2)
  >>> writers = branch_writers(model, jnp.zeros((1, 8), jnp.int32))
  >>> writers["blocks"]["feed_forward"]
  {'down': True, 'gate': False, 'up': False}
  """
  boxed = zoo.boxes(model, example).params
  is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  return jax.tree.map(
    lambda leaf: isinstance(leaf, Writer), boxed, is_leaf=is_box
  )
