"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

import io
import json
import shutil

import numpy as np
import pytest
from data_checks import assert_holds, images_labels, source_of
from PIL import Image

from jax_trustdiff import config
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.types import InputError


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """A data set with greyscale and RGB-like images, prepared as array_record without TensorFlow."""
  tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
  features, core = tensorflow_datasets.features, tensorflow_datasets.core

  class TinyTrustdiffImages(core.GeneratorBasedBuilder):
    VERSION = core.Version("1.0.0")

    def _info(self):
      of = features.FeaturesDict(
        {"image": features.Image(shape=(5, 5, 3)), "label": features.ClassLabel(names=["x", "y", "z"])}
      )
      return core.DatasetInfo(builder=self, features=of, supervised_keys=("image", "label"), description="-")

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(0, 20), "test": self._generate_examples(20, 27)}

    def _generate_examples(self, start, stop):
      images, labels = images_labels(27)
      for i in range(start, stop):
        file = io.BytesIO()
        Image.fromarray(images[i]).save(file, "png")
        yield i, {"image": file.getvalue(), "label": int(labels[i])}

  root = tmp_path_factory.mktemp("tfds")
  TinyTrustdiffImages(data_dir=str(root), file_format="array_record").download_and_prepare()
  return root


def same_records(source, images, labels):
  """TFDS shuffles when it prepares: compare as sets of (image, label)."""
  found = {
    (image.tobytes(), int(label))
    for image, label in zip(np.asarray(source.images), source.labels, strict=True)
  }
  assert found == {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}


def test_tfds_array_record(tfds_dir):
  images, labels = images_labels(27)
  train = source_of("tfds", dataset="tiny_trustdiff_images", path=tfds_dir)
  assert train.class_names == ("x", "y", "z") and len(train) == 20
  same_records(train, images[:20], labels[:20])
  test = source_of("tfds", dataset="tiny_trustdiff_images:1.0.0", path=str(tfds_dir), split="test")
  same_records(test, images[20:], labels[20:])
  version = tfds_dir / "tiny_trustdiff_images" / "1.0.0"
  assert source_of("tfds", dataset="tiny_trustdiff_images", path=version, size=3).image_shape == (3, 3, 3)
  with pytest.raises(InputError, match=r"unknown split 'val'; .* has \['test', 'train'\]"):
    source_of("tfds", dataset="tiny_trustdiff_images", path=tfds_dir, split="val")
  with pytest.raises(InputError, match=r"no prepared data set 'cifar10' below .*download=True prepares it"):
    source_of("tfds", dataset="cifar10", path=tfds_dir)
  with pytest.raises(InputError, match="no prepared data set 'tiny_trustdiff_images:2.0.0'"):
    source_of("tfds", dataset="tiny_trustdiff_images:2.0.0", path=tfds_dir)


def test_tfds_from_a_config(tfds_dir):
  section = dict(name="tfds", dataset="tiny_trustdiff_images", path=str(tfds_dir), num_classes=3)
  source = config.build(SOURCES, section, split="train")
  assert len(source) == 20 and source.class_names == ("x", "y", "z")
  test = config.build(SOURCES, section, split="test", class_names=source.class_names)
  assert len(test) == 7 and test.class_names == ("x", "y", "z")
  with pytest.raises(InputError, match="class 1 is 'y'; in the training split it is 'b'"):
    config.build(SOURCES, section, split="test", class_names=("x", "b", "z"))
  with pytest.raises(InputError, match="num_classes=10; expected 3, as it has names, or 0"):
    config.build(SOURCES, section | {"num_classes": 10}, split="train")


def test_tfds_does_not_choose_among_configs(tfds_dir, tmp_path):
  for kind in ("large", "small"):
    folder = tmp_path / "tiny_trustdiff_images" / kind / "1.0.0"
    shutil.copytree(tfds_dir / "tiny_trustdiff_images" / "1.0.0", folder)
  several = "several configs below .*: tiny_trustdiff_images/large, tiny_trustdiff_images/small; name one"
  with pytest.raises(InputError, match=several):
    source_of("tfds", tmp_path, dataset="tiny_trustdiff_images")
  assert len(source_of("tfds", tmp_path, dataset="tiny_trustdiff_images/small")) == 20
  assert len(source_of("tfds", tmp_path, dataset="tiny_trustdiff_images/small:1.0.0")) == 20


