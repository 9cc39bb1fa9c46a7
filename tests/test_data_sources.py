"""Every source gives the same records from its own files, and says what is wrong with bad ones."""

import gzip
import inspect
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import sklearn.datasets
from conftest import shared_dir
from data_checks import assert_holds, images_labels, source_of
from PIL import EpsImagePlugin, Image

from jax_trustdiff import config
from jax_trustdiff.data import readers, records
from jax_trustdiff.data.records import image_source, limit, split_validation
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.tasks.classifiers import load_data
from jax_trustdiff.types import InputError, RunError

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
  with pytest.raises(RunError, match="x.npy has changed since it was opened; start again"):
    reader[rows]
  os.unlink(tmp_path / "x.npy")
  with pytest.raises(RunError, match="x.npy can no longer be read: No such file"):
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


def labelled(labels):
  labels = np.asarray(labels)
  return image_source([np.zeros((len(labels), 1, 1, 1), np.uint8)], [labels], "test")


def test_cuts_of_data_sorted_by_class_are_refused():
  by_class = labelled(np.repeat(np.arange(3), 100))
  with pytest.raises(
    InputError, match=r"the training part has 200 .* none of class '0' \(label 0\).*'random'"
  ):
    split_validation(by_class, 100)
  with pytest.raises(InputError, match=r"the validation part has 60 .* none of class '1'.*'random'"):
    split_validation(by_class, 60)
  assert set(split_validation(by_class, 59)[1].labels) == {0}  # too few to tell
  train, validation = split_validation(by_class, 60, "random")
  assert set(train.labels) == set(validation.labels) == {0, 1, 2}
  with pytest.raises(
    InputError, match=r"the first 60 of 300 images hold none of class '1' .* shuffle the data"
  ):
    limit(by_class, 60)
  assert len(limit(by_class, 59)) == 59 and set(limit(by_class, 60, seed=0).labels) == {0, 1, 2}
  with pytest.raises(InputError, match="the training part .* take fewer validation images"):
    split_validation(by_class, 299, "random")
  fair = labelled(np.arange(300) % 3)
  assert len(split_validation(fair, 60)[1]) == 60 and len(limit(fair, 60)) == 60
  rare = labelled([0, 1] * 300 + [2] * 3)  # of the rare class a fair draw holds one or none
  assert len(split_validation(rare, 200)[1]) == 200 and len(limit(rare, 200)) == 200


def test_drawn_parts_never_change():
  source = labelled(np.arange(30) % 3)
  assert list(split_validation(source, 5, "random")[1].ids) == [2, 10, 13, 26, 28]
  assert list(limit(source, 5, seed=3).ids) == [5, 15, 18, 22, 26]


