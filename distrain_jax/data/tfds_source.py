"""Named data sets of TensorFlow Datasets, read without TensorFlow.

TFDS writes a data set once, with TensorFlow, on any machine; from its
ArrayRecord files everything here reads with NumPy and Pillow.
"""

import os
import re

import numpy as np

from distrain_jax.data.source import Info, Splits, did_you_mean, stack
from distrain_jax.data.splits import TEST, check_fraction

# Mean and deviation of training pixels, per channel, in 0..255. Sets that are
# not here get HALF: pixels to [-1, 1].
HALF = ((127.5,), (127.5,))
MOMENTS = {
  "cifar10": ((125.31, 122.95, 113.87), (62.99, 62.09, 66.70)),
  "cifar100": ((129.30, 124.07, 112.43), (68.17, 65.39, 70.42)),
  "imagenet2012": ((123.68, 116.28, 103.53), (58.40, 57.12, 57.38)),
  "downsampled_imagenet": ((123.68, 116.28, 103.53), (58.40, 57.12, 57.38)),
  "imagenet_resized": ((123.68, 116.28, 103.53), (58.40, 57.12, 57.38)),
}
# Their own test part has no labels: the validation part is what papers test.
NO_TEST_LABELS = frozenset({"imagenet2012", "imagenet2012_subset"})


class Records:
  """A split of a TFDS builder, decoded record by record."""

  in_memory = False

  def __init__(self, rows, info: Info, image: str, label: str | None):
    self.rows, self.image, self.label = rows, image, label
    self.info = info._replace(count=len(rows))

  def __len__(self) -> int:
    return self.info.count

  def gather(self, indices: np.ndarray) -> dict:
    records = []
    for row in self.rows.__getitems__([int(i) for i in indices]):
      record = {"image": row[self.image]}
      if self.label is not None:
        record["label"] = np.int32(row[self.label])
      records.append(record)
    return stack(records)


def is_known(name: str, folder: str | os.PathLike | None = None) -> bool:
  """Whether TFDS has code or, in `folder`, files for a data set `name`."""
  if not re.fullmatch(r"[a-z]\w*(/[\w.+-]+)?(:[\d.*]+)?", name):
    return False
  return re.split("[/:]", name)[0] in names() or bool(_builder(name, folder))


def names() -> list[str]:
  """All data sets TFDS has code for; imports no TensorFlow."""
  import tensorflow_datasets as tfds

  return tfds.list_builders(with_community_datasets=False)


def builder(name: str, folder: str | os.PathLike | None = None):
  """The TFDS builder of a data set that is on disk in ArrayRecord format.

  Args:
    name: "cifar10", "downsampled_imagenet/32x32", "cifar10:3.0.2".
    folder: TFDS's data_dir; None: the environment variable TFDS_DATA_DIR, or
      ~/tensorflow_datasets.

  Raises:
    FileNotFoundError: if it is not there, or in another format, with the
      command that makes it.
  """
  import tensorflow_datasets as tfds

  found, where = _builder(name, folder), folder or tfds.core.constants.DATA_DIR
  if found is None:
    known = names()
    base = re.split("[/:]", name)[0]
    hint = "" if base in known else did_you_mean(base, known)
    raise FileNotFoundError(
      f"No TFDS data set {name!r} in {str(where)!r}.{hint} TFDS writes it once, "
      "on a machine with TensorFlow:\n"
      f"  pip install tensorflow tensorflow-datasets\n"
      f"  tfds build {name} --file_format=array_record --data_dir={where}\n"
      "Then copy the folder here; reading it needs no TensorFlow. Another "
      "place: --config.data.folder=DIR, or the variable TFDS_DATA_DIR."
    )
  if (
    tfds.core.FileFormat.ARRAY_RECORD not in found.info.available_file_formats()
  ):
    raise FileNotFoundError(
      f"{found.data_path} is in format {found.info.file_format.value}, which "
      "needs TensorFlow. Convert it, on a machine with TensorFlow:\n"
      f"  tfds convert_format --dataset_version_dir={found.data_path} "
      "--out_file_format=array_record"
    )
  return found


