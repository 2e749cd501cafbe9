"""`load` finds data sets by name and refuses what means nothing."""

import subprocess
import sys

import ml_collections
import numpy as np
import pytest

import distrain_jax.data as data


def test_a_name_a_mapping_and_a_config_are_the_same():
  config = ml_collections.ConfigDict(data.FIELDS)
  config.name = "digits"
  config.augment = ("pad_crop:1",)
  loaded = [
    data.load("digits", augment=("pad_crop:1",)),
    data.load({"name": "digits", "augment": ["pad_crop:1"]}),
    data.load(config.lock()),
  ]
  assert len({d.info for d in loaded}) == 1
  assert all([a.name for a in d.augment] == ["pad_crop"] for d in loaded)
  it = data.train_iterator(
    loaded[0].train, batch_size=8, seed=0, augment=loaded[0].augment
  )
  batch = next(it)
  it.close()
  assert batch["image"].shape == (8, 8, 8, 1)
  assert batch["label"].dtype == np.int32


def test_max_records_shortens_every_part():
  d = data.load("digits", max_records=200)
  assert [len(p) for p in d[1:4]] == [200, 197, 200]
  assert d.info.count == 200


def test_text_has_the_asked_length():
  d = data.load("stdlib_text", length=100, max_records=5)
  assert d.info.length == 100 and len(d.train) == 5
  assert d.train.gather(np.arange(5))["targets"].shape == (5, 100)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"name": "digit"}, "data.name='digit': unknown. Did you mean 'digits'"),
    ({"name": "cifar1"}, "Did you mean 'cifar10'"),
    ({"name": None}, "data.name=None is the name of a data set: digits,"),
    ({"nam": "digits"}, "data.nam: unknown field. Did you mean 'name'"),
    ({"name": "digits", "length": 8}, "data.length=8 means nothing for"),
    ({"name": "digits", "folder": "x"}, "data.folder='x' means nothing"),
    ({"name": "stdlib_text"}, "--config.data.length=256"),
    ({"name": "stdlib_text", "length": 8, "augment": ("flip",)}, "for images"),
    ({"name": "digits", "augment": ("filp",)}, "Did you mean 'flip'"),
    ({"name": "digits", "max_records": 0}, "data.max_records=0 must be"),
    ({"name": "idx"}, "data.folder=None"),
    ({"name": "digits", "image_size": 3}, "data.image_size=3 means nothing"),
  ],
)
def test_bad_fields_are_refused_before_anything_is_read(fields, message):
  with pytest.raises(ValueError) as error:
    data.load(fields)
  assert message in str(error.value)


def test_a_field_given_twice_is_refused():
  with pytest.raises(ValueError, match=r"\['name'\] given twice"):
    data.load({"name": "digits"}, name="digits")


def test_importing_starts_no_backend_and_imports_no_tensorflow():
  code = """
import sys
import distrain_jax.data
assert not [m for m in sys.modules if m.split(".")[0] == "tensorflow"]
assert not {"sklearn", "pyarrow", "tokenizers"} & set(sys.modules)
from jax._src import xla_bridge
assert not xla_bridge._backends
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_are_documented():
  for name in dir(data):
    if name[0] != "_" and callable(getattr(data, name)):
      assert getattr(data, name).__doc__, name