@pytest.mark.parametrize("name", SOURCES)
def test_a_config_can_select_every_source(name):
  """What is not in the config section is keyword-only; what is has a simple type, and a default except for a place."""
  parameters = inspect.signature(SOURCES[name]).parameters
  wiring = {key for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
  assert wiring == {"split", "class_names"} and "name" not in parameters
  for key in parameters.keys() - wiring:
    parameter = parameters[key]
    assert parameter.annotation in (str, int, bool, float, tuple)
    assert parameter.default is not parameter.empty or key in ("path", "dataset")


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
  theirs = sklearn.datasets.load_digits()
  theirs = [
    (np.round(image * 255 / 16).astype(np.uint8).tobytes(), label)
    for image, label in zip(theirs.images, theirs.target, strict=True)
  ]
  ours = [(s.images[[i]].tobytes(), s.labels[i]) for s in (train, test) for i in range(len(s))]
  assert sorted(ours) == sorted(theirs)
  small = SOURCES["npz_or_digits"](num_classes=10, split="test", class_names=train.class_names)
  assert len(small) == 360 and small.class_names == train.class_names
  with pytest.raises(InputError, match="digits, of 10 classes; num_classes=3, expected 10 or 0"):
    SOURCES["npz_or_digits"](num_classes=3)


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
  train = source_of("npz", tmp_path, split="train")
  assert_holds(train, images[:22], labels[:22])  # train_10 comes after train_9
  assert isinstance(train.images.parts[0], readers.FileRows) == mapped
  assert_holds(source_of("npz", str(tmp_path), split="test"), images[22:], labels[22:])
  assert_holds(source_of("npz", tmp_path / "test.npz", split="test"), images[22:], labels[22:])
  with pytest.raises(
    InputError, match=r"test.npz is not the split 'train'; give a folder with files train\*.npz"
  ):
    source_of("npz", tmp_path / "test.npz", split="train")


def test_npz_with_both_splits_and_other_layouts(tmp_path):
  images, labels = images_labels(9)
  both = {"x_train": images[:5], "y_train": labels[:5], "x_test": images[5:], "y_test": labels[5:]}
  np.savez(tmp_path / "all.npz", **both)
  assert_holds(source_of("npz", tmp_path / "all.npz", split="test"), images[5:], labels[5:])
  assert_holds(source_of("npz", tmp_path / "all.npz"), images[:5], labels[:5])
  np.savez(tmp_path / "grey.npz", image=images[..., 0], label=labels)
  assert_holds(source_of("npz", tmp_path / "grey.npz"), images[..., :1], labels)
  np.savez(tmp_path / "fortran.npz", image=np.asfortranarray(images), label=labels)
  assert_holds(source_of("npz", tmp_path / "fortran.npz"), images, labels)
  np.savez(tmp_path / "unit.npz", image=images / 255, label=labels)
  assert_holds(source_of("npz", tmp_path / "unit.npz"), images, labels)
  several = source_of("npz", tmp_path / "all.npz", split="test", class_names=("a", "b", "c", "d"))
  assert several.class_names == ("a", "b", "c", "d") and several.num_classes == 4
  with pytest.raises(InputError, match="label 2 is out of range; labels of 2 classes are 0..1"):
    source_of("npz", tmp_path / "all.npz", split="test", class_names=("a", "b"))
  with pytest.raises(InputError, match="num_classes=-1; expected a positive number or 0"):
    source_of("npz", tmp_path / "all.npz", num_classes=-1)
  source = source_of("npz", tmp_path / "grey.npz", num_classes=5)
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
    source_of("npz", tmp_path / "x.npz", num_classes=10)
  assert "\n" not in str(caught.value) and "x.npz" in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
  images, labels = images_labels(50, 16)
  save(tmp_path / "x.npz", image=images, label=labels)
  data = (tmp_path / "x.npz").read_bytes()
  for stop in (0, 10, len(data) // 2, len(data) - 5):
    (tmp_path / "x.npz").write_bytes(data[:stop])
    with pytest.raises(InputError, match="x.npz is not a complete .npz file"):
      source_of("npz", tmp_path / "x.npz")
  (tmp_path / "x.npz").write_bytes(
    data[:40] + bytes(200) + data[240:]
  )  # the directory is whole, the data are not
  with pytest.raises(InputError, match="member image.npy, is damaged"):
    source_of("npz", tmp_path / "x.npz")


def npy_bytes(header: str, data: bytes = b"") -> bytes:
  header = header.ljust(117) + "\n"
  return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def test_npz_member_that_claims_its_neighbour_s_bytes(tmp_path):
  header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8, 8, 3)}"
  with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
    archive.writestr("image.npy", npy_bytes(header, bytes(2 * 192 - 1)))
    archive.writestr(
      "label.npy", npy_bytes("{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}", bytes(16))
    )
  with pytest.raises(InputError, match="image.npy, is damaged .*384 bytes of data expected, 383 found"):
    source_of("npz", tmp_path / "x.npz")


@pytest.mark.parametrize(
  "header",
  [
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296, 8, 3)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 9999999999999999999999)}",
    "{'descr': 3.5, 'fortran_order': False, 'shape': (2,)}",
    "((((",
    '"' * 3,
    "\x00",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (2,)," + 20000 * " " + "}",
  ],
)
def test_bad_npy_headers(tmp_path, header):
  (tmp_path / "images.npy").write_bytes(npy_bytes(header, bytes(1000)))
  with pytest.raises(InputError, match="images.npy is damaged or no plain array: .") as caught:
    readers.read_npy(tmp_path / "images.npy")
  assert "\n" not in str(caught.value)


