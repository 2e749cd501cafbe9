"""`describe` tells the shapes of data that may not be there."""

import pytest

from distrain_jax import data

SHAPES = ("kind", "shape", "num_classes", "length", "vocab_size")


def shapes(info):
  return {name: getattr(info, name) for name in SHAPES}


@pytest.fixture(autouse=True)
def nothing_on_disk(monkeypatch, tmp_path):
  monkeypatch.setenv("FASHION_MNIST_FOLDER", str(tmp_path))


@pytest.mark.parametrize(
  "fields",
  [{"name": "digits"}, {"name": "stdlib_text", "length": 64}],
  ids=lambda f: f["name"],
)
def test_a_description_has_the_shapes_of_the_data(fields):
  told = data.describe(fields)
  assert shapes(told.info) == shapes(data.load(fields).info)
  assert told.assumed == ()


def test_data_that_is_there_is_believed(tmp_path):
  texts = [f"Document {i}: " + "many words, " * (i % 7) for i in range(60)]
  folder = tmp_path / "tokens"
  tokenizer = data.byte_tokenizer()
  data.prepare(texts, folder, tokenizer, validation=0.2, test=0.2)
  told = data.describe(name="tokens", folder=folder, length=16, vocab=99)
  assert (told.info.vocab_size, told.info.length) == (256, 16)
  assert told.assumed == ()


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_a_vocabulary_that_nobody_knows_is_assumed_aloud(folder):
  fields = {"name": "tokens", "length": 16, "folder": folder}
  told = data.describe(fields)
  assert told.info.vocab_size == 32_000
  (said,) = told.assumed
  assert "a vocabulary of 32,000 tokens (--config.model.vocab=N)" in said
  assert ("in 'nowhere'" in said) == (folder is not None)
  told = data.describe(fields, vocab=500)
  assert told.info.vocab_size == 500 and told.assumed == ()


@pytest.mark.parametrize(
  ("fields", "shape", "classes"),
  [
    ({"name": "fashion_mnist"}, (28, 28, 1), 10),
    ({"name": "cifar10", "augment": ("flip",)}, (32, 32, 3), 10),
    ({"name": "tfds:cifar100", "in_memory": True}, (32, 32, 3), 100),
    ({"name": "imagenet2012", "image_size": 224}, (224, 224, 3), 1000),
  ],
  ids=lambda f: f["name"] if isinstance(f, dict) else "",
)
def test_well_known_sets_need_no_data_and_no_assumption(fields, shape, classes):
  told = data.describe(fields)
  assert (told.info.shape, told.info.num_classes) == (shape, classes)
  assert told.assumed == ()


def test_other_image_sets_need_what_the_config_can_say():
  told = data.describe(name="tfds:nowhere", image_size=64, classes=7)
  assert (told.info.shape, told.info.num_classes) == ((64, 64, 3), 7)
  assert told.assumed == ("no data 'tfds:nowhere': images of 3 channels",)
  told = data.describe(name="idx", folder="none", classes=47)
  assert (told.info.shape, told.info.num_classes) == ((28, 28, 1), 47)
  assert told.assumed[0].startswith(
    "no data 'idx' in 'none': images of 28x28x1"
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"name": "tfds:nowhere", "classes": 7}, "--config.data.image_size=N"),
    ({"name": "imagenet2012"}, "--config.data.image_size=N"),
    ({"name": "tfds:nowhere", "image_size": 8}, "--config.model.classes=N"),
    ({"name": "idx"}, "--config.model.classes=N"),
    ({"name": "tokens"}, "--config.data.length=256"),
    ({"name": "stdlib_text"}, "--config.data.length=256"),
    ({"name": "digit"}, "Did you mean 'digits'"),
    ({"name": "digits", "length": 3}, "data.length=3 means nothing"),
    ({"name": "cifar10", "augment": ("filp",)}, "Did you mean 'flip'"),
  ],
)
def test_what_cannot_be_known_names_the_field(fields, message):
  with pytest.raises(ValueError, match=message):
    data.describe(**fields)
