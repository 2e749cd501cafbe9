"""Images in IDX files: Fashion-MNIST, MNIST and their family.

Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747.
IDX is a magic number (two zero bytes, a type code, the number of axes), each
axis's size as a big-endian 32-bit integer, then the values, row-major.
"""

import gzip
import math
import os
import pathlib
import zlib

import numpy as np

from distrain_jax.data.source import Arrays, Info, Splits
from distrain_jax.data.splits import check_fraction

DEBIAN = "/usr/share/datasets/fashion-mnist"  # package dataset-fashion-mnist
ENVIRONMENT = "FASHION_MNIST_FOLDER"
DTYPES = {
  0x08: "u1",
  0x09: "i1",
  0x0B: ">i2",
  0x0C: ">i4",
  0x0D: ">f4",
  0x0E: ">f8",
}


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """The array in an IDX file, raw or gzipped (by its first two bytes).

  Raises:
    ValueError: if the file is not IDX, cut short, or longer than it says.
  """
  raw = pathlib.Path(path).read_bytes()
  if raw[:2] == b"\x1f\x8b":
    try:
      raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
      raise ValueError(f"{path}: damaged gzip data ({e}). {_AGAIN}") from e
  if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in DTYPES:
    raise ValueError(
      f"{path}: not an IDX file: it starts with {raw[:4].hex() or 'nothing'}, "
      "an IDX file with 0000, a type code in "
      f"{', '.join(f'{code:02x}' for code in DTYPES)}, and the number of axes."
    )
  dtype, start = np.dtype(DTYPES[raw[2]]), 4 + 4 * raw[3]
  if len(raw) < start:
    raise ValueError(f"{path}: cut short inside its header. {_AGAIN}")
  shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], offset=4))
  want, got = math.prod(shape) * dtype.itemsize, len(raw) - start
  if got != want:
    raise ValueError(
      f"{path}: the header promises {want} bytes of values for shape {shape}, "
      f"the file holds {got}. {_AGAIN}"
    )
  values = np.frombuffer(raw, dtype, offset=start).reshape(shape)
  return values.astype(dtype.newbyteorder("="), copy=False)


_AGAIN = "Fetch the file again."


def _find(folder: pathlib.Path, name: str, kind: str) -> pathlib.Path:
  """The one file `…name-kind` or `…name.kind`, raw before gzipped."""
  for ending in ("", ".gz"):
    found = sorted(folder.glob(f"*{name}[-.]{kind}-ubyte{ending}"))
    if len(found) > 1:
      raise ValueError(
        f"data.folder={str(folder)!r} holds more than one set: "
        f"{[p.name for p in found]}. Give each set a folder of its own."
      )
    if found:
      return found[0]
  raise FileNotFoundError(
    f"No file *{name}-{kind}-ubyte[.gz] in {str(folder)!r}. Fashion-MNIST: "
    "`sudo apt-get install dataset-fashion-mnist` (Debian, Ubuntu) puts it "
    f"into {DEBIAN}; or download the four files from "
    "https://github.com/zalandoresearch/fashion-mnist and set data.folder "
    f"(--config.data.folder=DIR) or the environment variable {ENVIRONMENT}."
  )


def _pair(folder: pathlib.Path, part: str) -> dict[str, np.ndarray]:
  """A part's images (n, h, w, 1) uint8 and labels (n,) int32, checked."""
  image_file = _find(folder, f"{part}-images", "idx3")
  label_file = _find(folder, f"{part}-labels", "idx1")
  image, label = read_idx(image_file), read_idx(label_file)
  if image.ndim != 3 or image.dtype != np.uint8:
    raise ValueError(
      f"{image_file}: want images (n, h, w) of uint8, got "
      f"{image.shape} of {image.dtype}."
    )
  if label.shape != image.shape[:1] or label.dtype != np.uint8:
    raise ValueError(
      f"{label_file}: want one uint8 label for each of {len(image)} images, "
      f"got {label.shape} of {label.dtype}."
    )
  return {"image": image[..., None], "label": label.astype(np.int32)}


def moments(image: np.ndarray) -> tuple[float, float]:
  """Mean and standard deviation of uint8 pixels, exact, by their histogram."""
  counts = np.zeros(256)
  for start in range(0, len(image), 4096):  # bincount makes int64 of its input
    counts += np.bincount(image[start : start + 4096].ravel(), minlength=256)
  values, total = np.arange(256), float(counts.sum())
  mean = float(counts @ values) / total
  return mean, math.sqrt(counts @ (values - mean) ** 2 / total)


def idx(
  folder: str | os.PathLike | None,
  *,
  validation_fraction: float = 0.1,
  name: str = "idx",
) -> Splits:
  """A data set of the MNIST family: images (h, w, 1) uint8, labels int32.

  Args:
    folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the
      same for `t10k` (or `test`), raw or gzipped, with any prefix.
    validation_fraction: share of the training file, its last records, that
      becomes the validation part. The test part is the test file.
    name: for `Info.name`.

  Raises:
    FileNotFoundError: if a file is missing, with the command that gets it.
    ValueError: if a file is damaged, or its values are not what they should.
  """
  check_fraction(validation_fraction, "data.validation_fraction")
  if folder is None:
    raise ValueError(
      f"data.folder=None: data.name={name!r} reads the folder that holds the "
      "IDX files; e.g. --config.data.folder=DIR."
    )
  folder = pathlib.Path(folder)
  named_test = list(folder.glob("*test-images[-.]idx3-ubyte*"))
  train, test = (
    _pair(folder, p) for p in ("train", "test" if named_test else "t10k")
  )
  count = len(train["label"])
  cut = count - max(1, round(validation_fraction * count))
  mean, std = moments(train["image"][:cut])
  info = Info(
    name,
    "image",
    count=0,  # Arrays counts
    shape=train["image"].shape[1:],
    num_classes=int(train["label"].max()) + 1,
    mean=(round(mean, 3),),
    std=(round(std, 3),),
  )
  return Splits(
    Arrays(info, **{k: v[:cut] for k, v in train.items()}),
    Arrays(info, **{k: v[cut:] for k, v in train.items()}),
    Arrays(info, **test),
  )


def fashion_mnist(
  folder: str | os.PathLike | None = None,
  *,
  validation_fraction: float = 0.1,
) -> Splits:
  """Fashion-MNIST: 60,000 + 10,000 images (28, 28, 1) of ten kinds of clothes.

  54,000 train, 6,000 validate (by default), 10,000 test.

  Args:
    folder: None: the environment variable FASHION_MNIST_FOLDER, or where
      Debian's package `dataset-fashion-mnist` puts it.
    validation_fraction: see `idx`.

  Raises:
    FileNotFoundError, ValueError: see `idx`.
  """
  folder = folder or os.environ.get(ENVIRONMENT) or DEBIAN
  return idx(
    folder, validation_fraction=validation_fraction, name="fashion_mnist"
  )
