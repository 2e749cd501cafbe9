"""From the fields of a config to a data set; the one place that knows names."""

import functools
import inspect
from typing import Any, NamedTuple

from distrain_jax.data.augment import Augmentation, parse
from distrain_jax.data.digits_source import digits
from distrain_jax.data.idx_source import fashion_mnist, idx
from distrain_jax.data.packing import check_length
from distrain_jax.data.source import (
  Info,
  Source,
  Splits,
  Subset,
  did_you_mean,
  in_memory,
)
from distrain_jax.data.stdlib_source import stdlib_text
from distrain_jax.data.tfds_source import is_known, names, tfds
from distrain_jax.data.token_shards import tokens

LOADERS = {
  "digits": digits,
  "fashion_mnist": fashion_mnist,
  "idx": idx,
  "stdlib_text": stdlib_text,
  "tokens": tokens,
}

# Every field of a config's data part, and its default.
FIELDS = {
  "name": None,
  "folder": None,
  "length": None,
  "image_size": None,
  "validation_fraction": None,
  "max_records": None,
  "augment": (),
  "in_memory": False,
}


# Known without the data: (h, w, c) of an image, None where it differs, classes.
IMAGES = {
  "digits": ((8, 8, 1), 10),
  "fashion_mnist": ((28, 28, 1), 10),
  "mnist": ((28, 28, 1), 10),
  "cifar10": ((32, 32, 3), 10),
  "cifar100": ((32, 32, 3), 100),
  "imagenet2012": ((None, None, 3), 1000),
}


class Dataset(NamedTuple):
  """Three parts without a common record, and how to augment the first."""

  info: Info  # of the training part
  train: Source
  validation: Source
  test: Source
  augment: tuple[Augmentation, ...]  # for `train_iterator`


def load(config: Any = None, /, **fields: Any) -> Dataset:
  """The data set a config describes.

      load("digits")
      load(config.data)
      load(name="tokens", folder="data/stories", length=256)

  Args:
    config: a name, or a mapping (a ConfigDict) of fields.
    **fields: more fields, of which the mapping has none:
      name: digits, fashion_mnist, idx, stdlib_text, tokens, or a TFDS name
        such as cifar10 or tfds:cifar10.
      folder: where the data is; None: the usual place (idx and tokens have
        none).
      length: tokens a record; text only.
      image_size: side of the images in a batch; TFDS only.
      validation_fraction: share of the training data held out, where the data
        does not come with a validation part; None: each loader's default.
      max_records: use at most the first so many records of each part.
      augment: what `train_iterator` does to training images, e.g.
        ("pad_crop:4", "flip"), see `distrain_jax.data.augment`.
      in_memory: read and decode everything once, now; for small TFDS sets.

  Raises:
    ValueError: for an unknown field or name ("Did you mean"), or a bad value.
    FileNotFoundError: if data is missing, with the command that gets it.
  """
  f = _fields(config, fields)
  loader, options = _resolved(f)
  splits = loader(**options)
  if f["max_records"] is not None:
    splits = Splits(*(_first(s, f["max_records"]) for s in splits))
  if f["in_memory"]:
    splits = Splits(*(s if s.in_memory else in_memory(s) for s in splits))
  info = splits.train.info
  return Dataset(info, *splits, augment=tuple(parse(f["augment"], info)))


class Description(NamedTuple):
  """What the batches of a data set are like, whether it is there or not."""

  info: Info  # of the training part; count, mean and std may be unset
  assumed: tuple[str, ...]  # what neither data nor config say, in sentences


def describe(
  config: Any = None,
  /,
  *,
  vocab: int | None = None,
  classes: int | None = None,
  **fields: Any,
) -> Description:
  """Shapes of a data set's batches, from its metadata if it is there.

  For programs that are compiled and not run: no record is read (of `idx` the
  labels are, to count the classes), and missing data is no error.

  Args:
    config, **fields: as `load`.
    vocab, classes: what they are where the data cannot say, as a model may.

  Raises:
    ValueError: as `load`; and if the data is missing and nothing says the
      size of its images or how many classes they have.
  """
  f = _fields(config, fields)
  loader, options = _resolved(f)
  if loader is stdlib_text:
    check_length(f["length"])
    told = _text(f, 256, ())
  elif loader in (digits, fashion_mnist):
    told = _image(f, classes, ())
  else:
    try:
      told = Description(loader(**options).train.info, ())
    except (FileNotFoundError, ValueError) as error:
      # A ValueError is a bad value, unless it is the one of no folder at all.
      no_folder = loader in (tokens, idx) and f["folder"] is None
      if isinstance(error, ValueError) and not no_folder:
        raise
      told = _untold(f, loader, vocab, classes)
  parse(f["augment"], told.info)
  return told