def test_tfds_tfrecord_needs_no_tensorflow(tfds_dir, tmp_path):
  """The default format of TFDS: the same records behind another framing."""
  import tensorflow_datasets

  images, labels = images_labels(27)
  old = tfds_dir / "tiny_trustdiff_images" / "1.0.0"
  new = tmp_path / "tiny_trustdiff_images" / "1.0.0"
  new.mkdir(parents=True)
  info = json.loads((old / "dataset_info.json").read_text())
  (new / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
  for name in ("features.json", "label.labels.txt"):
    (new / name).write_bytes((old / name).read_bytes())
  builder = tensorflow_datasets.builder_from_directory(str(old))
  file = new / "tiny_trustdiff_images-train.tfrecord-00000-of-00001"
  with open(file, "wb") as out:
    raw = builder.as_data_source("train").data_source
    for i in range(20):
      out.write(len(raw[i]).to_bytes(8, "little") + b"crc." + raw[i] + b"crc.")
  source = source_of("tfds", dataset="tiny_trustdiff_images", path=tmp_path)
  assert_holds(
    source,
    np.asarray(source_of("tfds", dataset="tiny_trustdiff_images", path=tfds_dir).images),
    source.labels,
  )
  same_records(source, images[:20], labels[:20])
  with pytest.raises(
    InputError, match="incomplete: tiny_trustdiff_images-test.tfrecord-00000-of-00001 is missing"
  ):
    source_of("tfds", dataset="tiny_trustdiff_images", path=tmp_path, split="test")
  whole = file.read_bytes()
  file.write_bytes(whole[:-30])
  with pytest.raises(InputError, match="is cut short or no TFRecord file"):
    source_of("tfds", dataset="tiny_trustdiff_images", path=tmp_path)
  length = int.from_bytes(whole[:8], "little") + 16
  file.write_bytes(whole[length:])
  with pytest.raises(InputError, match="19 records in the split 'train', expected 20"):
    source_of("tfds", dataset="tiny_trustdiff_images", path=tmp_path)
  (new / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
  with pytest.raises(InputError, match="stored as riegeli; prepare it again as array_record"):
    source_of("tfds", dataset="tiny_trustdiff_images", path=tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_tfds_tensors_are_images_only_as_bytes(tmp_path, dtype):
  tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
  features, core = tensorflow_datasets.features, tensorflow_datasets.core
  images, labels = images_labels(6)

  def info(self):
    of = features.FeaturesDict(
      {"image": features.Tensor(shape=(5, 5, 3), dtype=dtype), "label": features.Scalar(np.int64)}
    )
    return core.DatasetInfo(builder=self, features=of, description="-")

  def examples(self):
    for i in range(6):
      yield i, {"image": images[i].astype(dtype), "label": int(labels[i])}

  members = {
    "VERSION": core.Version("1.0.0"),
    "_info": info,
    "_split_generators": lambda self, dl_manager: {"train": self._generate_examples()},
    "_generate_examples": examples,
  }
  name = f"tiny_tensors_{np.dtype(dtype).name}"
  kind = type(name.title().replace("_", ""), (core.GeneratorBasedBuilder,), members)
  kind(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
  assert (tmp_path / name / "1.0.0" / "dataset_info.json").exists()
  if dtype == np.float32:
    with pytest.raises(InputError, match=r"image float32 \[5, 5, 3\], label \[\]; expected images uint8"):
      source_of("tfds", dataset=name, path=tmp_path)
    return
  same_records(source_of("tfds", dataset=name, path=tmp_path, num_classes=3), images, labels)
  with pytest.raises(InputError, match=r"are \(5, 5, 3\); leave out size"):
    source_of("tfds", dataset=name, path=tmp_path, size=4)
