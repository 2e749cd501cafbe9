"""Coordinate check: do activations move alike at all widths?

Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466,
appendix D.1. After some steps, what a layer computes has changed by some
standard deviation. In muP that does not depend on the width; where it grows or
fades with the width, a multiplier, an initialisation or a forward factor is not
muP's. But count some steps: where the output layer starts at zero, nothing but
it moves in the first one.

>>> def build(width, key):  # of a Flax model
...   model = models.create("mlp", widths=(width, width), mup=True)
...   names = models.logical_names(model, batch["x"])
...   tx = mup_adamw(0.02, lambda params: mup_info(params, names=names))
...   return flax_probe(model, key, tx, batch, inputs="x", loss=loss)
>>> coord_check(build, (32, 64, 128), batch).growth()  # doctest: +SKIP
{'dense_0': 1.02, 'dense_1': 0.97, 'output': 1.01, 'whole': 1.01}
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


def flax_probe(
  model: Any,
  key: jax.Array,
  tx: optax.GradientTransformation,
  batch: Any,
  *,
  inputs: str,
  loss: Callable[[Any, Any], jax.Array],
  **options: Any,
) -> Probe:
  """A new Flax model's probe: its layers are what its modules return.

  Modules inside `nn.scan` are not seen: of our transformers take scan=False.
  What is not trained (batch statistics) stays as it is at the start.

  Args:
    model: a Flax Linen module.
    key: of its parameters.
    tx: the optimizer, e.g. `mup_adamw` with a function `params -> mup_info`.
    batch: a dict, as `coord_check` is given it.
    inputs: the batch's entry that the model is applied to.
    loss: `(the model's result, batch) -> ()`.
    **options: of the model's call, such as train=True; no randomness.

  Returns:
    A `Probe`. A layer is called by its path, such as "block_0/attention", the
    result of the model itself "whole".
  """
  import flax.linen as nn  # slow to import, and nothing else here needs it

  start = lambda key, x: nn.meta.unbox(model.init(key, x, **options))
  state = dict(jax.jit(start)(key, batch[inputs]))
  params = state.pop("params")

  def run(params, batch, *more, **capture):
    variables, kinds = {"params": params, **state}, [*state, *more]
    x = batch[inputs]
    return model.apply(variables, x, mutable=kinds, **options, **capture)

  def layers(params, batch):
    is_layer = lambda module, method: (
      method == "__call__" and not isinstance(module, nn.Dropout)
    )
    _, kept = run(
      params, batch, "intermediates", capture_intermediates=is_layer
    )
    return _named(kept["intermediates"])

  value = lambda params, batch: loss(run(params, batch)[0], batch)
  return Probe(params, value, layers, tx)


def _named(tree: Any) -> dict[str, jax.Array]:
  """Path -> array, of arrays of numbers; a second of one path is numbered."""
  found: dict[str, jax.Array] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    name = "/".join(k for k in keys if k != "__call__") or "whole"
    if not jnp.issubdtype(x.dtype, jnp.floating):
      continue
    times = sum(k == name or k.startswith(f"{name} ") for k in found)
    found[f"{name} {times}" if times else name] = x.astype(jnp.float32)
  return found


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
    build: `(width, key) -> Probe`, of which the key decides the parameters
      only.
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
    probes = [build(width, jax.random.key(seed)) for seed in range(seeds)]
    run = _runner(probes[0], batch, steps)  # compiled once
    runs = [jax.tree.map(np.asarray, run(p.params)) for p in probes]
    for name in runs[0]:
      moved.setdefault(name, []).append(np.mean([r[name] for r in runs], 0))
  return Coordinates(widths, {k: np.stack(x) for k, x in moved.items()})


def _runner(probe: Probe, batch, steps):
  """(params) -> {name: (steps,)}."""

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

  return run


def draw_coordinates(
  found: dict[str, Coordinates],
  path: str | os.PathLike,
  *,
  columns: int | None = None,
) -> None:
  """A panel for each way of training: movement against width, by layer.

  Args:
    found: title -> what `coord_check` gave.
    path: of the PNG.
    columns: panels a row, which share an axis; None: all. Lines are of the
      same layers as in the panel to the left, where there is no legend.
  """
  # Not pyplot: it would change the backend of a notebook that imports this.
  from matplotlib import colormaps
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(columns or len(found), len(found))
  rows = -(-len(found) // columns)
  figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(rows, columns, squeeze=False, sharey="row")
  shown: list[str] = []
  for i, (title, check) in enumerate(found.items()):
    axes = panels[divmod(i, columns)]
    shades = colormaps["turbo"](np.linspace(0.05, 0.95, len(check.moved)))
    for (name, x), shade in zip(check.moved.items(), shades):
      style = {"color": shade, "marker": "o", "ms": 3}
      axes.plot(check.widths, x[:, -1], label=name, **style)
    steps = next(iter(check.moved.values())).shape[1]
    axes.set(xscale="log", yscale="log", xlabel="width", title=title)
    axes.set_xticks(check.widths, [str(w) for w in check.widths])
    axes.minorticks_off()
    if not i % columns:
      axes.set_ylabel(f"std of the change after {steps} steps")
    if not i % columns or list(check.moved) != shown:
      small = len(check.moved) > 6
      axes.legend(fontsize="xx-small" if small else "small", ncols=1 + small)
    shown = list(check.moved)
  figure.savefig(path, dpi=130)
