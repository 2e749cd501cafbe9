"""Coordinate check: do activations move alike at all widths?

Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466,
appendix D.1. After some steps, what a layer computes has changed by some
standard deviation. In muP that does not depend on the width; where it grows or
fades with the width, a multiplier, an initialisation or a forward factor is not
muP's.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Probe(NamedTuple):
  """A network of some width, to be trained for some steps."""

  params: Any
  loss: Callable  # (params, batch) -> ()
  layers: Callable  # (params, batch) -> {name: activations}
  tx: optax.GradientTransformation


class Coordinates(NamedTuple):
  """How far each layer's activations have moved from where they started."""

  widths: tuple[int, ...]
  moved: dict[str, np.ndarray]  # name -> (widths, steps), standard deviations

  def growth(self) -> dict[str, float]:
    """Of each layer, the largest over the smallest width, after all steps."""
    return {k: float(x[-1, -1] / x[0, -1]) for k, x in self.moved.items()}


def coord_check(
  build: Callable[[int, jax.Array], Probe],
  widths: Sequence[int],
  batch: Any,
  *,
  steps: int = 10,
  seeds: int = 1,
) -> Coordinates:
  """Trains at several widths on one batch, and measures all layers.

  Args:
    build: `(width, key) -> Probe`.
    widths: ascending.
    batch: the same at every step and width.
    steps: of training.
    seeds: keys that are averaged over.

  Returns:
    Standard deviations of x_t - x_0 over a layer's activations x.

  Raises:
    ValueError: fewer than two widths, or not ascending.
  """
  widths = tuple(widths)
  if len(widths) < 2 or list(widths) != sorted(set(widths)):
    raise ValueError(
      "coord_check: `widths` are two or more, ascending; got "
      f"{widths}. E.g. (64, 128, 256)."
    )
  moved: dict[str, list] = {}
  for width in widths:
    runs = [
      _run(build(width, jax.random.key(seed)), batch, steps)
      for seed in range(seeds)
    ]
    for name in runs[0]:
      moved.setdefault(name, []).append(np.mean([r[name] for r in runs], 0))
  return Coordinates(widths, {k: np.stack(x) for k, x in moved.items()})


def _run(probe: Probe, batch, steps):
  """Name -> (steps,)."""

  @jax.jit
  def run(params):
    first = probe.layers(params, batch)

    def step(carry, _):
      params, state = carry
      grads = jax.grad(probe.loss)(params, batch)
      updates, state = probe.tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      now = probe.layers(params, batch)
      std = jax.tree.map(lambda x, y: jnp.std(x - y), now, first)
      return (params, state), std

    return jax.lax.scan(step, (params, probe.tx.init(params)), length=steps)[1]

  return jax.tree.map(np.asarray, run(probe.params))


def draw_coordinates(
  found: dict[str, Coordinates], path: str | os.PathLike
) -> None:
  """A panel for each way of training: movement against width, by layer.

  Args:
    found: title -> what `coord_check` gave.
    path: of the PNG.
  """
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4.4 * len(found), 3.6), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
  for axes, (title, check) in zip(panels, found.items()):
    for name, x in check.moved.items():
      axes.plot(check.widths, x[:, -1], marker="o", ms=3, label=name)
    steps = next(iter(check.moved.values())).shape[1]
    axes.set(xscale="log", yscale="log", xlabel="width", title=title)
    axes.set_xticks(check.widths, [str(w) for w in check.widths])
    axes.minorticks_off()
    axes.set_ylabel(f"std of the change after {steps} steps")
    axes.legend(fontsize="small")
  figure.savefig(path, dpi=130)