def test_npy_parts_and_splits(tmp_path):
  images, labels = images_labels(9)
  for split, rows in (("train", slice(0, 6)), ("test", slice(6, 9))):
    (tmp_path / split).mkdir()
    for i, part in enumerate(np.array_split(np.arange(9)[rows], 2)):
      np.save(tmp_path / split / f"images-{i:05}-of-00002.npy", images[part])
      np.save(tmp_path / split / f"labels-{i:05}-of-00002.npy", labels[part])
  train = source_of("npy", tmp_path)
  assert_holds(train, images[:6], labels[:6])
  assert isinstance(train.images.parts[0], readers.FileRows)
  assert_holds(source_of("npy", tmp_path, split="test"), images[6:], labels[6:])
  assert_holds(source_of("npy", tmp_path / "train"), images[:6], labels[:6])
  assert_holds(source_of("npy", tmp_path / "train" / "images-00001-of-00002.npy"), images[3:6], labels[3:6])
  with pytest.raises(InputError, match="has no folder test/ for the split 'test'"):
    source_of("npy", tmp_path / "train", split="test")
  with pytest.raises(InputError, match="is the split 'train'"):
    source_of("npy", tmp_path / "train" / "images-00001-of-00002.npy", split="test")
  (tmp_path / "test" / "labels-00001-of-00002.npy").unlink()
  with pytest.raises(InputError, match="labels-00001-of-00002.npy is missing beside it"):
    source_of("npy", tmp_path, split="test")
  whole = (tmp_path / "train" / "images-00000-of-00002.npy").read_bytes()
  (tmp_path / "train" / "images-00000-of-00002.npy").write_bytes(whole[:-1])
  with pytest.raises(InputError, match="images-00000-of-00002.npy is damaged .* the file is cut short"):
    source_of("npy", tmp_path)
  np.save(tmp_path / "train" / "images-00000-of-00002.npy", images[:3, :4])
  with pytest.raises(InputError, match="the parts of one data set must agree"):
    source_of("npy", tmp_path)


# ---- what is missing ----


@pytest.mark.parametrize("name", ["npz", "npy", "image_folder", "cifar_binary", "cifar_python"])
def test_missing_paths_and_splits(tmp_path, name):
  with pytest.raises(InputError, match="no such file or folder: .*nowhere .expected"):
    source_of(name, tmp_path / "nowhere")
  with pytest.raises(InputError, match="needs a path"):
    source_of(name, "")
  with pytest.raises(InputError, match="unknown split 'val'; there are 'train' and 'test'"):
    source_of(name, tmp_path, split="val")
  with pytest.raises(InputError):
    source_of(name, tmp_path)  # an empty folder


# ---- image folders ----


def write_folder(root, images, labels, names):
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    folder = root / names[label]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{i:03}.{'PNG' if i % 2 else 'png'}")


def test_pictures_of_no_class(tmp_path):
  """In the order of their paths, from all folders; grey ones if asked for."""
  images = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3), np.uint8)
  (tmp_path / "b").mkdir()
  for name, image in zip(("a.png", "b/a.png", "c.bmp"), images, strict=True):
    Image.fromarray(image).save(tmp_path / name)
  source = source_of("pictures", tmp_path)
  np.testing.assert_array_equal(source.take(np.arange(3))["image"], images)
  assert not source.labelled and source.class_names == ("unlabelled",)
  grey = source_of("pictures", tmp_path, channels=1)
  assert grey.image_shape == (5, 6, 1)
  wanted = images @ [0.299, 0.587, 0.114]
  assert np.abs(grey.take(np.arange(3))["image"][..., 0] - wanted).max() < 1
  assert source_of("pictures", tmp_path, size=4).image_shape == (4, 4, 3)
  for changes, message in (
    (dict(channels=2), "1 or 3 channels, got 2"),
    (dict(split="test"), "no split 'test'"),
    (dict(path=str(tmp_path / "a.png")), "is a file; expected a folder"),
  ):
    with pytest.raises(InputError, match=message):
      source_of("pictures", changes.pop("path", tmp_path), **changes)
  Image.fromarray(images[0][:4]).save(tmp_path / "d.png")
  with pytest.raises(InputError, match="size"):
    source_of("pictures", tmp_path)


def test_image_folder(tmp_path):
  images, labels = images_labels(9)
  write_folder(tmp_path / "train", images[:6], labels[:6], ["ant", "bee", "cat"])
  write_folder(tmp_path / "test", images[6:], labels[6:], ["ant", "bee", "cat"])
  by_class = np.argsort(labels[:6], kind="stable")
  order = by_class[[5, 2, 1, 3, 0, 4]]  # of the paths; it never changes
  train = source_of("image_folder", tmp_path)
  assert train.class_names == ("ant", "bee", "cat") and train.num_classes == 3
  assert_holds(train, images[:6][order], labels[:6][order])
  test = source_of("image_folder", tmp_path, split="test")
  assert_holds(test, images[6:][[2, 1, 0]], labels[6:][[2, 1, 0]])
  assert_holds(source_of("image_folder", tmp_path / "train"), images[:6][order], labels[:6][order])
  (tmp_path / "test").rename(tmp_path / "val")
  assert_holds(
    source_of("image_folder", tmp_path, split="test"), images[6:][[2, 1, 0]], labels[6:][[2, 1, 0]]
  )
  (tmp_path / "train").rename(tmp_path / "training")
  with pytest.raises(InputError, match="has no folder train/"):
    source_of("image_folder", tmp_path)


