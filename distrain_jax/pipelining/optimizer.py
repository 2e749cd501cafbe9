"""The optimizer of a pipeline: every block has its own state, on its stage."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distrain_jax import gradients
from distrain_jax.pipelining.engine import Engine
from distrain_jax.pipelining.packing import Packed, Packing, packing
from distrain_jax.pipelining.plan import Plan

# One for all blocks, or one for each by name.
Transforms = (
  optax.GradientTransformation | Mapping[str, optax.GradientTransformation]
)


class Optimizer:
  """`tx` on the blocks of a plan; what it keeps is packed like the rest.

  A transform sees one block's parameters at a time. Updates are multiplied by
  the stage's of `scales`, clipping is by the norm of the stage's gradient.
  """

  def __init__(
    self,
    name: str,
    engine: Engine,
    tx: Transforms,
    clip_norm: float | None = None,
    scales: Sequence[float] | None = None,
  ):
    gradients.check_clip_norm(name, clip_norm)
    self.engine, self.tx, self.clip_norm = engine, tx, clip_norm
    self.scales = scales
    blocks = [b.name for stage in engine.plan.stages for b in stage]
    if isinstance(tx, Mapping) and set(tx) != set(blocks):
      raise ValueError(
        f"{name}: `tx` as a mapping has a transform for each block, "
        f"{blocks}; got {sorted(tx)}."
      )
    self.packing: Packing = self._packing(engine.plan)

  def of(self, block: str) -> optax.GradientTransformation:
    return self.tx[block] if isinstance(self.tx, Mapping) else self.tx

  def init(self, params: list[Any], stage: int) -> Packed:
    """The state of a stage's blocks, of their parameters."""
    states = [
      self.of(b.name).init(p)
      for b, p in zip(self.engine.plan.stages[stage], params)
    ]
    return self.packing.pack(states, stage)

  def update(
    self, grads: Packed, params: Packed, state: Packed
  ) -> tuple[Packed, Packed, jax.Array]:
    """(params, state, squared norm of the gradient before clipping)."""
    plan = self.engine.plan

    def branch(s):
      gs = plan.params.unpack(grads, s)
      ps = plan.params.unpack(params, s)
      squared = gradients.squared_norm(gs)
      if self.clip_norm is not None:
        scale = gradients.clip_scale(jnp.sqrt(squared), self.clip_norm)
        gs = gradients.scale_tree(gs, scale)
      new_params, new_states = [], []
      states = self.packing.unpack(state, s)
      for block, g, p, old in zip(plan.stages[s], gs, ps, states):
        updates, new = self.of(block.name).update(g, old, p)
        if self.scales is not None:
          scale = jnp.asarray(self.scales)[self.engine.stage()]
          updates = gradients.scale_tree(updates, scale)
        new_params.append(optax.apply_updates(p, updates))
        new_states.append(new)
      packed = self.packing.pack(new_states, s)
      return plan.params.pack(new_params, s), packed, squared

    # Stages of one kind share code only where their transforms are the same.
    also = [
      (self.packing.parts[s], tuple(id(self.of(b.name)) for b in stage))
      for s, stage in enumerate(plan.stages)
    ]
    return self.engine.switch(branch, also=also)

  def _packing(self, plan: Plan) -> Packing:
    by_stage = []
    for blocks, parts in zip(plan.stages, plan.params.parts):
      shapes = [
        part.treedef.unflatten(jax.ShapeDtypeStruct(*x) for x in part.shapes)
        for part in parts
      ]
      by_stage.append(
        [
          jax.eval_shape(self.of(b.name).init, p)
          for b, p in zip(blocks, shapes)
        ]
      )
    return packing(by_stage)
