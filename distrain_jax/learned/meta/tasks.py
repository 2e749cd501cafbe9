"""What a learned optimizer is meta-trained on: small networks, resident data.

Letters in shapes: n records, b records of a batch, d inputs, c classes.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Task(NamedTuple):
  """A network to train, as pure functions; all of it runs on the device."""

  name: str
  init: Callable  # (key) -> params
  loss: Callable  # (params, batch, key) -> ()
  batch: Callable  # (data, key) -> batch
  data: Any  # a pytree of arrays, the same on every device
  normalise: Callable  # (loss) -> what meta-training minimises
  mup: Any  # multipliers of the steps: one number, or a tree like params


def clipped(classes: int) -> Callable[[jax.Array], jax.Array]:
  """A loss kept within [0, 1.5 ln c]; one that is not finite is the upper end.

  What a diverged network costs is then bounded, and 1.5 times a guess's.
  """
  top = 1.5 * math.log(classes)

  def normalise(loss):
    loss = jnp.where(jnp.isfinite(loss), loss, top)
    return jnp.clip(loss, 0.0, top)

  return normalise


def sampled(batch_size: int) -> Callable:
  """Batches of records drawn with replacement, uint8 images as [0, 1]."""

  def batch(data, key):
    count = len(data["y"])
    rows = jax.random.randint(key, (batch_size,), 0, count)
    x, y = data["x"][rows], data["y"][rows]
    if x.dtype == jnp.uint8:
      x = x.astype(jnp.float32) / 255
    return {"x": x, "y": y}

  return batch


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
  """Mean over a batch, nats."""
  logits = jax.nn.log_softmax(logits)
  return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))


def normal(key, shape, fan_in):
  """Cut at two deviations of 1 / sqrt(fan in), as μLO's networks start."""
  draw = jax.random.truncated_normal(key, -2.0, 2.0, shape)
  return draw / np.sqrt(fan_in).astype(np.float32)


class MLP(NamedTuple):
  """Layers of ReLU on flat inputs, in muP or in standard parametrisation.

  muP: the output layer starts at zero and its result is divided by its fan in;
  biases start from a standard normal distribution. Standard: kernels start at
  1 / sqrt(fan in), biases at zero.
  """

  inputs: int
  widths: tuple[int, ...]
  classes: int
  mup: bool = True

  def init(self, key: jax.Array) -> dict[str, jax.Array]:
    sizes = (self.inputs, *self.widths, self.classes)
    params = {}
    for i, (rows, cols) in enumerate(itertools.pairwise(sizes)):
      own = jax.random.fold_in(key, i)
      kernel, bias = jax.random.split(own)
      last = i == len(sizes) - 2
      w = normal(kernel, (rows, cols), rows)
      params[f"w{i}"] = jnp.zeros_like(w) if self.mup and last else w
      b = jax.random.normal(bias, (cols,)) if self.mup else jnp.zeros(cols)
      params[f"b{i}"] = b
    return params

  def hidden(self, params: Any, x: jax.Array) -> list[jax.Array]:
    """The pre-activations of every layer; the last are the logits."""
    x, found = x.reshape(len(x), -1), []
    for i in range(len(self.widths) + 1):
      if i:
        x = jax.nn.relu(x)
      x = x @ params[f"w{i}"] + params[f"b{i}"][None]
      if self.mup and i == len(self.widths):
        x = x / params[f"w{i}"].shape[0]
      found.append(x)
    return found

  def apply(self, params: Any, x: jax.Array) -> jax.Array:
    """Logits (b, c)."""
    return self.hidden(params, x)[-1]

  def multipliers(self) -> Any:
    """muP's absolute multipliers; 1 in standard parametrisation."""
    if not self.mup:
      return 1.0
    last, found = len(self.widths), {}
    for i in range(last + 1):
      hidden = 0 < i < last
      found |= {f"w{i}": 1.0 / self.widths[i - 1] if hidden else 1.0}
      found |= {f"b{i}": 1.0}
    return found


def mlp_task(
  data: Mapping[str, Any],
  widths: Sequence[int],
  *,
  name: str = "mlp",
  classes: int | None = None,
  batch_size: int = 128,
  mup: bool = True,
) -> Task:
  """An MLP that classifies.

  Args:
    data: {"x": (n, ...), "y": (n,) integers}; x uint8 or floating.
    widths: of the hidden layers.
    name: of the task.
    classes: None: as many as y has.
    batch_size: records of a batch.
    mup: parametrisation and multipliers, see `MLP`.

  Raises:
    ValueError: x and y of different lengths, or no width.
  """
  x, y = data["x"], data["y"]
  if len(x) != len(y) or not len(y) or not widths:
    raise ValueError(
      f"mlp_task: wanted one y for each of x and at least one width; got "
      f"{len(x)} of x, {len(y)} of y and widths={tuple(widths)}."
    )
  classes = int(np.max(y)) + 1 if classes is None else classes
  inputs = math.prod(np.shape(x)[1:])
  mlp = MLP(inputs, tuple(widths), classes, mup)

  def loss(params, batch, key):
    del key  # nothing random in the network
    return cross_entropy(mlp.apply(params, batch["x"]), batch["y"])

  return Task(
    name,
    mlp.init,
    loss,
    sampled(batch_size),
    {"x": x, "y": y},
    clipped(classes),
    mlp.multipliers(),
  )


def teacher_data(
  seed: int = 0, *, inputs: int = 64, classes: int = 10, count: int = 4096
) -> dict[str, np.ndarray]:
  """Normal inputs that a random network of one hidden layer has labelled.

  Args:
    seed: of inputs and network.
    inputs: d.
    classes: c.
    count: n.
  """
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, inputs)).astype(np.float32)
  first = rng.normal(size=(inputs, 32)) / math.sqrt(inputs)
  second = rng.normal(size=(32, classes))
  y = np.argmax(np.maximum(x @ first, 0) @ second, 1)
  return {"x": x, "y": y.astype(np.int32)}
