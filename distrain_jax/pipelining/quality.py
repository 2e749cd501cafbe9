"""How good PETRA's gradients are, and reconstruction from rounded streams.

A micro-batch's gradient on a stage against others of the same micro-batch:

- end-to-end: back-propagation with all parameters as they are in the tick of the
  stage's backward pass, as if nothing had been late;
- delayed: back-propagation with each stage's parameters of its forward pass,
  late as well, but with nothing reconstructed.

Letters: J stages, numbered from 0.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distrain_jax import stages
from distrain_jax.pipelining import emulation as emulations
from distrain_jax.pipelining.emulation import Emulation, MicroBatch
from distrain_jax.stages import Block


class Probe(NamedTuple):
  """Of one micro-batch: two gradients against the end-to-end one, by stage.

  Over all parameters of a stage together. NaN where the end-to-end gradient is
  zero; a cosine is 0 where only the other is.
  """

  cosine: np.ndarray  # (J,), of PETRA's
  norm_ratio: np.ndarray  # (J,), PETRA's norm over the end-to-end one's
  delayed_cosine: np.ndarray  # (J,)
  delayed_norm_ratio: np.ndarray  # (J,)
  # {reversible block: |x' - x| / |x| of its reconstructed input x'}.
  reconstruction: dict[str, float]


def probe(emulation: Emulation, m: MicroBatch) -> Probe:
  """Of a watched micro-batch that left in the emulation's last tick."""
  at, last = emulation.history, len(emulation.stages) - 1
  old = {
    b.name: at[s][b.name] for s, x in enumerate(emulation.stages) for b in x
  }
  delayed, rows = emulation.gradient(m, old), []
  for s, blocks in enumerate(emulation.stages):
    wanted = emulation.gradient(m, at[2 * last - s], emulation.starts[s])
    of = lambda grads, blocks=blocks: [grads[b.name] for b in blocks]
    rows.append(
      (*compare(of(m.grads), of(wanted)), *compare(of(delayed), of(wanted)))
    )
  errors = {
    b.name: m.errors[b.name] for b in emulation.blocks if b.name in m.errors
  }
  return Probe(
    *np.array(rows, np.float64).T, {k: float(x) for k, x in errors.items()}
  )


@jax.jit
def compare(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
  """(cosine of two gradients, |a| / |b|): NaN for b = 0, else 0 for a = 0.

  >>> [float(x) for x in compare(jnp.array([0.0, 2.0]), jnp.array([0.0, 1.0]))]
  [1.0, 2.0]
  """
  wide = lambda x: x.astype(jnp.float32)
  dot = lambda a, b: sum(
    jnp.vdot(wide(x), wide(y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
  )
  # Norms first: a product of two squares would leave float32's range earlier.
  norms = [jnp.sqrt(jnp.asarray(dot(x, x), jnp.float32)) for x in (a, b)]
  safe = [jnp.where(n > 0, n, 1) for n in norms]
  cosine = dot(a, b) / safe[0] / safe[1]
  defined = lambda x: jnp.where(norms[1] > 0, x, jnp.nan)
  return defined(cosine), defined(norms[0] / safe[1])


def average(probes: Iterable[Probe]) -> dict[str, Any]:
  """Means and standard deviations over probes, without what is undefined.

  Returns:
    {field of Probe: {"mean": [...], "std": [...], "count": [...]}}, the last one
    how many probes it was defined in (mean and std are None for 0), and for
    "reconstruction" {block: the same of numbers}.
  """
  probes = list(probes)

  def one(values):
    x = np.asarray(values, np.float64)
    x = x[np.isfinite(x)]
    mean, std = (float(x.mean()), float(x.std())) if x.size else (None, None)
    return {"mean": mean, "std": std, "count": x.size}

  def many(field):
    each = [one(x) for x in zip(*(getattr(p, field) for p in probes))]
    return {k: [x[k] for x in each] for k in ("mean", "std", "count")}

  blocks = probes[0].reconstruction
  return {f: many(f) for f in Probe._fields[:-1]} | {
    "reconstruction": {
      b: one([p.reconstruction[b] for p in probes]) for b in blocks
    }
  }


def longest_reversible(blocks: Sequence[Block]) -> list[Block]:
  """The longest run of neighbouring reversible blocks, of equals the first."""
  runs = itertools.groupby(blocks, lambda b: b.inverse is not None)
  found = [list(run) for reversible, run in runs if reversible]
  if not found:
    raise ValueError("quality.rounding: no block is reversible.")
  return max(found, key=len)


def rounding(
  blocks: Sequence[Block],
  model: Any,
  inputs: Any,
  key: jax.Array,
  depths: Sequence[int],
  *,
  dtype: DTypeLike | None = None,
) -> list[float]:
  """|x' - x| / |x| after so many reversible blocks forward, and back again.

  The longest run of neighbouring reversible blocks is gone through again and
  again, with fixed parameters; backward by the pass that has the gradient too.

  Args:
    blocks: of the whole network; those before the run make x.
    model: its params, or `Variables`.
    inputs: a batch's.
    key: of the blocks.
    depths: the numbers of blocks.
    dtype: streams are rounded to it after every block, whatever F is computed
      in; None: as blocks return them.

  Raises:
    ValueError: if no block is reversible, or the run changes shapes.
  """
  run, codes = longest_reversible(blocks), emulations.alike(blocks)
  given = stages.parts(model)

  def rounded(x):  # op by op: compiled, XLA may leave the rounding out
    return x if dtype is None else x.astype(dtype).astype(x.dtype)

  def forward(block, x):
    own = stages.of_block(block.name, *given)
    return emulations.forward(codes[block.name], own, x, key)[0]

  x = inputs
  for block in itertools.takewhile(lambda b: b is not run[0], blocks):
    x = forward(block, x)
  flow = [jax.tree.map(rounded, x)]
  for i in range(max(depths)):
    flow.append(jax.tree.map(rounded, forward(run[i % len(run)], flow[-1])))
  if len({stages.described(x) for x in flow}) > 1:
    raise ValueError(
      f"quality.rounding: the blocks {[b.name for b in run]} change the "
      "streams' shapes, so that they cannot be gone through again."
    )

  def error(depth):
    x = flow[depth]
    dy = jax.tree.map(jnp.ones_like, x)
    for i in reversed(range(depth)):
      block = run[i % len(run)]
      own = stages.of_block(block.name, *given)
      x = emulations.reverse(codes[block.name], own, x, dy, key).x
      x = jax.tree.map(rounded, x)
    return float(emulations.relative_error(x, flow[0]))

  return [error(depth) for depth in depths]
