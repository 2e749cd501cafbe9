"""BatchNorm's statistics estimated anew, for a model that is only evaluated.

A model may be evaluated that no worker trained: an average of several, or one
put together from subnetworks. The running averages of their statistics are not
its own. Here some batches pass through the model itself, and each layer's mean
and variance over all of their rows take the place of its running averages, as
in section 3 of Wu and Johnson, 2021, https://arxiv.org/abs/2105.07576. Like
there, a layer's input is normalised by each batch's own statistics.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import spmd
from distrain_jax.method import Variables
from distrain_jax.runners import Run

STATISTICS = "batch_stats"
# Fields of a model that only mean something in training, or on a named axis.
QUIET = {"axis_name": None, "dropout": 0.0, "stochastic_depth": 0.0}


def recalibrator(
  run: Run, model: nn.Module, *, inputs: str = "image"
) -> Callable[[Any, Iterable[Any]], Any]:
  """`(variables, batches) -> variables` with the statistics of the batches.

  Variances are those of all rows: the mean of the batches' variances plus the
  variance of their means. Other statistics than `mean` and `var`, siblings, are
  averaged. All batches count alike, so they have equally many rows, none of
  which is padding. Whatever is drawn at random in the model's fields `dropout`
  and `stochastic_depth` is off, as in evaluation.

  Args:
    run: whose mesh the batches are spread over. `batches` are this process's
      rows of a step's; the statistics are those of the rows of all processes.
    model: a Linen module, `apply(variables, x, train=True)`, whose statistics
      are float arrays in the collection `batch_stats`, and follow each batch as
      `m * old + (1 - m) * new` for some m.
    inputs: key of the model's input in a batch.

  Returns:
    A function; it compiles once. It returns what has no such statistics
    (bare params, or a model without BatchNorm) as it is, and reads no batch.
    It raises a ValueError if there is no batch.
  """
  place = None if run.mesh is None else NamedSharding(run.mesh, P())

  def add(variables, seen, pooled, batch):
    new = _of_batch(model, variables, batch[inputs])
    return _pool(seen, pooled, new)

  zeros = lambda statistics: jax.tree.map(jnp.zeros_like, statistics)
  zeros, add = (jax.jit(f, out_shardings=place) for f in (zeros, add))

  def recalibrate(variables, batches):
    if not isinstance(variables, Variables) or not (
      given := variables.model_state.get(STATISTICS)
    ):
      return variables
    seen = 0
    with spmd.no_current_mesh():
      pooled = zeros(given)
      for batch in batches:
        jax.block_until_ready(pooled)  # one program in flight at a time
        pooled = add(variables, seen, pooled, run.put(batch))
        seen += 1
    if not seen:
      raise ValueError(
        "recalibrate: `batches` is empty, but the model's statistics are to be "
        "those of some batches. Pass at least one."
      )
    state = {**variables.model_state, STATISTICS: pooled}
    return variables._replace(model_state=state)

  return recalibrate


def _of_batch(model: nn.Module, variables: Variables, x: jax.Array) -> Any:
  """The statistics of one batch alone, in float32."""
  params, state = variables
  fields = {k: v for k, v in QUIET.items() if hasattr(model, k)}
  quiet = model.clone(**fields)

  def after(statistics):
    _, changes = quiet.apply(
      {"params": params, **state, STATISTICS: statistics},
      x,
      train=True,
      mutable=list(state),
      rngs={"dropout": jax.random.key(0)},
    )
    return changes[STATISTICS]

  # They follow a batch as m * old + (1 - m) * new: whatever m is, it is the
  # slope, and what is left of it at old = 0 is the batch's share.
  old = state[STATISTICS]
  zeros, ones = (jax.tree.map(f, old) for f in (jnp.zeros_like, jnp.ones_like))
  shares, slopes = jax.jvp(after, (zeros,), (ones,))
  return jax.tree.map(lambda share, m: share / (1 - m), shares, slopes)


def _pool(seen: jax.Array, pooled: Any, new: Any) -> Any:
  """Statistics of `seen` batches and one more."""
  weight = 1 / (seen + 1)  # of the new ones
  average = lambda a, b: a + weight * (b - a)
  if not isinstance(pooled, Mapping):
    return average(pooled, new)
  out = {k: _pool(seen, pooled[k], new[k]) for k in pooled}
  if {"mean", "var"} <= pooled.keys() and not isinstance(out["var"], Mapping):
    apart = jnp.square(new["mean"] - pooled["mean"])
    out["var"] += weight * (1 - weight) * apart
  return out