def test_the_first_images_of_a_folder_are_a_fair_draw(tmp_path):
  images, labels = images_labels(150, 1)
  write_folder(tmp_path, images, labels, ["a", "b", "c"])
  source = source_of("image_folder", tmp_path)
  train, validation = split_validation(source, 60)
  assert np.bincount(validation.labels).min() >= 10 and np.bincount(limit(source, 60).labels).min() >= 10


def test_a_test_folder_keeps_the_numbers_of_the_training_classes(tmp_path):
  images, labels = images_labels(6)
  write_folder(tmp_path / "train", images, labels, ["ant", "bee", "cat"])
  write_folder(tmp_path / "test", images[:4], np.array([0, 1, 0, 1]), ["ant", "cat"])
  data = load_data(run_config(name="image_folder", path=str(tmp_path)))
  assert data.test.class_names == data.train.class_names == ("ant", "bee", "cat")
  assert sorted(data.test.labels) == [0, 0, 2, 2]
  write_folder(tmp_path / "test", images[:1], labels[:1], ["dog"])
  with pytest.raises(InputError, match="class folder 'dog' is no class of the training split"):
    load_data(run_config(name="image_folder", path=str(tmp_path)))


def run_config(validation_split="first", num_validation=0, **data):
  train = dict(num_train=0, num_validation=num_validation, validation_split=validation_split)
  mixing = dict(generated="", labels="", soft_labels=False)
  return config.from_plain({"data": data, "mixing": mixing, "train": train, "eval": dict(num_test=0)})


def test_load_data_chooses_the_validation_images(tmp_path):
  first = load_data(run_config("first", 64, name="digits"))
  assert list(first.validation.ids) == list(range(64)) and first.epoch_images == 1437
  drawn, again = (load_data(run_config("random", 64, name="digits")) for _ in range(2))
  assert list(drawn.validation.ids) == list(again.validation.ids) != list(first.validation.ids)
  assert len(drawn.train) == 1437 - 64
  with pytest.raises(InputError, match="unknown validation split 'last'; there are 'first' and 'random'"):
    load_data(run_config("last", 64, name="digits"))


def test_splits_must_agree(tmp_path):
  images, labels = images_labels(9)
  np.savez(tmp_path / "train.npz", image=images, label=labels)
  np.savez(tmp_path / "test.npz", image=images[:4], label=labels[:4] % 2)
  data = load_data(run_config(name="npz", path=str(tmp_path)))
  assert data.train.num_classes == data.test.num_classes == 3  # although the test images are of two
  np.savez(tmp_path / "test.npz", image=images[:, :4], label=labels)
  with pytest.raises(
    InputError, match=r"training split are \[5, 5, 3\] and those of the test split \[4, 5, 3\]"
  ):
    load_data(run_config(name="npz", path=str(tmp_path)))
  np.savez(tmp_path / "test.npz", image=images, label=labels + 1)
  with pytest.raises(InputError, match="label 3 is out of range; labels of 3 classes"):
    load_data(run_config(name="npz", path=str(tmp_path)))
  three, four = (image_source([images], [labels], "test", n) for n in (3, 4))
  with pytest.raises(InputError, match="the training split has 3 classes and the test split 4"):
    records.check_alike(three, four)
  named = image_source([images], [labels], "test", 3, ("0", "one", "2"))
  with pytest.raises(InputError, match="the test split: class 1 is 'one'; in the training split it is '1'"):
    records.check_alike(three, named)
  with pytest.raises(InputError, match="3 classes; expected the 4 of the training split"):
    records.agreed_names(named.class_names, four.class_names, "x")


def test_image_folder_is_decoded_on_demand_when_large(tmp_path, monkeypatch):
  images, labels = images_labels(6)
  write_folder(tmp_path, images, labels, ["a", "b", "c"])
  order = np.argsort(labels, kind="stable")[[5, 2, 1, 3, 0, 4]]
  monkeypatch.setattr(readers, "DECODE_AT_ONCE", 100)
  source = source_of("image_folder", tmp_path)
  assert isinstance(source.images.parts[0], readers.Decoded)
  assert_holds(source, images[order], labels[order])


def test_a_postscript_file_runs_nothing(tmp_path, monkeypatch):
  """Pillow hands PostScript to Ghostscript, which runs it, if it may choose the format by what the file holds."""
  ran = []
  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: ran.append(args))
  (tmp_path / "a").mkdir()
  program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
  (tmp_path / "a" / "e.png").write_bytes(program)
  for size in (0, 8):
    with pytest.raises(InputError, match="e.png cannot be read as an image: cannot identify"):
      source_of("image_folder", tmp_path, size=size)
  assert not ran


