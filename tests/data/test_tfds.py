"""TFDS data sets are read from ArrayRecord files without TensorFlow."""

import contextlib
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from distrain_jax import data
from distrain_jax.data import tfds_source


def encoded(image, format):
  file = io.BytesIO()
  picture = image[..., 0] if image.shape[-1] == 1 else image
  PIL.Image.fromarray(picture).save(file, format)
  file.seek(0)
  return file


def write(root, name, features, splits, suffix="array_record"):
  """A TFDS folder as TFDS writes it, without TensorFlow."""
  folder = root / name / "1.0.0"
  folder.mkdir(parents=True)
  serializer = tfds.core.example_serializer.ExampleSerializer(
    features.get_serialized_info()
  )
  infos = []
  for split, examples in splits.items():
    template = tfds.core.ShardedFileTemplate(
      data_dir=folder,
      dataset_name=name,
      split=split,
      filetype_suffix=suffix,
    )
    half, lengths = (len(examples) + 1) // 2, []
    for shard in range(2):
      path = template.sharded_filepath(shard_index=shard, num_shards=2)
      writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
      some = examples[shard * half : (shard + 1) * half]
      for example in some:
        writer.write(
          serializer.serialize_example(features.encode_example(example))
        )
      writer.close()
      lengths.append(len(some))
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        num_bytes=1,
        filename_template=template,
      )
    )
  # Its last check builds a tf.data pipeline; the files are written before.
  with contextlib.suppress(ImportError):
    tfds.folder_dataset.write_metadata(
      data_dir=folder, features=features, split_infos=infos
    )
  return folder


def picture(i, shape=(8, 6, 3)):
  rng = np.random.default_rng(i)
  return rng.integers(0, 256, shape, dtype=np.uint8)


def labelled(start, count, **kw):
  return [
    {"image": encoded(picture(i, **kw), "PNG"), "label": i % 3}
    for i in range(start, start + count)
  ]


FEATURES = tfds.features.FeaturesDict(
  {
    "image": tfds.features.Image(shape=(8, 6, 3)),
    "label": tfds.features.ClassLabel(num_classes=3),
  }
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  splits = {"train": labelled(0, 20), "test": labelled(100, 7)}
  write(root, "tiny_pictures", FEATURES, splits)
  return root


def test_records_are_what_was_written_and_parts_are_disjoint(root):
  d = data.load("tiny_pictures", folder=str(root), validation_fraction=0.25)
  got = []
  for part in (d.train, d.validation, d.test):
    batch = part.gather(np.arange(len(part)))
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    got += list(zip(batch["image"], batch["label"]))
  numbers = [*range(20), *range(100, 107)]
  assert [len(p) for p in d[1:4]] == [15, 5, 7] and len(got) == 27
  for i, (image, label) in zip(numbers, got):
    np.testing.assert_array_equal(image, picture(i))
    assert label == i % 3
  assert d.info.shape == (8, 6, 3) and d.info.num_classes == 3


def test_in_memory_gives_the_same_batches(root):
  a, b = (
    data.load("tfds:tiny_pictures", folder=root, in_memory=m, max_records=9)
    for m in (False, True)
  )
  assert (a.train.in_memory, b.train.in_memory) == (False, True)
  assert len(a.train) == len(b.train) == 9 and len(a.test) == 7
  make = lambda d: data.train_iterator(
    d.train, batch_size=5, seed=0, augment=("pad_crop:1", "flip")
  )
  for _, x, y in zip(range(3), make(a), make(b)):
    np.testing.assert_array_equal(x["image"], y["image"])
    np.testing.assert_array_equal(x["label"], y["label"])


def test_own_validation_and_test_parts_are_used(tmp_path):
  splits = {"train": labelled(0, 4), "validation": labelled(4, 2)}
  write(tmp_path, "three_parts", FEATURES, splits | {"test": labelled(6, 3)})
  d = data.load("three_parts", folder=tmp_path)
  assert [len(p) for p in d[1:4]] == [4, 2, 3]


def test_what_a_set_lacks_is_cut_from_its_training_part(tmp_path):
  write(tmp_path, "one_part", FEATURES, {"train": labelled(0, 20)})
  d = data.load("one_part", folder=tmp_path)
  labels = [p.gather(np.arange(len(p)))["image"] for p in d[1:4]]
  assert [len(x) for x in labels] == [16, 2, 2]
  together = np.concatenate(labels)
  np.testing.assert_array_equal(together, [picture(i) for i in range(20)])


def test_imagenet_is_tested_on_its_validation_part(tmp_path):
  # The labels of its test part are -1.
  splits = {"train": labelled(0, 10), "validation": labelled(20, 3)}
  write(tmp_path, "imagenet2012", FEATURES, splits | {"test": labelled(30, 4)})
  d = data.load("imagenet2012", folder=tmp_path)
  np.testing.assert_array_equal(
    d.test.gather(np.arange(3))["image"], [picture(i) for i in (20, 21, 22)]
  )
  assert [len(p) for p in d[1:4]] == [9, 1, 3]
  assert d.info.mean[0] == pytest.approx(123.68)


def test_jpegs_of_many_sizes_become_one_and_need_no_label(tmp_path):
  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(shape=(None, None, 3))}
  )
  photo = lambda i: encoded(picture(i, shape=(20 + i, 30, 3)), "JPEG")
  splits = {"train": range(8), "test": range(3)}
  splits = {s: [{"image": photo(i)} for i in r] for s, r in splits.items()}
  write(tmp_path, "photos", features, splits)
  with pytest.raises(ValueError, match=r"--config\.data\.image_size=224"):
    data.load("photos", folder=tmp_path)
  d = data.load(
    "photos",
    folder=tmp_path,
    image_size=12,
    augment=("random_resized_crop", "flip"),
  )
  it = data.train_iterator(d.train, batch_size=4, seed=0, augment=d.augment)
  batch = next(it)
  it.close()
  assert batch.keys() == {"image"} and batch["image"].shape == (4, 12, 12, 3)
  assert d.info.num_classes is None
  (batch,) = data.eval_batches(d.test, batch_size=4)
  assert batch["weight"].tolist() == [1, 1, 1, 0]
  assert batch["image"].shape == (4, 12, 12, 3)


