"""A config's network in stages, as the pipelined methods take it."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from distrain_jax import models, pipelining
from distrain_jax.train import mup, optimizers

REPLICAS = "data"  # the mesh axis of pipelines side by side


def replicas(mesh_shape: Mapping[str, int]) -> int:
  """How many pipelines there are side by side."""
  return mesh_shape.get(REPLICAS, 1)


def partition(
  c: ConfigDict,
  model: nn.Module,
  task: models.Task,
  example: Mapping[str, Any],
  mesh_shape: Mapping[str, int],
) -> tuple[pipelining.Partition, dict[str, Any]]:
  """The stages, and the options by which a method is told about them.

  Args:
    c: the config.
    model, task: of it.
    example: one row of its batches, as shapes.
    mesh_shape: size of the axis `stage`, and of `data` for pipelines side by
      side.

  Raises:
    ValueError: for a model that is no sequence of parts, or has too few.
  """
  if not hasattr(model, "parts"):
    raise ValueError(
      f"config.method.name={c.method.name!r} trains a sequence of stages, but "
      f"config.model.name={c.model.name!r} cannot be cut into any. Models that "
      f"can: {', '.join(models.parts.NAMES)}."
    )
  rows = c.batch_size // (replicas(mesh_shape) * (c.method.accumulate or 1))
  micro = {
    k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    for k, x in example.items()
  }
  inputs = next(iter(example))
  shapes = models.zoo.abstract(model, example[inputs])
  told = {
    "shapes": shapes if task.stateful else shapes.params,
    "example": micro,
    "inputs": inputs,
  }
  blocks = models.parts.blocks(model, task.measure)
  try:
    cut = pipelining.partition(blocks, mesh_shape["stage"], **told)
  except ValueError as e:
    raise ValueError(f"config.mesh={dict(mesh_shape)}: {e}") from e
  side_by_side = REPLICAS if REPLICAS in mesh_shape else None
  return cut, told | {"replicas": side_by_side}


def transforms(
  c: ConfigDict, model: nn.Module, inputs: Any, cut: pipelining.Partition
) -> dict[str, Any]:
  """Each block's optimizer: the config's, with masks made of its own names.

  So is what muP knows, where the optimizer uses it.
  """
  names = models.logical_names(model, inputs)
  known = mup.info(c, model, inputs)
  made: dict[Any, Any] = {}  # one for all of equal masks: they share code

  def of(block):
    own = names.get(block.name, {})
    leaves, treedef = jax.tree.flatten(optimizers.decay_mask(own))
    infos = None if known is None else known.get(block.name, {})
    masks = tuple(leaves), treedef, tuple(jax.tree.leaves(infos))
    if masks not in made:
      made[masks] = optimizers.build(c.optimizer, c.steps, own, infos)
    return made[masks]

  return {b.name: of(b) for stage in cut.stages for b in stage}