def _untold(f, loader, vocab, classes) -> Description:
  """Of data that is not there."""
  if loader is not tokens:
    return _image(f, classes, _no_data(f))
  check_length(f["length"])
  if vocab is not None:
    return _text(f, vocab, ())
  vocab = 32_000  # as configs/fineweb_llama.py makes it
  assumed = f"a vocabulary of {vocab:,} tokens (--config.model.vocab=N)"
  return _text(f, vocab, (f"{_no_data(f)[0]}: {assumed}",))


def _no_data(f) -> tuple[str]:
  where = "" if f["folder"] is None else f" in {str(f['folder'])!r}"
  return (f"no data {f['name']!r}{where}",)


def _text(f, vocab: int, assumed: tuple[str, ...]) -> Description:
  info = Info(f["name"], "text", 0, length=f["length"], vocab_size=vocab)
  return Description(info, assumed)


def _image(f, classes: int | None, missing: tuple[str, ...]) -> Description:
  name = f["name"].removeprefix("tfds:")
  shape, known = IMAGES.get(name, (None, None))
  classes, assumed = known or classes, ()
  if name == "idx":
    shape = (28, 28, 1)
    assumed = ("images of 28x28x1, as of the MNIST family",)
  if f["image_size"] is not None:
    channels = shape[-1] if shape else 3
    assumed = () if shape else ("images of 3 channels",)
    shape = (f["image_size"], f["image_size"], channels)
  for value, what, field in (
    (shape and None not in shape, "the size of its images", "data.image_size"),
    (classes, "how many classes it has", "model.classes"),
  ):
    if not value:
      raise ValueError(
        f"data.name={name!r}: the data is not there, and nothing says {what}. "
        f"Set it, --config.{field}=N, or get the data."
      )
  if assumed:
    assumed = (f"{missing[0]}: {assumed[0]}",)
  info = Info(f["name"], "image", 0, shape=shape, num_classes=classes)
  return Description(info, assumed)


def _fields(config: Any, fields: dict[str, Any]) -> dict[str, Any]:
  """All of FIELDS, from what was given; unknown or missing ones raise."""
  if isinstance(config, str):
    config = {"name": config}
  given = dict(config.items() if config is not None else {})
  twice = given.keys() & fields.keys()
  if twice:
    raise ValueError(
      f"data: {sorted(twice)} given twice, in and beside config."
    )
  given |= fields
  for field in given:
    if field not in FIELDS:
      raise ValueError(
        f"data.{field}: unknown field.{did_you_mean(field, FIELDS)} Fields: "
        f"{', '.join(FIELDS)}."
      )
  f = FIELDS | given
  if not isinstance(f["name"], str):
    raise ValueError(
      f"data.name={f['name']!r} is the name of a data set: "
      f"{', '.join(LOADERS)}, or a TFDS name such as cifar10."
    )
  return f


def _resolved(f: dict[str, Any]):
  """The function that loads a data set, and its options."""
  loader, options = _loader(f["name"], f["folder"]), {}
  takes = inspect.signature(loader).parameters
  for field in ("folder", "length", "image_size", "validation_fraction"):
    if field in takes:
      # A loader's own default stands in for None; `length` has none.
      if (
        f[field] is not None or takes[field].default is inspect.Parameter.empty
      ):
        options[field] = f[field]
    elif f[field] is not None:
      raise ValueError(
        f"data.{field}={f[field]!r} means nothing for data.name={f['name']!r}. "
        f"Set it to None."
      )
  return loader, options


def _loader(name: str, folder: str | None):
  """The function that loads a data set of this name."""
  if name in LOADERS:
    return LOADERS[name]
  if name.startswith("tfds:"):
    return functools.partial(tfds, name.removeprefix("tfds:"))
  if is_known(name, folder):
    return functools.partial(tfds, name)
  raise ValueError(
    f"data.name={name!r}: unknown.{did_you_mean(name, [*LOADERS, *names()])} "
    f"Known: {', '.join(LOADERS)}, and the names of TensorFlow Datasets "
    "(https://www.tensorflow.org/datasets/catalog)."
  )


def _first(source: Source, count: int) -> Source:
  if not isinstance(count, int) or count < 1:
    raise ValueError(
      f"data.max_records={count!r} must be a positive integer, or None."
    )
  return source if count >= len(source) else Subset(source, 0, count)