def test_text_sets_say_how_to_become_tokens(tmp_path):
  features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
  write(tmp_path, "lines", features, {"train": [{"text": "a"}] * 4})
  with pytest.raises(ValueError, match=r"prepare_data\.py.*tfds:lines"):
    data.load("lines", folder=tmp_path)


def test_missing_data_names_the_command_that_makes_it(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    data.load("cifar10", folder=tmp_path)
  command = (
    f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}"
  )
  assert command in str(error.value)


def test_a_wrong_name_after_tfds_gets_a_suggestion(tmp_path):
  with pytest.raises(FileNotFoundError, match="Did you mean 'cifar10'"):
    data.load("tfds:cifar01", folder=tmp_path)


def test_another_format_names_the_command_that_converts_it(tmp_path):
  folder = write(
    tmp_path,
    "old_format",
    FEATURES,
    {"train": labelled(0, 2)},
    suffix="tfrecord",
  )
  with pytest.raises(FileNotFoundError) as error:
    data.load("old_format", folder=tmp_path)
  command = f"tfds convert_format --dataset_version_dir={folder}"
  assert command in str(error.value)


def test_a_set_without_training_part_is_refused(tmp_path):
  write(tmp_path, "test_only", FEATURES, {"test": labelled(0, 2)})
  with pytest.raises(ValueError, match="splits \\['test'\\], but no 'train'"):
    data.load("test_only", folder=tmp_path)


def test_reading_imports_no_tensorflow_and_starts_no_backend(root):
  code = f"""
import sys
from distrain_jax import data
d = data.load("tiny_pictures", folder={str(root)!r}, augment=("flip",))
it = data.train_iterator(d.train, batch_size=4, seed=0, augment=d.augment)
assert next(it)["image"].shape == (4, 8, 6, 3)
it.close()
assert sum(b["weight"].sum() for b in data.eval_batches(d.test, batch_size=4)) == 7
assert not [m for m in sys.modules if m.split(".")[0] == "tensorflow"]
from jax._src import xla_bridge
assert not xla_bridge._backends
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_known_names_need_no_files_and_strange_ones_are_not_known(root):
  assert tfds_source.is_known("cifar10", root)
  assert tfds_source.is_known("downsampled_imagenet/32x32", root)
  assert tfds_source.is_known("tiny_pictures", root)
  for name in ("tiny_picture", "../x", "a b", ""):
    assert not tfds_source.is_known(name, root)