def _builder(name, folder):
  """The builder made from files alone, or None; a set's code is never run."""
  import tensorflow_datasets as tfds

  folder = None if folder is None else os.fspath(folder)
  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
  except tfds.core.DatasetNotFoundError:
    return None


def rows(found, split: str):
  """Random access to a split's decoded records, as TFDS gives them."""
  return found.as_data_source(split, file_format="array_record")


def parts(found, fraction: float) -> tuple[str, str, str]:
  """TFDS split expressions of train, validation and test; they never overlap.

  What a set lacks is cut from the end of its train part: `fraction` of it for
  validation; a tenth for test, where there is nothing else to test on.
  """
  have = set(found.info.splits)
  if "train" not in have:
    raise ValueError(
      f"{found.name} has the splits {sorted(have)}, but no 'train'."
    )
  if found.name in NO_TEST_LABELS:
    have.discard("test")
  if {"validation", "test"} <= have:
    return "train", "validation", "test"
  stop = found.info.splits["train"].num_examples
  held = next(iter(have & {"test", "validation"}), None)
  if held is None:
    start = stop - max(1, round(TEST * stop))
    held, stop = f"train[{start}:{stop}]", start
  cut = stop - max(1, round(fraction * stop))
  return f"train[:{cut}]", f"train[{cut}:{stop}]", held


def tfds(
  name: str,
  folder: str | os.PathLike | None = None,
  *,
  validation_fraction: float = 0.1,
  image_size: int | None = None,
) -> Splits:
  """Images (h, w, c) uint8 of a TFDS data set, and int32 labels if it has any.

  Args:
    name: see `builder`.
    folder: see `builder`.
    validation_fraction: see `parts`.
    image_size: side of the square images a batch has; needed where the set's
      images differ in size. None: as they are.

  Raises:
    FileNotFoundError: see `builder`.
    ValueError: if the set has no one image feature, or images of many sizes
      and no `image_size`. Text sets go through `launch/prepare_data.py`.
  """
  check_fraction(validation_fraction, "data.validation_fraction")
  found = builder(name, folder)
  image, label = _features(found)
  shape = tuple(found.info.features[image].shape)
  if image_size is not None:
    shape = (image_size, image_size, shape[-1])
  if None in shape:
    raise ValueError(
      f"data.image_size=None, but the images of {name!r} are {shape}, of many "
      "sizes: say what size to train on, e.g. --config.data.image_size=224."
    )
  mean, std = MOMENTS.get(found.name, HALF)
  classes = None if label is None else found.info.features[label].num_classes
  info = Info(
    name,
    "image",
    count=0,  # Records counts
    shape=shape,
    num_classes=classes,
    mean=mean,
    std=std,
  )
  return Splits(
    *(
      Records(rows(found, p), info, image, label)
      for p in parts(found, validation_fraction)
    )
  )


def _features(found) -> tuple[str, str | None]:
  """The names of the image and the label among a set's features."""
  import tensorflow_datasets as tfds

  features = dict(found.info.features.items())
  kinds = tfds.features
  images = [k for k, f in features.items() if isinstance(f, kinds.Image)]
  labels = [k for k, f in features.items() if isinstance(f, kinds.ClassLabel)]
  image = "image" if "image" in images else (images or [None])[0]
  label = "label" if "label" in labels else (labels or [None])[0]
  if image is None or features[image].np_dtype != np.uint8:
    raise ValueError(
      f"{found.name!r} has no image of uint8 among its features "
      f"{sorted(features)}. Text is made into tokens once, by `python "
      f"launch/prepare_data.py --out=DIR tfds:{found.name}`, and then read "
      "with data.name='tokens' and data.folder=DIR."
    )
  return image, label
