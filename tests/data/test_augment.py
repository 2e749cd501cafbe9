"""Augmentations against plain loops, and their refusals."""

import numpy as np
import pytest

from distrain_jax.data import Augmentation, Info, augment, random_order

B = 16


def info(shape):
  mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
  c = shape[-1]
  return Info("made", "image", 0, shape, 10, mean[:c], std[:c])


def images(shape, b=B, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, 256, (b, *shape), dtype=np.uint8)  # never padding's 0


def words(k, b=B):
  return random_order.words(7, 1, 100, b, k)


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 7, 3)])
def test_pad_crop_shifts_each_image_and_fills_with_zeros(shape):
  x, draws = images(shape), words(4)
  one = augment.pad_crop(2)
  y = one.apply({"image": x, "label": np.arange(B)}, draws, info(shape))
  np.testing.assert_array_equal(y["label"], np.arange(B))
  shifts = set()
  for before, after, u in zip(x, y["image"], draws[:, :2] / 2**64):
    dy, dx = (int(v * 5) - 2 for v in u)
    shifts.add((dy, dx))
    for i, j in np.ndindex(*shape[:2]):
      inside = 0 <= i + dy < shape[0] and 0 <= j + dx < shape[1]
      want = before[i + dy, j + dx] if inside else 0
      np.testing.assert_array_equal(after[i, j], want)
  assert len(shifts) > 5  # each its own


def test_flip_mirrors_about_half_and_nothing_else():
  x, draws = images((3, 4, 3), b=400), words(4, b=400)
  kept = x.copy()
  y = augment.flip().apply({"image": x}, draws, info((3, 4, 3)))["image"]
  mirrored = [bool((a == b[:, ::-1]).all()) for a, b in zip(y, x)]
  same = [bool((a == b).all()) for a, b in zip(y, x)]
  assert [not m for m in mirrored] == same
  assert 140 < sum(mirrored) < 260
  np.testing.assert_array_equal(x, kept)  # the source's memory is its own


def test_normalise_is_the_formula():
  x = images((5, 4, 3))
  y = augment.normalise({"image": x}, info((5, 4, 3)))["image"]
  want = (x - np.asarray([10.0, 20, 30])) / np.asarray([2.0, 4, 8])
  np.testing.assert_allclose(y, want, rtol=1e-6)
  assert y.dtype == np.float32


def test_random_resized_crop_makes_many_sizes_one():
  batch = {"image": [images((s, s + 9, 3), b=1)[0] for s in range(8, 8 + B)]}
  crop = augment.random_resized_crop()
  y = crop.apply(batch, words(crop.words), info((6, 6, 3)))["image"]
  assert y.shape == (B, 6, 6, 3) and y.dtype == np.uint8


def test_random_resized_crop_takes_the_asked_part():
  # Pixel (i, j) holds its own place: a crop's mean tells where it was.
  size = 64
  i, j = np.mgrid[:size, :size].astype(np.uint8)
  x = np.repeat(np.stack([i, j, i], -1)[None], 200, axis=0)
  crop = augment.random_resized_crop(0.25)
  y = crop.apply({"image": x}, words(crop.words, b=200), info((16, 16, 3)))
  spans = [float(np.ptp(image[..., 0]) + 4) / size for image in y["image"]]
  wide = [float(np.ptp(image[..., 1]) + 4) / size for image in y["image"]]
  area = np.multiply(spans, wide)
  assert 0.2 < area.min() < 0.35 and 0.85 < area.max() < 1.15
  assert len({image.tobytes() for image in y["image"]}) == 200


def test_fit_takes_the_centre_and_leaves_fitting_images_alone():
  x = images((6, 6, 1))
  same = augment.fit({"image": x}, info((6, 6, 1)))
  assert same["image"] is x
  target = np.zeros((256, 300, 1), np.uint8)
  target[16:240, 38:262] = 200  # what 224 of 256 keeps
  y = augment.fit({"image": [target] * 2}, info((32, 32, 1)))["image"]
  assert y.shape == (2, 32, 32, 1) and (y[:, 1:-1, 1:-1] == 200).all()
  # The resampling filter sees half an output pixel of what lies outside.
  assert (y > 140).all() and (y[:, 0] < 200).all()


def test_grey_images_become_colour_ones_where_asked():
  x = images((8, 8, 1), b=1)
  y = augment.fit({"image": list(x)}, info((4, 4, 3)))["image"]
  assert y.shape == (1, 4, 4, 3)
  np.testing.assert_array_equal(y[..., 0], y[..., 2])
  with pytest.raises(ValueError, match=r"No way from an image \(8, 8, 3\)"):
    augment.fit({"image": [images((8, 8, 3))[0]]}, info((4, 4, 1)))


def test_parse_reads_names_numbers_and_own_functions():
  own = Augmentation("invert", 4, lambda batch, words, info: batch)
  parsed = augment.parse(("pad_crop:2", "flip", own), info((4, 4, 1)))
  assert [a.name for a in parsed] == ["pad_crop", "flip", "invert"]


TEXT = Info("made", "text", 0, length=3)


@pytest.mark.parametrize(
  "specs, of, message",
  [
    (("pad_corp",), info((4, 4, 1)), r"unknown 'pad_corp'\. Did you mean 'pad"),
    (("pad_crop:x",), info((4, 4, 1)), "could not convert"),
    (("pad_crop:1.5",), info((4, 4, 1)), "whole number of pixels, got 1.5"),
    (("flip:2",), info((4, 4, 1)), r"flip takes a number in \(0, 1\]"),
    ("flip", info((4, 4, 1)), r"write \('flip',\)"),
    (("flip",), TEXT, "is for images; 'made' is text"),
    (("flip", "random_resized_crop"), info((4, 4, 1)), "must come first"),
  ],
)
def test_bad_augmentations_are_refused(specs, of, message):
  with pytest.raises(ValueError, match=message):
    augment.parse(specs, of)
