"""What SDP's subnetworks compute, counted; and how they are aligned, drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distrain_jax import gradients, spmd
from distrain_jax.inspect.compiling import compile as compile_
from distrain_jax.methods.sdp import Alone

# Okabe and Ito's: a hue a level, a tint a masking.
COLOURS = {
  "neuron forward": "#d55e00",
  "neuron backward": "#e69f00",
  "block forward": "#0072b2",
  "block backward": "#56b4e9",
}
NOTE = """\
a worker: on its own rows, restricted to what it holds; mean over the workers,
band from least to most. Backward masks give 1 by construction.
mean over holders: what the optimizer gets, with the dense gradient on all rows."""


def flops(each: Alone, batch: Any, key: Any) -> tuple[np.ndarray, float]:
  """Operations of a worker's loss and gradient, as compiled on this device.

  Args:
    each: the subnetworks; workers of equal shapes are compiled once.
    batch: a global one, divided among the workers; as arrays or shapes.
    key: of the losses.

  Returns:
    (of each worker (N,), of the whole model on as many rows).

  Raises:
    NotImplementedError: for an operation that cannot be counted.
  """
  mesh = spmd.make_mesh({"data": 1}, jax.devices()[:1])
  here = NamedSharding(mesh, P())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
  rows = jax.eval_shape(lambda x: spmd.split_rows(x, each.workers), batch)
  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows
  )
  given = jax.tree.map(place, (each.model.whole, rows, key))
  kinds: dict[Any, float] = {}
  counts = []
  for w in range(each.workers):
    own = jax.eval_shape(lambda v, w=w: each.own(v, w, w), each.model.whole)
    leaves, treedef = jax.tree.flatten(own)
    kind = treedef, tuple(x.shape for x in leaves)
    if kind not in kinds:
      one = lambda v, rows, key, w=w: each.gradient(v, rows, key, w, w)
      kinds[kind] = _count(one, given)
    counts.append(kinds[kind])
  dense = gradients.gradient_fn(each.loss_fn)
  return np.array(counts), _count(lambda v, *rest: dense(*v, *rest), given)


def _count(gradient, arguments) -> float:
  def run(*given):
    g = gradient(*given)
    return g.loss, g.grads

  step = compile_(jax.jit(run), *arguments).step
  if step.unknown:
    raise NotImplementedError(f"not counted: {', '.join(step.unknown)}.")
  return sum(step.flops.values())


def draw(
  found: Mapping[str, Mapping[str, Any]], path: str | Path, *, title: str = ""
) -> None:
  """Writes a PNG: cosines against coverage, a panel a point of the training.

  Args:
    found: {point: {variant: {coverage: what `alignment` returned}}}.
    path: of the PNG.
    title: above all panels.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.6 * len(found) + 2.4, 5), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
  for axes, (point, variants) in zip(panels, found.items()):
    for variant, numbers in variants.items():
      _lines(axes, variant, numbers)
    axes.set(title=point, xlabel="coverage")
    axes.grid(alpha=0.3)
  panels[0].set_ylabel("cosine with the dense gradient")
  panels[-1].legend(
    frameon=False,
    fontsize=8,
    handlelength=4,
    loc="upper left",
    bbox_to_anchor=(1.01, 1),
  )
  figure.suptitle(title)
  figure.supxlabel(NOTE, fontsize=8)
  figure.savefig(path, dpi=130)


def _lines(axes, variant: str, numbers: Mapping[str, Any]) -> None:
  coverages = sorted(numbers, key=float)
  x = [float(c) for c in coverages]
  each = np.array([numbers[c]["cosine"] for c in coverages])
  mean = [numbers[c]["cosine_to_mean"] for c in coverages]
  colour = COLOURS[variant]
  how = {"color": colour, "marker": "o", "ms": 4}
  axes.plot(x, each.mean(1), label=f"{variant}: a worker", **how)
  ends = each.min(1), each.max(1)
  axes.fill_between(x, *ends, color=colour, alpha=0.12, lw=0)
  axes.plot(x, mean, "--", label=f"{variant}: mean over holders", **how)
  axes.set_xticks(x)
