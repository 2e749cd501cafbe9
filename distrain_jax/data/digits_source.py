"""scikit-learn's handwritten digits: real data that a dependency ships.

1,797 images of 8×8 pixels, values 0 to 16, ten classes. Optical Recognition of
Handwritten Digits, Alpaydin and Kaynak, UCI Machine Learning Repository, 1998.
"""

import numpy as np

from distrain_jax.data.source import Arrays, Info, Splits
from distrain_jax.data.splits import check_fraction, hash64

TEST = 400  # of 1,797
VALIDATION = 197 / 1397  # of the rest: leaves 1,200 to train on


def digits(*, validation_fraction: float | None = None) -> Splits:
  """Images (8, 8, 1) uint8 in 0..16, labels int32 in 0..9.

  Images are ordered by a hash of their pixels; the first 400 are the test
  part, the next the validation part. No seed: the split is the same in every
  run and on every machine.

  Args:
    validation_fraction: share of the 1,397 images that are not for testing;
      None: 197 images, so that 1,200 are for training.

  Raises:
    ValueError: if the fraction is not in (0, 1).
  """
  from sklearn.datasets import load_digits  # slow to import: only when used

  if validation_fraction is None:
    validation_fraction = VALIDATION
  check_fraction(validation_fraction, "data.validation_fraction")
  bunch = load_digits()
  image = bunch.images.astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
  label = bunch.target.astype(np.int32)  # (1797,)
  order = np.argsort([hash64(x.tobytes()) for x in image], kind="stable")
  held = TEST + max(1, round(validation_fraction * (len(order) - TEST)))
  test, validation, train = np.split(order, [TEST, held])
  info = Info(
    "digits",
    "image",
    count=0,  # Arrays counts
    shape=image.shape[1:],
    num_classes=10,
    mean=(round(float(image[train].mean()), 3),),
    std=(round(float(image[train].std()), 3),),
  )
  return Splits(
    *(
      Arrays(info, image=image[i], label=label[i])
      for i in (train, validation, test)
    )
  )