@pytest.mark.parametrize("suffix", [s for s in readers.IMAGE_SUFFIXES if s != ".pgm"])
def test_every_image_suffix_is_read(tmp_path, suffix):
  (tmp_path / "a").mkdir()
  Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(tmp_path / "a" / f"x{suffix}")
  assert abs(source_of("image_folder", tmp_path).images.astype(int) - 77).max() <= 2


def test_image_folder_sizes_modes_and_damage(tmp_path):
  (tmp_path / "a").mkdir()
  wide = np.zeros((8, 12, 3), np.uint8)
  wide[:, 2:10] = 200
  Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
  Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "a" / "grey.png")
  with pytest.raises(InputError, match=r"wide.png is 8x12 and .*grey.png 8x8; set size"):
    source_of("image_folder", tmp_path)
  source = source_of("image_folder", tmp_path, size=8)
  assert sorted(set(source.images.ravel())) == [77, 200]  # the centre of the wide image is 200
  assert source_of("image_folder", tmp_path, size=4).image_shape == (4, 4, 3)
  (tmp_path / "a" / "broken.png").write_bytes((tmp_path / "a" / "grey.png").read_bytes()[:50])
  with pytest.raises(InputError, match="broken.png cannot be read as an image"):
    source_of("image_folder", tmp_path, size=8)
  (tmp_path / "a" / "broken.png").unlink()
  Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a" / "deep.png")
  with pytest.raises(InputError, match="deep.png: image mode I;16"):
    source_of("image_folder", tmp_path, size=8)
  (tmp_path / "b").mkdir()
  with pytest.raises(InputError, match="class folder 'b' holds no images"):
    source_of("image_folder", tmp_path, size=8)


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
  train, test = source_of("npz", tmp_path), source_of("npz", tmp_path, split="test")
  assert len(train) == 50000 and len(test) == 10000 and train.image_shape == (32, 32, 3)
  assert (np.bincount(train.labels) == 5000).all() and (np.bincount(test.labels) == 1000).all()
  images = np.asarray(train.images)
  mean = images.reshape(-1, 3).mean(0) / 255
  np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-8)


# ---- idx files ----


def write_idx(file, array, gzipped=False, rank=None):
  header = bytes([0, 0, 8, array.ndim if rank is None else rank]) + np.array(array.shape, ">u4").tobytes()
  data = header + array.tobytes()
  file.write_bytes(gzip.compress(data) if gzipped else data)


@pytest.fixture
def idx_folder(tmp_path):
  """Six training and four test images in the files of MNIST, the test files gzipped."""
  rng = np.random.default_rng(0)
  for prefix, n, gzipped in (("train", 6, False), ("t10k", 4, True)):
    end = ".gz" if gzipped else ""
    images = rng.integers(0, 256, (n, 5, 7), dtype=np.uint8)
    write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{end}", images, gzipped)
    write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{end}", np.arange(n, dtype=np.uint8) % 3, gzipped)
  return tmp_path


def test_idx_files_are_read_plain_and_gzipped(idx_folder):
  train, test = (SOURCES["idx"](str(idx_folder), split=split) for split in ("train", "test"))
  assert train.image_shape == test.image_shape == (5, 7, 1) and (len(train), len(test)) == (6, 4)
  images = np.random.default_rng(0).integers(0, 256, (6, 5, 7), dtype=np.uint8)
  np.testing.assert_array_equal(train.take(np.arange(6))["image"][..., 0], images)
  np.testing.assert_array_equal(train.labels, [0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda f: f.unlink(), "holds none of train-images"),
    (lambda f: f.write_bytes(f.read_bytes()[:-1]), "number of bytes"),
    (lambda f: f.write_bytes(f.read_bytes() + b"x"), "number of bytes"),
    (lambda f: f.write_bytes(f.read_bytes()[:9]), "no idx file"),
    (lambda f: write_idx(f, np.zeros((6, 5, 7), np.uint8), rank=4), "no idx file"),
    (lambda f: f.rename(f.with_name(f.name + ".gz")), "cannot be read"),
    (lambda f: f.write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12), "number of bytes"),
  ],
)
def test_damaged_idx_files_are_one_line(idx_folder, damage, message):
  damage(idx_folder / "train-images-idx3-ubyte")
  with pytest.raises(InputError, match=message) as caught:
    SOURCES["idx"](str(idx_folder))
  assert "\n" not in str(caught.value)
