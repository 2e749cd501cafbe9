"""Models that are a sequence of parts, to be cut into stages.

Such a model's module has a method `parts() -> tuple of Part`, and its `__call__`
is `run(self, x, train)`. Its parameters are {part: those of the part's module},
so that the same ones serve the whole network, and each stage of a pipeline.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from distrain_jax import stages
from distrain_jax.method import Batch
from distrain_jax.models.layers import to_float32

# Models of `models.create` that are such sequences.
NAMES = (
  "rev_llama",
  "rev_mlp",
  "rev_vit",
  "revnet18",
  "revnet34",
  "revnet50",
)


class Part(NamedTuple):
  """One block of a network."""

  name: str  # key of its parameters
  # Without a name: a call is (x, train=...) -> y. Of the coupling
  # (x, r) -> (r + F(x), x) it is F.
  module: nn.Module
  coupling: bool = False
  grid: float | None = None  # of a coupling; see `stages.coupling`


def check_grid(owner: str, grid: float | None) -> None:
  """Refuses a grid that `stages.coupling` would refuse."""
  number = isinstance(grid, (int, float)) and grid > 0
  if grid is not None and not (number and np.frexp(grid)[0] == 0.5):
    raise ValueError(
      f"{owner}: grid={grid!r} must be a power of two, such as 2**-12 = "
      "0.000244140625, or None."
    )


def to_streams(x: Any, grid: float | None) -> Any:
  """Arrays as streams: float32, and on the grid if there is one.

  Float32 whatever F is computed in: going back subtracts from r + F(x) what was
  added, and a sum rounded to bfloat16's 8 bits no longer tells what r was.
  """
  one = lambda a: a if grid is None else stages.on_grid(a, grid)
  return jax.tree.map(lambda a: one(to_float32(a)), x)


def run(model: nn.Module, x: Any, train: bool) -> Any:
  """A model's parts one after the other, inside its compact `__call__`."""
  for part in model.parts():
    module = part.module.clone(parent=model, name=part.name)
    if not part.coupling:
      x = module(x, train=train)
      continue
    x, r = x
    y = module(x, train=train)
    x = (r + (y if part.grid is None else stages.on_grid(y, part.grid)), x)
  return x


def blocks(
  model: nn.Module,
  measure: Callable[[Any, Batch], tuple[jax.Array, Any]],
) -> tuple[stages.Block, ...]:
  """A model's parts as the blocks that pipelined methods take.

  The key of a block feeds its module's dropout. Parts of equal modules run the
  same code.

  Args:
    model: has `parts`; the last one's result is what `measure` takes.
    measure: `(logits, targets) -> (loss, aux)`, such as `Task.measure`; targets
      is the batch without its inputs.

  Raises:
    TypeError: for a model that has no parts.
  """
  if not hasattr(model, "parts"):
    raise TypeError(
      f"models.parts.blocks: {type(model).__name__} is not a sequence of parts. "
      f"Models that are: {', '.join(NAMES)}."
    )
  *body, end = model.parts()
  made = [_block(part) for part in body]

  def loss(params, model_state, x, targets, key):
    out, model_state = _apply(end.module, params, model_state, x, key)
    value, aux = measure(out, targets)
    return value, (aux, model_state)

  return (*made, stages.last(end.name, loss))


def _block(part: Part) -> stages.Block:
  def fn(params, model_state, x, key):
    return _apply(part.module, params, model_state, x, key)

  kind = part.module  # Linen modules are equal where their fields are
  if part.coupling:
    return stages.coupling(part.name, fn, grid=part.grid, kind=kind)
  return stages.plain(part.name, fn, kind=kind)


def _apply(module, params, model_state, x, key):
  y, changed = module.apply(
    {"params": params, **model_state},
    x,
    train=True,
    rngs={"dropout": key},
    mutable=list(model_state),
  )
  return y, {**model_state, **changed}
