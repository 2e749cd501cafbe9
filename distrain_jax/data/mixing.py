"""Augmentation on the device, with settings that differ by member.

Members of a population that see the same images in other ways learn other
things, which is what their average lives on. These four mix or hide parts of a
batch that is on the device already, so that their strengths may be traced
values: one program for all members, each with its own.

Mixup: Zhang et al., 2017, https://arxiv.org/abs/1710.09412. CutMix: Yun et al.,
2019, https://arxiv.org/abs/1905.04899. Random erasing: Zhong et al., 2017,
https://arxiv.org/abs/1708.04896. Label smoothing: Szegedy et al., 2015,
https://arxiv.org/abs/1512.00567. Combined as in the code released with
"PopulAtion Parameter Averaging (PAPA)", Jolicoeur-Martineau et al., 2023,
https://arxiv.org/abs/2304.03094.

Letters in shapes: b rows, (h, w, c) an image, k classes, n settings, r tries.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distrain_jax.data.mixing_settings import (
  Mixing,
  check,
  is_off,
  per_member,
)
from distrain_jax.method import Batch, LossFn, StatefulLoss

# Purposes of a key, by `fold_in`: of a loss's, then of a batch's.
MODEL, BATCH = 0, 1
ERASE, BLEND = 0, 1
TRIES = 10  # of random erasing for a box that fits
AREA, ASPECT = (0.02, 0.33), (0.3, 3.3)  # of an erased box


def mix(batch: Batch, key: jax.Array, mixing: Mixing, classes: int) -> Batch:
  """Erases, mixes and smooths a batch of normalised images.

  First random erasing, row by row. Then row i meets row b - 1 - i, all with
  one lambda: by mixup, lambda x_i + (1 - lambda) x_{b-1-i}, or by CutMix, where
  a box of about 1 - lambda of the image comes from the partner and lambda
  becomes what is left of the own. With both on, a coin decides by batch. Labels
  are mixed with the same lambda, then smoothed.

  Args:
    batch: {"image": (b, h, w, c) floating, "label": (b,) integer or (b, k)
      probabilities}; what else it has stays.
    key: this batch's own.
    mixing: scalars; traced ones too. A Python 0 costs nothing.
    classes: k.

  Returns:
    The batch, its "label" now (b, k) float32 probabilities.

  Raises:
    ValueError: if the batch has no such images and labels, or a setting is out
      of range.
  """
  check("mix: ", mixing)
  image, label = _checked(batch, classes)
  image = _erase(image, jax.random.fold_in(key, ERASE), mixing.erasing)
  target = _probabilities(label, classes)
  if not (is_off(mixing.mixup) and is_off(mixing.cutmix)):
    u = jax.random.uniform(jax.random.fold_in(key, BLEND), (5,))
    own, kept = _shares(u, mixing, *image.shape[1:3])
    own = own.astype(image.dtype)[None, :, :, None]
    image = own * image + (1 - own) * image[::-1]
    target = kept * target + (1 - kept) * target[::-1]
  if not is_off(mixing.smoothing):
    target = (1 - mixing.smoothing) * target + mixing.smoothing / classes
  return batch | {"image": image, "label": target}


def _shares(
  u: jax.Array, mixing: Mixing, h: int, w: int
) -> tuple[jax.Array, jax.Array]:
  """(h, w), the own share of each pixel, and (), of the label; float32.

  `u`: (5,), uniform in [0, 1).
  """
  mixup, cutmix = jnp.float32(mixing.mixup), jnp.float32(mixing.cutmix)
  cut = (cutmix > 0) & ((mixup <= 0) | (u[0] < 0.5))
  alpha = jnp.where(cut, cutmix, mixup)
  share = jnp.where(alpha > 0, symmetric_beta(u[1:3], alpha), 1.0)
  box = cut_box(u[3:5], share, h, w)
  # Counted, not measured: whole pixels, and those beyond the border not.
  kept = jnp.where(cut, 1 - box.sum(dtype=jnp.float32) / (h * w), share)
  return jnp.where(cut, jnp.where(box, 0.0, 1.0), share), kept


def symmetric_beta(u: jax.Array, alpha: jax.Array) -> jax.Array:
  """A draw of Beta(alpha, alpha), alpha > 0, from `u` (2,) uniform in [0, 1).

  Exact and without a loop: t sqrt(2 alpha) is Student's with 2 alpha degrees of
  freedom (Bailey, "Polar Generation of Random Variates with the t-Distribution",
  1994), and 1/2 + t / (2 sqrt(1 + t^2)) is the beta (Devroye, "Random Variate
  Generation in One Line of Code", 1996). `jax.random.beta` rejects and tries
  again, in loops that take long to compile.
  """
  cosine = jnp.cos(2 * math.pi * u[1])
  squared = jnp.expm1(-jnp.log(u[0]) / alpha) * cosine**2  # t^2; may be inf
  return 0.5 + 0.5 * jnp.sign(cosine) / jnp.sqrt(1 + 1 / squared)


def cut_box(u: jax.Array, share: jax.Array, h: int, w: int) -> jax.Array:
  """CutMix's box: about 1 - share of the pixels, where it meets no border.

  Sides h sqrt(1 - share) and w sqrt(1 - share), rounded down, around a pixel
  that is any of the image, by `u` (2,) in [0, 1); what lies outside is cut off.

  Returns:
    (h, w) bool, True inside.
  """
  size = jnp.array([h, w], jnp.float32)
  sides = jnp.floor(jnp.sqrt(1 - share) * size)
  top, left = jnp.floor(u * size) - jnp.floor(sides / 2)
  return _inside(top, sides[0], h)[:, None] & _inside(left, sides[1], w)[None]


def _erase(image: jax.Array, key: jax.Array, probability: Any) -> jax.Array:
  """With this probability a row loses a box to 0, the mean of the data.

  The box's area is uniform in AREA of the image, the logarithm of its height
  over width in that of ASPECT; the first of TRIES boxes that is smaller than
  the image both ways, or none.
  """
  if is_off(probability):
    return image
  b, h, w, _ = image.shape
  u = jax.random.uniform(key, (4 * TRIES + 1, b))
  chosen, u = u[-1] < probability, u[:-1].reshape(4, TRIES, b)
  area = h * w * (AREA[0] + (AREA[1] - AREA[0]) * u[0])  # (r, b)
  low, high = map(math.log, ASPECT)
  aspect = jnp.exp(low + (high - low) * u[1])
  tall = jnp.round(jnp.sqrt(area * aspect))
  wide = jnp.round(jnp.sqrt(area / aspect))
  fits = (tall < h) & (wide < w)
  # Floor of a number in [0, 1) times a count; not the count, by rounding.
  top = jnp.minimum(jnp.floor(u[2] * (h - tall + 1)), h - tall)
  left = jnp.minimum(jnp.floor(u[3] * (w - wide + 1)), w - wide)
  first = fits.argmax(0)[None]
  top, tall, left, wide = (
    jnp.take_along_axis(x, first, 0)[0, :, None]
    for x in (top, tall, left, wide)
  )  # (b, 1) each
  chosen &= fits.any(0)
  rows, columns = _inside(top, tall, h), _inside(left, wide, w)
  box = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]
  return jnp.where(box[..., None], jnp.zeros((), image.dtype), image)


def _inside(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
  """Which of `size` pixels lie in [start, start + length): (..., size) bool."""
  pixels = jnp.arange(size).reshape((1,) * max(start.ndim - 1, 0) + (-1,))
  return (pixels >= start) & (pixels < start + length)


def _probabilities(label: jax.Array, classes: int) -> jax.Array:
  """(b, k) float32; NaN for a class that there is not."""
  if label.ndim == 2:
    return label.astype(jnp.float32)
  there = (label >= 0) & (label < classes)
  # All 0 would turn a label beyond the classes into a loss of 0.
  return jnp.where(there[:, None], jax.nn.one_hot(label, classes), jnp.nan)


def mixing_loss(
  loss_fn: LossFn | StatefulLoss,
  settings: Sequence[Mixing],
  classes: int,
  axis: str | tuple[str, ...] = "population",
) -> LossFn | StatefulLoss:
  """A loss whose batches are mixed, by each worker in its own way.

  Worker i of `axis` uses settings[i % n]. Its key feeds both, by `fold_in`:
  MODEL the loss_fn's own randomness, BATCH the mixing. What a worker makes of
  a key and a batch depends on no other worker. With gradients accumulated, each
  micro-batch is mixed by itself.

  Args:
    loss_fn: of images, and of labels as probabilities; `stateful(...)` too.
    settings: Python numbers, one `Mixing` a worker, or fewer that repeat.
    classes: k.
    axis: the named axis, or axes, of the workers.

  Returns:
    A loss of the same kind; loss_fn itself, bit for bit, if all is off.

  Raises:
    ValueError: as `per_member`; when called, as `mix`.
  """
  mixed = mixer(settings, classes, axis)
  if mixed is None:
    return loss_fn
  if isinstance(loss_fn, StatefulLoss):

    def with_state(params, model_state, batch, key):
      return loss_fn.fn(params, model_state, *mixed(batch, key))

    return loss_fn._replace(fn=with_state)
  return lambda params, batch, key: loss_fn(params, *mixed(batch, key))


def mixer(
  settings: Sequence[Mixing],
  classes: int,
  axis: str | tuple[str, ...] = "population",
) -> Callable[[Batch, jax.Array], tuple[Batch, jax.Array]] | None:
  """`(batch, key) -> (batch, key)`: what `mixing_loss` gives to its loss.

  Arguments and errors as there; None if all is off.
  """
  settings = list(settings)
  stacked = per_member(settings)
  if not any(x.any() for x in stacked):
    return None

  def mixed(batch, key):
    i = jax.lax.axis_index(axis) % len(settings)
    # Off for all stays a Python 0, which is left out of the program.
    own = Mixing(*(jnp.asarray(x)[i] if x.any() else 0.0 for x in stacked))
    batch = mix(batch, jax.random.fold_in(key, BATCH), own, classes)
    return batch, jax.random.fold_in(key, MODEL)

  return mixed


def _checked(batch: Batch, classes: int) -> tuple[jax.Array, jax.Array]:
  image, label = (jnp.asarray(batch.get(k, 0)) for k in ("image", "label"))
  good = image.ndim == 4 and jnp.issubdtype(image.dtype, jnp.floating)
  if jnp.issubdtype(label.dtype, jnp.floating):
    good &= label.shape == (*image.shape[:1], classes)
  else:
    good &= label.shape == image.shape[:1]
  if not good:
    got = {k: f"{jnp.asarray(x).dtype}{jnp.shape(x)}" for k, x in batch.items()}
    raise ValueError(
      "mix: needs 'image' (b, h, w, c), floating, and 'label' (b,) integer or "
      f"(b, {classes}) probabilities; got {got}. Normalise images first."
    )
  return image, label
