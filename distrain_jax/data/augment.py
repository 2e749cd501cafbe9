"""Augmentation of whole batches of images, random per record.

An augmentation is a function of a batch and of the random words that belong
to the batch's positions, so a record's augmentation does not depend on which
process loads it. A config names them: `("pad_crop:4", "flip")`.

Letters in shapes: b images, (h, w, c) an image, k words a record.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from distrain_jax.data.random_order import uniform
from distrain_jax.data.source import Batch, Info, did_you_mean


class Augmentation(NamedTuple):
  """One augmentation; write your own with any `apply` of this form."""

  name: str
  words: int  # random uint64 words a record; a multiple of 4
  apply: Callable[[Batch, np.ndarray, Info], Batch]  # (batch, (b, k), info)


def pad_crop(pixels: float = 4) -> Augmentation:
  """Shifts each image by up to `pixels` in both directions, zeros moving in.

  Pads with zeros in stored units (black), then crops the original size.
  """
  p = _whole("pad_crop", pixels)

  def apply(batch, random_words, info):
    del info
    image = batch["image"]
    b, h, w, c = image.shape
    padded = np.zeros((b, h + 2 * p, w + 2 * p, c), image.dtype)
    padded[:, p : p + h, p : p + w] = image
    # Every crop of every image, without a copy; a row's channels lie together.
    crops = np.lib.stride_tricks.sliding_window_view(
      padded.reshape(b, h + 2 * p, -1), (h, w * c), axis=(1, 2)
    )  # (b, 2p + 1, 2p c + 1, h, w c)
    dy, dx = (uniform(random_words[:, :2]) * (2 * p + 1)).astype(int).T
    chosen = crops[np.arange(b), dy, dx * c]  # (b, h, w c), a copy
    return batch | {"image": chosen.reshape(b, h, w, c)}

  return Augmentation("pad_crop", 4, apply)


def flip(probability: float = 0.5) -> Augmentation:
  """Mirrors each image left to right with this probability."""
  _share("flip", probability)

  def apply(batch, random_words, info):
    del info
    image = batch["image"].copy()  # a source may hand out its own memory
    mirrored = uniform(random_words[:, 0]) < probability
    image[mirrored] = image[mirrored][:, :, ::-1]
    return batch | {"image": image}

  return Augmentation("flip", 4, apply)


def random_resized_crop(min_area: float = 0.08) -> Augmentation:
  """A random part of each image, resized to `info.shape`.

  The part's area is uniform in [min_area, 1] of the image, the logarithm of
  its width over height uniform in [log 3/4, log 4/3]; after ten tries that do
  not fit, the largest central part. Szegedy et al., "Going Deeper with
  Convolutions", 2014, https://arxiv.org/abs/1409.4842, section 6.
  Must come first: it is what makes images of many shapes one shape.
  """
  _share("random_resized_crop", min_area)
  tries = 10

  def box(h, w, u):  # u: (tries, 4) in [0, 1)
    for area, ratio, y, x in u:
      area = h * w * (min_area + (1 - min_area) * area)
      ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
      bw, bh = math.sqrt(area * ratio), math.sqrt(area / ratio)
      if bw <= w and bh <= h:
        return x * (w - bw), y * (h - bh), bw, bh
    return central_box(h, w, 1, 1, 1.0)

  def apply(batch, random_words, info):
    u = uniform(random_words).reshape(-1, tries, 4)
    image = [
      resize(x, box(*x.shape[:2], draw), info.shape)
      for x, draw in zip(batch["image"], u)
    ]
    return batch | {"image": np.stack(image)}

  return Augmentation("random_resized_crop", 4 * tries, apply)


def fit(batch: Batch, info: Info) -> Batch:
  """Images of any shape to `info.shape`: the central part, resized.

  Images that have that shape already stay as they are. From others, the part
  with 224/256 of the side of the largest central part of that aspect, as
  ImageNet models are evaluated.
  """
  image = batch["image"]
  if isinstance(image, np.ndarray) and image.shape[1:] == info.shape:
    return batch
  h, w = info.shape[:2]
  return batch | {
    "image": np.stack(
      [
        x
        if x.shape == info.shape
        else resize(x, central_box(*x.shape[:2], h, w, 0.875), info.shape)
        for x in image
      ]
    )
  }


def central_box(
  height: int, width: int, h: int, w: int, share: float
) -> tuple[float, float, float, float]:
  """(x, y, width, height) of the largest central box of aspect w:h, scaled."""
  scale = share * min(height / h, width / w)
  bw, bh = scale * w, scale * h
  return (width - bw) / 2, (height - bh) / 2, bw, bh


def resize(
  image: np.ndarray,
  box: tuple[float, float, float, float],
  shape: tuple[int, int, int],
) -> np.ndarray:
  """The box (x, y, width, height) of an image (h, w, c) uint8, at `shape`.

  Bilinear with antialiasing. A grey image becomes a colour one if asked.
  """
  from PIL import Image  # only sets of large images need it

  if image.shape[-1] != shape[-1]:
    if image.shape[-1] != 1:
      raise ValueError(f"No way from an image {image.shape} to {shape}.")
    image = np.repeat(image, shape[-1], axis=-1)
  x, y, bw, bh = box
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  picture = picture.resize(
    shape[1::-1], Image.Resampling.BILINEAR, box=(x, y, x + bw, y + bh)
  )
  return np.asarray(picture).reshape(shape)


def normalise(batch: Batch, info: Info) -> Batch:
  """Images to float32 with mean 0 and deviation 1: (x - mean) / std."""
  image = batch["image"]
  b, h, w, c = image.shape
  # One row of pixels at a time: NumPy is slow along a last axis of 3.
  rows = image.reshape(b, h, w * c).astype(np.float32)
  rows -= np.tile(np.broadcast_to(np.float32(info.mean), c), w)
  rows *= np.tile(np.broadcast_to(1 / np.float32(info.std), c), w)
  return batch | {"image": rows.reshape(b, h, w, c)}


NAMES = {f.__name__: f for f in (pad_crop, flip, random_resized_crop)}


def parse(
  specs: Sequence[str | Augmentation], info: Info
) -> list[Augmentation]:
  """Augmentations from what a config holds: "name" or "name:number".

  Raises:
    ValueError: unknown name, bad number, an order or a kind of data that
      makes no sense.
  """
  if isinstance(specs, str):
    raise ValueError(
      f"data.augment={specs!r} is a tuple of names; write ({specs!r},)."
    )
  chosen = [s if isinstance(s, Augmentation) else _named(s) for s in specs]
  if chosen and info.kind != "image":
    raise ValueError(
      f"data.augment={tuple(specs)!r} is for images; {info.name!r} is "
      f"{info.kind}. Set it to ()."
    )
  if any(a.name == "random_resized_crop" for a in chosen[1:]):
    raise ValueError(
      f"data.augment={tuple(specs)!r}: random_resized_crop must come first."
    )
  return chosen


def _named(spec: str) -> Augmentation:
  name, _, number = str(spec).partition(":")
  if name not in NAMES:
    raise ValueError(
      f"data.augment: unknown {spec!r}.{did_you_mean(name, NAMES)} Known: "
      f"{', '.join(NAMES)}; each takes a number, as in 'pad_crop:4'."
    )
  try:
    return NAMES[name](float(number)) if number else NAMES[name]()
  except ValueError as e:
    raise ValueError(f"data.augment: {spec!r}: {e}") from e


def _whole(name: str, pixels: float) -> int:
  if pixels < 1 or pixels != int(pixels):
    raise ValueError(f"{name} takes a whole number of pixels, got {pixels}.")
  return int(pixels)


def _share(name: str, value: float) -> None:
  if not 0 < value <= 1:
    raise ValueError(f"{name} takes a number in (0, 1], got {value}.")
