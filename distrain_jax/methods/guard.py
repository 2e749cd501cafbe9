"""Bad steps: found on every worker alike, and skipped by all of them or none.

Wraps any method. A method's metrics are equal on all workers, so what is
decided from them is decided alike everywhere, with no message of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from distrain_jax.method import Method

SETTLED = 20  # good steps before a spike can be told from the beginning
MEMORY = 0.98  # of the running mean of good losses


class GuardState(NamedTuple):
  inner: Any  # the method's own state
  good: jax.Array  # (), int32: good steps so far, equal on all workers
  bad: jax.Array  # (), int32: bad ones
  mean_loss: jax.Array  # (), float32: running mean over good steps


def guard(
  method: Method, *, action: str = "skip", spike: float = 0.0
) -> Method:
  """Counts bad steps in the metric `bad_steps`, and may skip them.

  A step is bad when its loss or grad_norm is not finite, or when its loss is
  above `spike` times the running mean of the good ones.

  Args:
    method: any method.
    action: "skip": a bad step leaves the method's state as it was, on all
      workers; the old state is then kept until the new one is judged, so the
      state's memory is needed twice. "count": the step is applied all the
      same, for a trainer that stops.
    spike: at least 1, or 0 for no such check.

  Raises:
    ValueError: if action or spike are none of these.
  """
  if action not in ("skip", "count"):
    raise ValueError(f"guard: `action` is skip or count; got {action!r}.")
  if spike != 0 and not spike > 1:
    raise ValueError(
      "guard: `spike` multiplies the running mean of the loss, so it is above "
      f"1, or 0 for no such check; got {spike!r}."
    )

  def init(key, params):
    zero = jnp.zeros((), jnp.int32)
    mean = jnp.zeros((), jnp.float32)
    return GuardState(method.init(key, params), zero, zero, mean)

  def step(state: GuardState, batch, key):
    new, metrics = method.step(state.inner, batch, key)
    loss = metrics["loss"].astype(jnp.float32)
    good = jnp.isfinite(loss)
    if "grad_norm" in metrics:
      good &= jnp.isfinite(metrics["grad_norm"])
    if spike:
      limit = spike * jnp.abs(state.mean_loss)
      good &= (state.good < SETTLED) | (loss <= limit)
    if action == "skip":
      keep = lambda new, old: jnp.where(good, new, old)
      new = jax.tree.map(keep, new, state.inner)
    # The first steps average plainly, later ones forget.
    weight = jnp.maximum(1 - MEMORY, 1.0 / (state.good + 1))
    mean = state.mean_loss + weight * (loss - state.mean_loss)
    state = GuardState(
      inner=new,
      good=state.good + good,
      bad=state.bad + ~good,
      mean_loss=jnp.where(good, mean, state.mean_loss),
    )
    return state, {**metrics, "bad_steps": state.bad}

  def reshard(state: GuardState, workers: int) -> GuardState:
    return state._replace(inner=method.reshard(state.inner, workers))

  def member(fn, state: GuardState):
    return method.member(fn, state.inner)

  def drain(state: GuardState, key):
    return state._replace(inner=method.drain(state.inner, key))

  return method._replace(
    init=init,
    step=step,
    params=lambda state: method.params(state.inner),
    specs=GuardState(inner=method.specs, good=P(), bad=P(), mean_loss=P()),
    reshard=None if method.reshard is None else reshard,
    member=None if method.member is None else member,
    drain=None if method.drain is None else drain,
  )
