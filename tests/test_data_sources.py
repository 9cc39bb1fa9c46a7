"""Every source gives the same records from its own files, and says what is wrong with bad ones."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import shared_dir
from PIL import Image

from jax_trustdiff.data import readers, sources
from jax_trustdiff.data.sources import SOURCES, image_source, limit, split_validation
from jax_trustdiff.types import InputError


def images_labels(n: int = 7, side: int = 5, classes: int = 3, seed: int = 0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, side, side, 3)).astype(np.uint8), np.arange(n, dtype=np.int32) % classes


def assert_holds(source, images, labels):
  np.testing.assert_array_equal(np.asarray(source.images), images)
  np.testing.assert_array_equal(source.labels, labels)
  assert source.labels.dtype == np.int32 and source.ids.dtype == np.int64
  assert source.images.dtype == np.uint8 and source.image_shape == images.shape[1:]
  assert source.nbytes == images.nbytes and len(source) == len(images)
  order = [len(images) - 1, 0, 2, 2]
  records = source.take(order)
  np.testing.assert_array_equal(records["image"], images[order])
  np.testing.assert_array_equal(records["label"], labels[order])
  np.testing.assert_array_equal(records["id"], source.ids[order])


# ---- the record form ----


@pytest.mark.floor
def test_rows_join_parts_and_select_without_reading():
  images, _ = images_labels(10)
  rows = readers.Rows([images[:4], images[4:5], images[5:]])
  assert rows.shape == images.shape and rows.nbytes == images.nbytes
  pick = np.array([[9, 0], [4, 5]])
  np.testing.assert_array_equal(rows[pick], images[pick])
  np.testing.assert_array_equal(rows[2:7], images[2:7])
  chosen = rows.select(np.array([8, 3, 4])).select(np.array([2, 0]))
  np.testing.assert_array_equal(np.asarray(chosen), images[[4, 8]])
  np.testing.assert_array_equal(readers.Rows([np.asfortranarray(images)])[pick], images[pick])
  for bad in (10, -1):
    with pytest.raises(IndexError):
      rows[np.array([bad])]
  with pytest.raises(InputError, match=r"uint8 \[4, 5, 3\] and uint8 \[5, 5, 3\]"):
    readers.Rows([images, images[:, :4]])


def test_file_rows_of_any_view(tmp_path):
  images, _ = images_labels(10)
  np.save(tmp_path / "x.npy", images)
  whole = readers.read_npy(tmp_path / "x.npy")
  rows = np.array([9, 3, 4, 5, 5, 6, 0, 0, 1])
  assert readers.FileRows(whole)[rows[:0]].shape == (0, 5, 5, 3)
  np.testing.assert_array_equal(readers.FileRows(whole)[rows], images[rows])
  part = whole[2:8][..., None]
  np.testing.assert_array_equal(readers.FileRows(part)[rows % 6], images[2:8][rows % 6][..., None])
  reader = readers.FileRows(whole)
  os.truncate(tmp_path / "x.npy", 300)
  with pytest.raises(OSError, match="x.npy became shorter while it was read"):
    reader[rows]


@pytest.mark.parametrize("parts", [1, 3])
def test_validation_and_limit_keep_ids(parts):
  images, labels = images_labels(12)
  source = image_source(np.split(images, parts), np.split(labels, parts), "test")
  train, validation = split_validation(source, 4)
  np.testing.assert_array_equal(validation.ids, [0, 1, 2, 3])
  np.testing.assert_array_equal(train.ids, np.arange(4, 12))
  np.testing.assert_array_equal(train.take([0, 7])["image"], images[[4, 11]])
  train, validation = split_validation(source, 4, "random", seed=1)
  assert sorted([*train.ids, *validation.ids]) == list(range(12)) and len(validation) == 4
  assert list(validation.ids) != [0, 1, 2, 3]
  assert list(split_validation(source, 4, "random", seed=2)[1].ids) != list(validation.ids)
  np.testing.assert_array_equal(validation.take([2])["image"], images[validation.ids[[2]]])
  assert list(limit(source, 5).ids) == [0, 1, 2, 3, 4]
  assert len(set(limit(source, 5, seed=3).ids)) == 5 and list(limit(source, 5, seed=3).ids) != [0, 1, 2, 3, 4]
  assert limit(source, 99) is source
  with pytest.raises(InputError, match="12 validation examples of 12: 0 to 11 are possible"):
    split_validation(source, 12)
  with pytest.raises(InputError, match="unknown validation split 'last'"):
    split_validation(source, 2, "last")
  with pytest.raises(InputError, match="at least 1"):
    limit(source, 0)


@pytest.mark.floor
def test_digits():
  train, test = SOURCES["digits"](), SOURCES["digits"](split="test")
  assert (len(train), len(test), train.image_shape, train.num_classes) == (1437, 360, (8, 8, 1), 10)
  assert (np.bincount(test.labels) == 36).all()
  assert sorted([*train.ids, *test.ids]) == list(range(1797))
  assert train.images.max() == 255 and set(np.unique(train.images)) == {
    round(v * 255 / 16) for v in range(17)
  }
  assert list(train.labels[:8]) == [2, 8, 2, 6, 6, 7, 1, 9]  # the order never changes


# ---- npz and npy ----


@pytest.mark.parametrize("save, mapped", [(np.savez, True), (np.savez_compressed, False)])
def test_npz_folder_and_files(tmp_path, save, mapped):
  images, labels = images_labels(30)
  for part in range(11):
    save(
      tmp_path / f"train_{part}.npz",
      image=images[2 * part : 2 * part + 2],
      label=labels[2 * part : 2 * part + 2],
    )
  save(tmp_path / "test.npz", images=images[22:], labels=labels[22:, None])
  save(tmp_path / "stats.npz", mu=np.zeros(3))
  train = SOURCES["npz"](path=tmp_path, split="train")
  assert_holds(train, images[:22], labels[:22])  # train_10 comes after train_9
  assert isinstance(train.images.parts[0], readers.FileRows) == mapped
  assert_holds(SOURCES["npz"](path=str(tmp_path), split="test"), images[22:], labels[22:])
  assert_holds(SOURCES["npz"](path=tmp_path / "test.npz", split="test"), images[22:], labels[22:])
  with pytest.raises(
    InputError, match=r"test.npz is not the split 'train'; give a folder with files train\*.npz"
  ):
    SOURCES["npz"](path=tmp_path / "test.npz", split="train")


def test_npz_with_both_splits_and_other_layouts(tmp_path):
  images, labels = images_labels(9)
  both = {"x_train": images[:5], "y_train": labels[:5], "x_test": images[5:], "y_test": labels[5:]}
  np.savez(tmp_path / "all.npz", **both)
  assert_holds(SOURCES["npz"](path=tmp_path / "all.npz", split="test"), images[5:], labels[5:])
  assert_holds(SOURCES["npz"](path=tmp_path / "all.npz"), images[:5], labels[:5])
  np.savez(tmp_path / "grey.npz", image=images[..., 0], label=labels)
  assert_holds(SOURCES["npz"](path=tmp_path / "grey.npz"), images[..., :1], labels)
  np.savez(tmp_path / "fortran.npz", image=np.asfortranarray(images), label=labels)
  assert_holds(SOURCES["npz"](path=tmp_path / "fortran.npz"), images, labels)
  np.savez(tmp_path / "unit.npz", image=images / 255, label=labels)
  assert_holds(SOURCES["npz"](path=tmp_path / "unit.npz"), images, labels)
  source = SOURCES["npz"](path=tmp_path / "grey.npz", num_classes=5)
  assert source.num_classes == 5 and source.class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"image": np.zeros((4, 8, 8, 3), np.int64)}, "images of type int64; expected uint8, or floats in"),
    (
      {"image": np.zeros((4, 3, 8, 8), np.uint8)},
      r"images of shape \[4, 3, 8, 8\]; expected \[n, height, width",
    ),
    ({"image": np.zeros((4, 192), np.uint8)}, r"images of shape \[4, 192\]"),
    ({"image": np.zeros((5, 8, 8, 3), np.uint8)}, "5 images and 4 labels"),
    ({"image": np.full((4, 8, 8, 3), 2.0)}, r"float images in \[2, 2\]; expected floats in \[0, 1\]"),
    ({"image": np.eye(4)[:, :, None, None] * np.nan}, "image 0 has values that are not finite"),
    ({"image": np.array([0, 1, 1, np.inf])[:, None, None, None]}, "image 3 has values that are not finite"),
    ({"label": np.array([0, 1, 2, 10])}, "label 10 is out of range; labels of 10 classes are 0..9"),
    ({"label": np.array([0, -1, 2, 3])}, "label -1 is out of range"),
    ({"label": np.zeros(4)}, "labels of type float64"),
    ({"label": np.zeros((4, 10), int)}, r"shape \[4, 10\]; expected integers \[n\]"),
    ({"label": None}, r"keys \['image'\]; expected image and label"),
    ({"image": np.array([None] * 4, object)}, "member image.npy, is damaged or no plain array.*objects"),
    ({"image": np.zeros((0, 8, 8, 3), np.uint8), "label": np.zeros(0, int)}, "no images"),
  ],
)
def test_bad_npz(tmp_path, arrays, message):
  good = {"image": np.zeros((4, 8, 8, 3), np.uint8), "label": np.arange(4)}
  np.savez(tmp_path / "x.npz", **{key: value for key, value in (good | arrays).items() if value is not None})
  with pytest.raises(InputError, match=message) as caught:
    SOURCES["npz"](path=tmp_path / "x.npz", num_classes=10)
  assert "\n" not in str(caught.value) and "x.npz" in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
  images, labels = images_labels(50, 16)
  save(tmp_path / "x.npz", image=images, label=labels)
  data = (tmp_path / "x.npz").read_bytes()
  for stop in (0, 10, len(data) // 2, len(data) - 5):
    (tmp_path / "x.npz").write_bytes(data[:stop])
    with pytest.raises(InputError, match="x.npz is not a complete .npz file"):
      SOURCES["npz"](path=tmp_path / "x.npz")
  (tmp_path / "x.npz").write_bytes(
    data[:40] + bytes(200) + data[240:]
  )  # the directory is whole, the data are not
  with pytest.raises(InputError, match="member image.npy, is damaged"):
    SOURCES["npz"](path=tmp_path / "x.npz")


def test_npy_parts_and_splits(tmp_path):
  images, labels = images_labels(9)
  for split, rows in (("train", slice(0, 6)), ("test", slice(6, 9))):
    (tmp_path / split).mkdir()
    for i, part in enumerate(np.array_split(np.arange(9)[rows], 2)):
      np.save(tmp_path / split / f"images-{i:05}-of-00002.npy", images[part])
      np.save(tmp_path / split / f"labels-{i:05}-of-00002.npy", labels[part])
  train = SOURCES["npy"](path=tmp_path)
  assert_holds(train, images[:6], labels[:6])
  assert isinstance(train.images.parts[0], readers.FileRows)
  assert_holds(SOURCES["npy"](path=tmp_path, split="test"), images[6:], labels[6:])
  assert_holds(SOURCES["npy"](path=tmp_path / "train"), images[:6], labels[:6])
  assert_holds(
    SOURCES["npy"](path=tmp_path / "train" / "images-00001-of-00002.npy"), images[3:6], labels[3:6]
  )
  with pytest.raises(InputError, match="has no folder test/ for the split 'test'"):
    SOURCES["npy"](path=tmp_path / "train", split="test")
  with pytest.raises(InputError, match="is the split 'train'"):
    SOURCES["npy"](path=tmp_path / "train" / "images-00001-of-00002.npy", split="test")
  (tmp_path / "test" / "labels-00001-of-00002.npy").unlink()
  with pytest.raises(InputError, match="labels-00001-of-00002.npy is missing beside it"):
    SOURCES["npy"](path=tmp_path, split="test")
  whole = (tmp_path / "train" / "images-00000-of-00002.npy").read_bytes()
  (tmp_path / "train" / "images-00000-of-00002.npy").write_bytes(whole[:-1])
  with pytest.raises(InputError, match="images-00000-of-00002.npy is damaged .* the file is cut short"):
    SOURCES["npy"](path=tmp_path)
  np.save(tmp_path / "train" / "images-00000-of-00002.npy", images[:3, :4])
  with pytest.raises(InputError, match="the parts of one data set must agree"):
    SOURCES["npy"](path=tmp_path)


# ---- what is missing ----


@pytest.mark.parametrize("name", ["npz", "npy", "image_folder", "cifar_binary", "cifar_python"])
def test_missing_paths_and_splits(tmp_path, name):
  with pytest.raises(InputError, match="no such file or folder: .*nowhere .expected"):
    SOURCES[name](path=tmp_path / "nowhere")
  with pytest.raises(InputError, match="needs a path"):
    SOURCES[name](path="")
  with pytest.raises(InputError, match="unknown split 'val'; there are 'train' and 'test'"):
    SOURCES[name](path=tmp_path, split="val")
  with pytest.raises(InputError):
    SOURCES[name](path=tmp_path)  # an empty folder


# ---- image folders ----


def write_folder(root, images, labels, names):
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    folder = root / names[label]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{i:03}.{'PNG' if i % 2 else 'png'}")


def test_image_folder(tmp_path):
  images, labels = images_labels(9)
  write_folder(tmp_path / "train", images[:6], labels[:6], ["ant", "bee", "cat"])
  write_folder(tmp_path / "test", images[6:], labels[6:], ["ant", "bee", "cat"])
  by_class = np.argsort(labels[:6], kind="stable")
  train = SOURCES["image_folder"](path=tmp_path)
  assert train.class_names == ("ant", "bee", "cat") and train.num_classes == 3
  assert_holds(train, images[:6][by_class], labels[:6][by_class])
  assert_holds(SOURCES["image_folder"](path=tmp_path, split="test"), images[6:], labels[6:])
  assert_holds(SOURCES["image_folder"](path=tmp_path / "train"), images[:6][by_class], labels[:6][by_class])


def test_image_folder_is_decoded_on_demand_when_large(tmp_path, monkeypatch):
  images, labels = images_labels(6)
  write_folder(tmp_path, images, labels, ["a", "b", "c"])
  by_class = np.argsort(labels, kind="stable")
  monkeypatch.setattr(sources, "DECODE_AT_ONCE", 100)
  source = SOURCES["image_folder"](path=tmp_path)
  assert isinstance(source.images.parts[0], readers.Decoded)
  assert_holds(source, images[by_class], labels[by_class])


def test_image_folder_sizes_modes_and_damage(tmp_path):
  (tmp_path / "a").mkdir()
  wide = np.zeros((8, 12, 3), np.uint8)
  wide[:, 2:10] = 200
  Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
  Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "a" / "grey.png")
  with pytest.raises(InputError, match=r"grey.png is 8x8 and .*wide.png 8x12; set size"):
    SOURCES["image_folder"](path=tmp_path)
  source = SOURCES["image_folder"](path=tmp_path, size=8)
  assert (source.images[0] == 77).all()
  assert (source.images[1] == 200).all()  # the centre of the wide image
  assert SOURCES["image_folder"](path=tmp_path, size=4).image_shape == (4, 4, 3)
  (tmp_path / "a" / "broken.png").write_bytes((tmp_path / "a" / "grey.png").read_bytes()[:50])
  with pytest.raises(InputError, match="broken.png cannot be read as an image"):
    SOURCES["image_folder"](path=tmp_path, size=8)
  (tmp_path / "a" / "broken.png").unlink()
  Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a" / "deep.png")
  with pytest.raises(InputError, match="deep.png: image mode I;16"):
    SOURCES["image_folder"](path=tmp_path, size=8)
  (tmp_path / "b").mkdir()
  with pytest.raises(InputError, match="class folder 'b' holds no images"):
    SOURCES["image_folder"](path=tmp_path, size=8)


# ---- CIFAR's archives ----


def cifar_records(n: int, classes: int, seed: int):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8), rng.integers(0, classes, n)


def flat(images):
  return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def tar_of(folder):
  path = folder.with_suffix(".tar.gz")
  with tarfile.open(path, "w:gz") as archive:
    archive.add(folder, folder.name)
  return path


def python2_like(content) -> bytes:
  """A protocol 2 pickle whose strings are byte strings of Python 2, as the published files have."""
  data = pickle.dumps(content, protocol=2)
  return data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


def test_cifar10_binary_and_python_agree(tmp_path):
  parts = [cifar_records(4, 10, seed) for seed in range(6)]
  names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
  binary, python = tmp_path / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-py"
  binary.mkdir(), python.mkdir()
  classes = [f"class{i}" for i in range(10)]
  (binary / "batches.meta.txt").write_text("\n".join(classes) + "\n")
  (python / "batches.meta").write_bytes(python2_like({"label_names": classes}))
  for name, (images, labels) in zip(names, parts, strict=True):
    records = np.concatenate([labels[:, None].astype(np.uint8), flat(images)], axis=1)
    (binary / f"{name}.bin").write_bytes(records.tobytes())
    (python / name).write_bytes(python2_like({b"data": flat(images), b"labels": labels.tolist()}))
  train = np.concatenate([p[0] for p in parts[:5]]), np.concatenate([p[1] for p in parts[:5]])
  for kind, folder in (("cifar_binary", binary), ("cifar_python", python)):
    for path in (folder, tar_of(folder)):
      source = SOURCES[kind](path=path)
      assert_holds(source, *train)
      assert source.class_names == tuple(classes) and source.num_classes == 10
      assert_holds(SOURCES[kind](path=path, split="test"), *parts[5])
  assert_holds(SOURCES["cifar_python"](path=tmp_path), *train)  # the folder above
  (binary / "data_batch_3.bin").write_bytes(b"\x01" * 3000)
  with pytest.raises(InputError, match="data_batch_3.bin: 3000 bytes; expected a multiple of 3073"):
    SOURCES["cifar_binary"](path=binary)
  (binary / "data_batch_3.bin").unlink()
  with pytest.raises(InputError, match="has no data_batch_3.bin"):
    SOURCES["cifar_binary"](path=binary)
  archive = python.with_suffix(".tar.gz")
  archive.write_bytes(archive.read_bytes()[:-2000])
  with pytest.raises(InputError, match="neither a folder nor a complete tar archive"):
    SOURCES["cifar_python"](path=archive)


def test_cifar100_uses_fine_labels(tmp_path):
  images, labels = cifar_records(5, 100, 0)
  coarse = labels // 5
  records = np.concatenate([np.stack([coarse, labels], 1).astype(np.uint8), flat(images)], axis=1)
  (tmp_path / "train.bin").write_bytes(records.tobytes())
  (tmp_path / "train").write_bytes(
    pickle.dumps({"data": flat(images), "fine_labels": labels.tolist(), "coarse_labels": coarse.tolist()})
  )
  for kind in ("cifar_binary", "cifar_python"):
    source = SOURCES[kind](path=tmp_path)
    assert source.num_classes == 100
    assert_holds(source, images, labels)


class Evil:
  def __reduce__(self):
    return os.system, ("touch evil",)


def test_pickles_cannot_execute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  images, labels = cifar_records(2, 10, 0)
  good = {"data": flat(images), "labels": labels.tolist()}
  for i in range(1, 6):
    (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(good))
  attacks = {
    "refused to unpickle posix.system": pickle.dumps(good | {"x": Evil()}),
    "refused to unpickle builtins.eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "refused to unpickle numpy.load": b"cnumpy\nload\n(S'x'\ntR.",
    "refused to build": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I999999999\ntS'f8'\ntR.",
    "is no readable pickle": pickle.dumps(good)[:-20],
    "holds a list": pickle.dumps([1, 2]),
    r"expected 'data' uint8 \[n, 3072\]": pickle.dumps({"data": [1, 2], "labels": [0, 1]}),
  }
  for message, data in attacks.items():
    (tmp_path / "data_batch_2").write_bytes(data)
    with pytest.raises(InputError, match="data_batch_2.*" + message):
      SOURCES["cifar_python"](path=tmp_path)
  assert not (tmp_path / "evil").exists()


# ---- TensorFlow Datasets ----


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
  train = SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tfds_dir)
  assert train.class_names == ("x", "y", "z") and len(train) == 20
  same_records(train, images[:20], labels[:20])
  test = SOURCES["tfds"](name="tiny_trustdiff_images:1.0.0", data_dir=str(tfds_dir), split="test")
  same_records(test, images[20:], labels[20:])
  version = tfds_dir / "tiny_trustdiff_images" / "1.0.0"
  assert SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=version, size=3).image_shape == (3, 3, 3)
  with pytest.raises(InputError, match=r"unknown split 'val'; .* has \['test', 'train'\]"):
    SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tfds_dir, split="val")
  with pytest.raises(InputError, match=r"no prepared data set 'cifar10' below .*download=True prepares it"):
    SOURCES["tfds"](name="cifar10", data_dir=tfds_dir)
  with pytest.raises(InputError, match="no prepared data set 'tiny_trustdiff_images:2.0.0'"):
    SOURCES["tfds"](name="tiny_trustdiff_images:2.0.0", data_dir=tfds_dir)


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
  source = SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tmp_path)
  assert_holds(source, np.asarray(SOURCES["tfds"]("tiny_trustdiff_images", tfds_dir).images), source.labels)
  same_records(source, images[:20], labels[:20])
  with pytest.raises(
    InputError, match="incomplete: tiny_trustdiff_images-test.tfrecord-00000-of-00001 is missing"
  ):
    SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tmp_path, split="test")
  whole = file.read_bytes()
  file.write_bytes(whole[:-30])
  with pytest.raises(InputError, match="is cut short or no TFRecord file"):
    SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tmp_path)
  length = int.from_bytes(whole[:8], "little") + 16
  file.write_bytes(whole[length:])
  with pytest.raises(InputError, match="19 records in the split 'train', expected 20"):
    SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tmp_path)
  (new / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
  with pytest.raises(InputError, match="stored as riegeli; prepare it again as array_record"):
    SOURCES["tfds"](name="tiny_trustdiff_images", data_dir=tmp_path)


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
      SOURCES["tfds"](name=name, data_dir=tmp_path)
    return
  same_records(SOURCES["tfds"](name=name, data_dir=tmp_path, num_classes=3), images, labels)
  with pytest.raises(InputError, match=r"are \(5, 5, 3\); leave out size"):
    SOURCES["tfds"](name=name, data_dir=tmp_path, size=4)


def test_importing_the_sources_imports_nothing_heavy():
  heavy = ["tensorflow", "torch", "transformers", "tensorflow_datasets", "sklearn", "grain", "PIL"]
  code = (
    "import sys; import jax_trustdiff.data.sources, jax_trustdiff.data.pipeline, jax_trustdiff.data.augment;"
    f"print([m for m in {heavy} if m in sys.modules])"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
  )
  assert out.stdout.strip() == "[]"


# ---- real data ----


def test_real_cifar10(tmp_path):
  folder = shared_dir("data", "cifar10")
  subprocess.run([sys.executable, str(folder / "unpack.py"), str(tmp_path)], check=True, capture_output=True)
  train, test = SOURCES["npz"](path=tmp_path), SOURCES["npz"](path=tmp_path, split="test")
  assert len(train) == 50000 and len(test) == 10000 and train.image_shape == (32, 32, 3)
  assert (np.bincount(train.labels) == 5000).all() and (np.bincount(test.labels) == 1000).all()
  images = np.asarray(train.images)
  mean = images.reshape(-1, 3).mean(0) / 255
  np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-8)
