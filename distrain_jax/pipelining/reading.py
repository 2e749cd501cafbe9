"""Between the network as users have it and what a stage of a pipeline holds."""

from typing import Any

import jax
import jax.numpy as jnp

from distrain_jax import gradients, stages
from distrain_jax.method import Variables
from distrain_jax.pipelining.engine import Engine, Passes
from distrain_jax.pipelining.optimizer import Optimizer


class Reading:
  """Params in and out, batches in, metrics out."""

  def __init__(
    self,
    name: str,
    engine: Engine,
    optimizer: Optimizer,
    inputs: str | None,
    stateful: bool,
  ):
    self.name, self.engine, self.optimizer = name, engine, optimizer
    self.inputs, self.stateful = inputs, stateful

  def start(self, model: Any):
    """(params, model_state, opt_state) of this stage, packed."""
    plan = self.engine.plan
    self.engine.check_axis(self.name)
    if isinstance(model, Variables) != self.stateful:
      raise TypeError(
        f"{self.name}: `shapes` and the params of init must both be Variables "
        "or both params alone; those of init are "
        f"{type(model).__name__}."
      )
    params, model_state = stages.parts(model)

    def branch(s):
      mine, states = plan.own(params, model_state, s)
      return (
        plan.params.pack(mine, s),
        plan.model_state.pack(states, s),
        self.optimizer.init(mine, s),
      )

    return self.engine.switch(branch, by_place=True)

  def model(self, params, model_state):
    """The whole network, on every stage: what `start` took."""
    plan, engine = self.engine.plan, self.engine
    if engine.replicas is not None:
      model_state = jax.lax.pmean(model_state, engine.replicas)
    gather = lambda tree: jax.lax.all_gather(tree, engine.axis)
    params, model_state = gather(params), gather(model_state)
    of = lambda packing, tree: [
      packing.unpack(jax.tree.map(lambda x, s=s: x[s], tree), s)
      for s in range(plan.count)
    ]
    whole = plan.network(
      of(plan.params, params), of(plan.model_state, model_state)
    )
    return Variables(*whole) if self.stateful else whole[0]

  def micro_batches(self, batch: Any, k: int):
    """(inputs, targets) with leading axes (k, rows).

    Raises:
      ValueError: where a micro-batch is not as `example` was.
    """
    cut = gradients.microbatches(batch, k)
    micro = stages.inputs_and_targets(cut, self.inputs)
    plan = self.engine.plan
    expected = plan.inputs[0][0], plan.targets
    got = jax.tree.map(lambda x: (x.shape[1:], x.dtype), micro)
    if got != jax.tree.map(lambda x: (x.shape, x.dtype), expected):
      raise ValueError(
        f"{self.name}: a micro-batch of one pipeline is "
        f"{stages.described(jax.tree.map(lambda x: x[0], micro))}, but "
        f"`example` was {stages.described(expected)}. The rows of a batch are "
        f"those of the example times accumulate={k} and the pipelines side by "
        "side."
      )
    return micro

  def no_metrics(self):
    """Before any micro-batch has reached the last stage."""
    zero = jnp.zeros((), jnp.float32)
    aux = jax.tree.map(lambda x: zero, self.engine.plan.aux)
    return {**aux, "loss": zero, "grad_norm": zero, "busy": zero}

  def metrics(self, passes: Passes, loss, aux, squared_norm, before):
    """Equal on all stages, from what the last one saw.

    Args:
      passes: (ticks,) each, of this stage.
      loss, aux: (ticks,) each.
      squared_norm: (), of this stage's gradient.
      before: what is reported where no tick had a loss.
    """
    seen = (passes.backward >= 0) & self.engine.is_last()
    total = lambda x: jnp.where(seen, x.astype(jnp.float32), 0).sum()
    sums = jax.tree.map(total, {**aux, "loss": loss})
    busy = sum((x >= 0).mean(dtype=jnp.float32) for x in passes) / len(passes)
    sums, count, squared, busy = jax.lax.psum(
      (sums, seen.sum(dtype=jnp.float32), squared_norm, busy), self.engine.axis
    )
    if self.engine.replicas is not None:
      sums, squared = jax.lax.pmean((sums, squared), self.engine.replicas)
    means = {
      name: jnp.where(count > 0, x / jnp.maximum(count, 1), before[name])
      for name, x in sums.items()
    }
    busy /= self.engine.plan.count
    return {**means, "grad_norm": jnp.sqrt(squared), "busy": busy}

  def layout(self, *more: Any) -> str:
    """Which block is on which stage, and what else the state depends on."""
    cut = " | ".join(
      " ".join(b.name for b in stage) for stage in self.engine.plan.stages
    )
    return ", ".join([f"stages: {cut}", *map(str, more)])
