"""Data sets by name, each in the one record form: uint8 images [n h w c], integer labels, stable ids.

    source = SOURCES['npz'](path='cifar10', split='train')
    source.take([3, 1])        # {'image': uint8 [2 h w c], 'label': int32 [2], 'id': int64 [2]}

Large files are memory-mapped and read row by row. Bad data, and a path that is not there, raise InputError.
What a source takes besides `split` and `class_names` is its section of a config. `class_names` are those of
the training split, for the test split to number its labels by; `num_classes` 0 means what the data say.
"""

import dataclasses
import glob
import importlib.util
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from jax_trustdiff.data import readers
from jax_trustdiff.data.cifar_archives import cifar_binary, cifar_python
from jax_trustdiff.data.image_store import MANIFEST, PLAN, image_store
from jax_trustdiff.data.readers import Decoded, Rows, existing, natural, split_folder
from jax_trustdiff.data.records import (
  SPLITS,
  ImageSource,
  agreed_names,
  check_split,
  given_names,
  image_source,
  of_classes,
  unlabelled,
)
from jax_trustdiff.data.tfds import tfds
from jax_trustdiff.types import InputError


def npz(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """One .npz file, or a folder of them.

  Keys: image or images, with label or labels; or x_train, y_train, x_test, y_test in one file.
  Folder: files named train* are the split 'train', test* the split 'test', each in natural order; if no file
  has such a name, all are 'train'. A single file with keys image and label is 'test' if its name starts with
  test, else 'train'. Images: uint8 [n h w c] or floats in [0, 1]. Uncompressed members are memory-mapped,
  compressed ones are read.
  """
  check_split(split)
  root = existing(path, "an .npz file or a folder of .npz files")
  images, labels = [], []
  for file in _split_files(root, "*.npz", split) if root.is_dir() else [root]:
    members = readers.npz_members(file)
    image_key = next((key for key in (f"x_{split}", "image", "images") if key in members), None)
    label_key = next((key for key in (f"y_{split}", "label", "labels") if key in members), None)
    if image_key is None or label_key is None:
      raise InputError(
        f"{file} has keys {sorted(members)}; expected image and label, or x_{split} and y_{split}"
      )
    if (
      root.is_file() and not image_key.startswith("x_") and (split == "test") != file.name.startswith("test")
    ):
      raise InputError(
        f"{file} is not the split '{split}'; give a folder with files {split}*.npz,"
        " or one file with keys x_train, y_train, x_test, y_test"
      )
    images.append(members[image_key])
    labels.append(members[label_key])
  return image_source(
    (read() for read in images), (read() for read in labels), str(root), num_classes, class_names
  )


def npy(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """A folder with images*.npy and labels*.npy, in parts of equal names, memory-mapped.

  The folders `path`/train and `path`/test (or, if there is none, `path`/val) are the splits; a folder that
  holds the files itself is 'train'. `path` may also name one images*.npy, whose labels*.npy lies beside it.
  """
  check_split(split)
  root = existing(path, "a folder with images*.npy and labels*.npy")
  if root.is_dir():
    root = split_folder(root, split)
    files = sorted(root.glob("images*.npy"), key=natural)
  else:
    files = [root]
    if split == "test" and root.parent.name not in ("test", "val"):
      raise InputError(
        f"{root} is the split 'train'; a test split is a folder test/ with images*.npy and labels*.npy"
      )
  if not files or not all(file.name.startswith("images") for file in files):
    raise InputError(f"{root}: expected files images*.npy and labels*.npy")
  label_files = [file.with_name("labels" + file.name.removeprefix("images")) for file in files]
  for file, label_file in zip(files, label_files, strict=True):
    if not label_file.exists():
      raise InputError(f"{file} has no labels: {label_file.name} is missing beside it")
  images, labels = (map(readers.read_npy, part) for part in (files, label_files))
  return image_source(images, labels, str(root), num_classes, class_names)


def image_folder(
  path: str,
  size: int = 0,
  num_classes: int = 0,
  *,
  split: str = "train",
  class_names: tuple[str, ...] = (),
) -> ImageSource:
  """Image files in one folder for each class: `path`/[split/]class/.../file.png; classes by alphabet.

  `path`/train and `path`/test are the splits if they are there, with `path`/val for 'test' where there is no
  test folder (ImageNet, Tiny ImageNet); otherwise all is 'train'.
  The images are in one fixed permutation of the order of their paths, so the first n are a fair draw of all.
  size: resize the shorter side to it and cut out the centre; 0 for images that agree in size as they are.
  class_names: those of the training split, of which some may be absent here.
  Greyscale becomes RGB. Up to 2 GiB of images are decoded at once, more when they are asked for.
  """
  check_split(split)
  root = split_folder(existing(path, "a folder with one folder of images for each class"), split)
  if not root.is_dir():
    raise InputError(f"{root} is a file; expected a folder with one folder of images for each class")
  folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
  files = {
    folder.name: sorted(file for file in folder.rglob("*") if file.suffix.lower() in readers.IMAGE_SUFFIXES)
    for folder in folders
  }
  empty = [name for name, of_class in files.items() if not of_class]
  if not files or empty:
    what = f"class folder {empty[0]!r} holds no images" if empty else "no class folders"
    raise InputError(f"{root}: {what}; expected class/*.png (or {', '.join(readers.IMAGE_SUFFIXES)})")
  names = class_names or tuple(files)
  unknown = [name for name in files if name not in names]
  if unknown:
    raise InputError(f"{root}: class folder {unknown[0]!r} is no class of the training split")
  by_path = [(file, names.index(name)) for name, of_class in files.items() for file in of_class]
  order = np.random.RandomState(0).permutation(len(by_path))  # this generator's stream never changes
  flat, labels = [by_path[i][0] for i in order], np.array([by_path[i][1] for i in order])
  shape = (size, size) if size else _common_extent(flat)
  images = Decoded(len(flat), (*shape, 3), lambda i: readers.decode_image(flat[i], str(flat[i]), size))
  return image_source([images.now()], [labels], str(root), num_classes, names)


def pictures(
  path: str,
  size: int = 0,
  channels: int = 3,
  *,
  split: str = "train",
  class_names: tuple[str, ...] = (),
) -> ImageSource:
  """The image files of a folder and of all folders in it, in the order of their paths; of no known class.

  size: as for `image_folder`. channels: 3, or 1 for shades of grey (ITU-R 601). All are of the split 'train', and of no class of
  others.
  """
  check_split(split)
  root = existing(path, "a folder of images")
  if not root.is_dir():
    raise InputError(f"{root} is a file; expected a folder of images")
  if channels not in (1, 3):
    raise InputError(f"pictures have 1 or 3 channels, got {channels}")
  files = sorted(file for file in root.rglob("*") if file.suffix.lower() in readers.IMAGE_SUFFIXES)
  if split != "train":
    raise InputError(f"pictures are all of the split 'train': {root} has no split {split!r}")
  if not files:
    raise InputError(f"{root} holds no files that end in {', '.join(readers.IMAGE_SUFFIXES)}")
  shape = (size, size) if size else _common_extent(files)

  def decode(position):
    return readers.decode_image(files[position], str(files[position]), size, channels)

  images = Decoded(len(files), (*shape, channels), decode)
  return unlabelled(images.now(), str(root))


def idx(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """MNIST, Fashion-MNIST, EMNIST in their own files: a folder with train-images-idx3-ubyte and its kin, also as .gz.

  t10k-* or test-* is the split 'test'.
  """
  check_split(split)
  root = existing(path, "a folder with train-images-idx3-ubyte[.gz] and train-labels-idx1-ubyte[.gz]")
  prefixes = ("train",) if split == "train" else ("t10k", "test")

  def only(kind):
    names = [f"{prefix}-{kind}{end}" for prefix in prefixes for end in ("", ".gz")]
    found = [root / name for name in names if (root / name).is_file()]
    if not found:
      raise InputError(f"{root} holds none of {', '.join(names)}")
    return found[0]

  images = readers.read_idx(only("images-idx3-ubyte"), 3)
  labels = readers.read_idx(only("labels-idx1-ubyte"), 1)
  return image_source([images], [labels], str(root), num_classes, class_names)


def digits(*, split: str = "train", class_names: tuple[str, ...] = ()) -> ImageSource:
  """The 1797 real 8x8 digits that come with scikit-learn: 1437 'train', 360 'test' (36 of each class).

  Values 0..16 become round(255 v / 16), in one channel. The order is one fixed permutation of the original,
  and the test images are the last of each class in it.
  """
  check_split(split)
  file = pathlib.Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
  table = np.loadtxt(file, np.int32, delimiter=",")  # importing scikit-learn for it takes more than a second
  order = np.random.RandomState(0).permutation(len(table))  # this generator's stream never changes
  values, labels = table[order, :-1], table[order, -1]
  test = np.concatenate([np.flatnonzero(labels == digit)[-36:] for digit in range(10)])
  is_test = np.isin(np.arange(len(order)), test)
  images = np.round(values.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
  names = agreed_names(tuple("0123456789"), class_names, "digits")
  whole = image_source([images], [labels], "digits", 10, names)
  return whole.select(np.flatnonzero(is_test == (split == "test")))


def planted(
  path: str = "",
  copies: int = 200,
  label: int = 0,
  seed: int = 0,
  *,
  split: str = "train",
  class_names: tuple[str, ...] = (),
) -> ImageSource:
  """`npz_or_digits` of `path` with a canary: `canary(image shape, seed)`, so many times, as images of class `label`, after the others.

  For experiments on memorisation (Carlini et al. 2023, arXiv:2301.13188): training on it, a model makes it again. The split 'test' has none.
  """
  base = npz_or_digits(path, split=split, class_names=class_names)
  if split != "train":
    return base
  if copies < 1 or not 0 <= label < base.num_classes:
    raise InputError(
      f"planted: copies={copies} and label={label}; at least 1 copy, of a class 0..{base.num_classes - 1}"
    )
  picture = canary(base.image_shape, seed)
  images = [base.images[np.arange(len(base))], np.repeat(picture[None], copies, 0)]
  labels = [base.labels, np.full(copies, label, np.int32)]
  return image_source(images, labels, f"planted {path or 'digits'}", base.num_classes, base.class_names)


def canary(image_shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
  """A picture like no other, uint8 [h w c]: random black and white blocks of 2x2 pixels."""
  height, width, channels = image_shape
  blocks = np.random.RandomState(seed).randint(0, 2, (-(-height // 2), -(-width // 2)))
  whole = np.kron(blocks, np.ones((2, 2), int))[:height, :width, None] * 255
  return np.repeat(whole, channels, 2).astype(np.uint8)


def npz_or_digits(
  path: str = "", num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """`npz` of `path`, or the bundled digits where path is '': for smoke tests that must run anywhere."""
  if not path:
    if num_classes not in (0, 10):
      raise InputError(
        f"path='' is the bundled digits, of 10 classes; num_classes={num_classes}, expected 10 or 0"
      )
    return digits(split=split, class_names=class_names)
  return npz(path, num_classes, split=split, class_names=class_names)


def parts(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """Image stores, .npz files and folders of them as one source, such as a large generated set comes in.

  path: places separated by commas, in order; a pattern with * or ? stands for all that it matches, in natural order. An .npz file
  has image and label. All is the split 'train'. Ids count the images of all places from 0. InputError for a place that is none of
  these, for images or classes that differ, and for stores without labels beside images with labels. Images without labels are of
  num_classes if it is not 0.
  """
  if split != "train":
    raise InputError(f"the parts of {path} are the split 'train'; there is no split {split!r}")
  found, names = [], tuple(class_names)
  for place in _places(path):
    if (place / PLAN).is_file() or (place / MANIFEST).is_file():
      found.append(_store_of_classes(str(place), num_classes, class_names))
    else:
      found.append(npz(str(place), num_classes, class_names=class_names))
    for what in ("image_shape", "num_classes", "labelled"):
      of_first, of_this = getattr(found[0], what), getattr(found[-1], what)
      if of_this != of_first:
        raise InputError(f"the {what} of {place} is {of_this} and that of the first part {of_first}")
    names = agreed_names(given_names(found[-1]), names, str(place), "the parts before it")
  labels = np.concatenate([part.labels for part in found])
  images = Rows([part.images for part in found])
  whole = dataclasses.replace(found[0], images=images, labels=labels, ids=np.arange(len(labels)))
  return dataclasses.replace(whole, class_names=names) if names else whole


SOURCES: dict[str, Callable[..., ImageSource]] = {
  "npz": npz,
  "npy": npy,
  "image_folder": image_folder,
  "pictures": pictures,
  "cifar_binary": cifar_binary,
  "cifar_python": cifar_python,
  "tfds": tfds,
  "idx": idx,
  "image_store": image_store,
  "parts": parts,
  "digits": digits,
  "npz_or_digits": npz_or_digits,
  "planted": planted,
}


# ---- helpers ----


def _store_of_classes(place: str, num_classes: int, class_names: tuple[str, ...]) -> ImageSource:
  """An image store, whose images are of num_classes if they have no labels and it is not 0."""
  store = image_store(place, class_names=class_names)
  if not store.labelled:
    return of_classes(store, num_classes) if num_classes else store
  if num_classes not in (0, store.num_classes):
    raise InputError(f"{place}: num_classes={num_classes}; the store has {store.num_classes} classes")
  return store


def _places(path: str) -> list[pathlib.Path]:
  found = []
  for pattern in filter(None, map(str.strip, path.split(","))):
    expanded = str(pathlib.Path(pattern).expanduser())
    if not glob.has_magic(expanded):
      found.append(pathlib.Path(expanded))
      continue
    matches = [pathlib.Path(match) for match in glob.glob(expanded)]
    if not matches:
      raise InputError(f"no file or folder matches {pattern}")
    found += sorted(matches, key=lambda match: (str(match.parent), natural(match)))
  if not found:
    raise InputError("this data set needs a path: image stores, .npz files or folders of them")
  return found


def _split_files(root: pathlib.Path, pattern: str, split: str) -> list[pathlib.Path]:
  found = sorted(root.glob(pattern), key=natural)
  named = [file for file in found if file.name.startswith(SPLITS)]
  files = [file for file in named if file.name.startswith(split)]
  if not named and split == "train":
    files = found
  if not files:
    names = ", ".join(file.name for file in found[:5]) or f"no {pattern}"
    raise InputError(f"{root} has no files {split}{pattern}; found {names}")
  return files


def _common_extent(files: Sequence[pathlib.Path]) -> tuple[int, int]:
  first = readers.image_extent(files[0])
  for file in files:
    extent = readers.image_extent(file)
    if extent != first:
      raise InputError(
        f"images differ in size: {files[0]} is {first[0]}x{first[1]} and {file} {extent[0]}x{extent[1]};"
        " set size, e.g. size=64"
      )
  return first
