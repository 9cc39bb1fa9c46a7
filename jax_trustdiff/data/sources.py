"""Data sets in one record form: uint8 images [n h w c], integer labels, stable ids.

    source = SOURCES['npz'](path='cifar10', split='train')
    source.take([3, 1])        # {'image': uint8 [2 h w c], 'label': int32 [2], 'id': int64 [2]}

Large files are memory-mapped and read row by row. Bad data, and a path that is not there, raise InputError.
"""

import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from jax_trustdiff.data import readers
from jax_trustdiff.data.readers import Decoded, Rows
from jax_trustdiff.types import InputError

SPLITS = ("train", "test")
DECODE_AT_ONCE = 2 * 2**30  # bytes; encoded data sets up to this size are decoded when they are opened

Path = str | pathlib.Path
Positions = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Images with labels and ids.

  images: uint8 [n h w c], an array or `Rows`, which read memory-mapped files when indexed
  labels: int32 [n] in [0, num_classes)
  ids: int64 [n]; an image's position in its whole data set, the same after any selection
  """

  images: np.ndarray | Rows
  labels: np.ndarray
  ids: np.ndarray
  class_names: tuple[str, ...]
  num_classes: int

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, c)"""
    return tuple(self.images.shape[1:])

  @property
  def nbytes(self) -> int:
    """Bytes of all images."""
    return self.images.nbytes

  def take(self, indices: Positions) -> dict[str, np.ndarray]:
    """The records at these positions: {'image': uint8 [b h w c], 'label': int32 [b], 'id': int64 [b]}."""
    indices = np.asarray(indices, np.int64)
    return {"image": self.images[indices], "label": self.labels[indices], "id": self.ids[indices]}

  def select(self, indices: Positions) -> "ImageSource":
    """The source of these rows, in this order; ids stay. Memory-mapped images are not read."""
    indices = np.asarray(indices, np.int64)
    images = self.images.select(indices) if isinstance(self.images, Rows) else self.images[indices]
    return dataclasses.replace(self, images=images, labels=self.labels[indices], ids=self.ids[indices])


def image_source(
  images: Sequence,
  labels: Sequence[np.ndarray],
  where: str,
  num_classes: int | None = None,
  class_names: Sequence[str] = (),
) -> ImageSource:
  """An ImageSource of checked parts; `where` names them in error messages.

  images: parts uint8 [n h w c], or [n h w] for one channel, or floats in [0, 1] (become round(255 x))
  labels: parts of integers [n] or [n 1], one for each part of images
  num_classes: by default the number of class names, or without names the largest label plus one
  """
  images = [_checked_images(part, where) for part in images]
  labels = [_checked_labels(part, where) for part in labels]
  for image_part, label_part in zip(images, labels, strict=True):
    if len(image_part) != len(label_part):
      raise InputError(
        f"{where}: {len(image_part)} images and {len(label_part)} labels; expected as many of both"
      )
  labels = np.concatenate(labels)
  if not len(labels):
    raise InputError(f"{where}: no images")
  num_classes = num_classes or len(class_names) or int(labels.max()) + 1
  bad = labels.min() if labels.min() < 0 else labels.max()
  if not 0 <= bad < num_classes:
    raise InputError(
      f"{where}: label {bad} is out of range; labels of {num_classes} classes are 0..{num_classes - 1}"
    )
  return ImageSource(
    images=_joined(images, where),
    labels=labels.astype(np.int32),
    ids=np.arange(len(labels), dtype=np.int64),
    class_names=tuple(class_names) or tuple(map(str, range(num_classes))),
    num_classes=num_classes,
  )


# ---- parts of a source ----


def split_validation(
  source: ImageSource, num: int, how: str = "first", seed: int = 0
) -> tuple[ImageSource, ImageSource]:
  """(training source, validation source of `num` examples).

  how: 'first' takes the first `num` in file order, as the adversarial-training literature does with 1024 of
  CIFAR-10; 'random' takes `num` positions drawn with `seed`, and keeps both parts in file order.
  """
  if how not in ("first", "random"):
    raise InputError(f"unknown validation split {how!r}; there are 'first' and 'random'")
  if not 0 <= num < len(source):
    raise InputError(f"{num} validation examples of {len(source)}: 0 to {len(source) - 1} are possible")
  held_out = np.zeros(len(source), bool)
  held_out[
    np.arange(num) if how == "first" else np.random.default_rng(seed).permutation(len(source))[:num]
  ] = True
  return source.select(np.flatnonzero(~held_out)), source.select(np.flatnonzero(held_out))


def limit(source: ImageSource, num: int, seed: int | None = None) -> ImageSource:
  """The first `num` examples, or `num` drawn with `seed` (in file order); all if there are no more."""
  if num < 1:
    raise InputError(f"a source of {num} examples; at least 1 is needed")
  if num >= len(source):
    return source
  order = np.arange(len(source)) if seed is None else np.random.default_rng(seed).permutation(len(source))
  return source.select(np.sort(order[:num]))


# ---- constructors ----


def npz(path: Path, split: str = "train", num_classes: int | None = None) -> ImageSource:
  """One .npz file, or a folder of them.

  Keys: image or images, with label or labels; or x_train, y_train, x_test, y_test in one file.
  Folder: files named train* are the split 'train', test* the split 'test', each in natural order; if no file
  has such a name, all are 'train'. A single file with keys image and label is 'test' if its name starts with
  test, else 'train'. Images: uint8 [n h w c] or floats in [0, 1]. Uncompressed members are memory-mapped,
  compressed ones are read.
  """
  _check_split(split)
  root = _existing(path, "an .npz file or a folder of .npz files")
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
    images.append(members[image_key]())
    labels.append(members[label_key]())
  return image_source(images, labels, str(root), num_classes)


def npy(path: Path, split: str = "train", num_classes: int | None = None) -> ImageSource:
  """A folder with images*.npy and labels*.npy, in parts of equal names, memory-mapped.

  The folders `path`/train and `path`/test are the splits; a folder that holds the files itself is 'train'.
  `path` may also name one images*.npy, whose labels*.npy lies beside it.
  """
  _check_split(split)
  root = _existing(path, "a folder with images*.npy and labels*.npy")
  if root.is_dir():
    root = _split_folder(root, split)
    files = sorted(root.glob("images*.npy"), key=_natural)
  else:
    files = [root]
    if split == "test" and root.parent.name != "test":
      raise InputError(
        f"{root} is the split 'train'; a test split is a folder test/ with images*.npy and labels*.npy"
      )
  if not files or not all(file.name.startswith("images") for file in files):
    raise InputError(f"{root}: expected files images*.npy and labels*.npy")
  label_files = [file.with_name("labels" + file.name.removeprefix("images")) for file in files]
  for file, label_file in zip(files, label_files, strict=True):
    if not label_file.exists():
      raise InputError(f"{file} has no labels: {label_file.name} is missing beside it")
  images, labels = ([readers.read_npy(file) for file in part] for part in (files, label_files))
  return image_source(images, labels, str(root), num_classes)


def image_folder(
  path: Path, split: str = "train", size: int | None = None, num_classes: int | None = None
) -> ImageSource:
  """Image files in one folder for each class: `path`/[split/]class/.../file.png; classes by alphabet.

  `path`/train and `path`/test are the splits if they are there; otherwise all is 'train'.
  size: resize the shorter side to it and cut out the centre; needed when the images differ in size.
  Greyscale becomes RGB. Up to 2 GiB of images are decoded at once, more when they are asked for.
  """
  _check_split(split)
  root = _split_folder(_existing(path, "a folder with one folder of images for each class"), split)
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
  labels = np.repeat(np.arange(len(files)), [len(of_class) for of_class in files.values()])
  names, flat = tuple(files), [file for of_class in files.values() for file in of_class]
  shape = (size, size) if size else _common_extent(flat)
  images = Decoded(len(flat), (*shape, 3), lambda i: readers.decode_image(flat[i], str(flat[i]), size))
  return image_source([_decoded_now(images)], [labels], str(root), num_classes, names)


def cifar_binary(path: Path, split: str = "train") -> ImageSource:
  """CIFAR-10 or CIFAR-100 from its binary version: the folder, or the .tar.gz itself.

  A record is the label (CIFAR-100: coarse label, fine label; the fine one is used) and 3072 bytes, channel by
  channel.
  """
  _check_split(split)
  root = _existing(path, "cifar-10-batches-bin, cifar-100-binary or their .tar.gz")
  ten, hundred = _CIFAR_FILES[split]
  members = readers.archive_members(
    root, [f"{name}.bin" for name in (*ten, hundred)] + ["batches.meta.txt", "fine_label_names.txt"]
  )
  names, head = (
    ([f"{name}.bin" for name in ten], 1) if f"{ten[0]}.bin" in members else ([f"{hundred}.bin"], 2)
  )
  meta = members.get("batches.meta.txt" if head == 1 else "fine_label_names.txt", b"").decode().split()
  images, labels = [], []
  for name in names:
    data = np.frombuffer(_member(members, name, root), np.uint8)
    if not len(data) or len(data) % (3072 + head):
      raise InputError(f"{root}, {name}: {len(data)} bytes; expected a multiple of {3072 + head}")
    records = data.reshape(-1, 3072 + head)
    images.append(_cifar_images(records[:, head:]))
    labels.append(records[:, head - 1].astype(np.int32))
  images, labels = [np.concatenate(images)], [np.concatenate(labels)]
  return image_source(images, labels, str(root), 10 if head == 1 else 100, meta)


def cifar_python(path: Path, split: str = "train") -> ImageSource:
  """CIFAR-10 or CIFAR-100 from its Python version: the folder, or the .tar.gz itself.

  The pickles are read by an unpickler that builds numpy arrays and plain containers and refuses all else.
  """
  _check_split(split)
  root = _existing(path, "cifar-10-batches-py, cifar-100-python or their .tar.gz")
  ten, hundred = _CIFAR_FILES[split]
  members = readers.archive_members(root, [*ten, hundred, "batches.meta", "meta"])
  is_ten = ten[0] in members
  names, label_key = (ten, "labels") if is_ten else ([hundred], "fine_labels")
  meta_file, meta_key = ("batches.meta", "label_names") if is_ten else ("meta", "fine_label_names")
  images, labels = [], []
  for name in names:
    content = readers.load_array_pickle(_member(members, name, root), f"{root}, {name}")
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
      raise InputError(f"{root}, {name}: expected 'data' uint8 [n, 3072] and '{label_key}'")
    images.append(_cifar_images(data))
    labels.append(np.asarray(content.get(label_key, [])))
  meta = readers.load_array_pickle(members[meta_file], f"{root}, {meta_file}") if meta_file in members else {}
  images, labels = [np.concatenate(images)], [np.concatenate(labels)]
  return image_source(images, labels, str(root), 10 if is_ten else 100, meta.get(meta_key, ()))


def tfds(
  name: str,
  data_dir: Path = "~/tensorflow_datasets",
  split: str = "train",
  size: int | None = None,
  download: bool = False,
  num_classes: int | None = None,
) -> ImageSource:
  """A data set that TensorFlow Datasets has prepared, without TensorFlow.

  name: e.g. 'cifar10', 'cifar10:3.0.2' or 'name/config'; `data_dir` holds it, or is its version folder.
  Reads the formats array_record and tfrecord. split: one of those the data set has; size: see `image_folder`.
  download: prepare it first, as array_record, if it is not there; needs a network, and for most data sets
    TensorFlow.
  """
  import tensorflow_datasets

  folder = _tfds_folder(name, pathlib.Path(data_dir).expanduser())
  if folder is None and download:
    folder = _tfds_prepare(tensorflow_datasets, name, data_dir)
  if folder is None:
    raise InputError(
      f"no prepared data set {name!r} below {data_dir}"
      f" (expected {name.split(':')[0]}/<version>/dataset_info.json);"
      " with a network, download=True prepares it"
    )
  builder = tensorflow_datasets.builder_from_directory(str(folder))
  if split not in builder.info.splits:
    raise InputError(f"unknown split {split!r}; {name} has {sorted(builder.info.splits)}")
  features = builder.info.features
  keys = builder.info.supervised_keys or ("image", "label")
  for key in keys:
    if key not in features:
      raise InputError(f"{folder} has features {sorted(features)}; expected an image and a label")
  image_key, label_key = keys
  encoded = isinstance(features[image_key], tensorflow_datasets.features.Image)
  shape, dtype = tuple(features[image_key].shape), features[image_key].np_dtype
  if len(shape) != 3 or shape[2] not in (1, 3) or dtype != np.uint8 or features[label_key].shape != ():
    raise InputError(
      f"{folder}: {image_key} {np.dtype(dtype)} {list(shape)}, {label_key} {list(features[label_key].shape)};"
      " expected images uint8 [h, w, 1 or 3] and one label for each"
    )
  if size and encoded:
    shape = (size, size, shape[2])
  if None in shape or size and shape[:2] != (size, size):
    raise InputError(
      f"the images of {name} "
      + ("differ in size; set size, e.g. size=64" if encoded else f"are {shape}; leave out size")
    )
  record = _tfds_records(tensorflow_datasets, builder, split, image_key if encoded else None)
  count = builder.info.splits[split].num_examples
  labels = np.array([record(i)[label_key] for i in range(count)])

  def decode(i: int) -> np.ndarray:
    value = record(i)[image_key]
    return (
      readers.decode_image(io.BytesIO(value), f"{folder}, image {i}", size, shape[2]) if encoded else value
    )

  images = Decoded(count, shape, decode)
  names = getattr(features[label_key], "names", ())
  return image_source([_decoded_now(images)], [labels], str(folder), num_classes, names)


def digits(split: str = "train") -> ImageSource:
  """The 1797 real 8x8 digits that come with scikit-learn: 1437 'train', 360 'test' (36 of each class).

  Values 0..16 become round(255 v / 16), in one channel. The order is one fixed permutation of the original,
  and the test images are the last of each class in it.
  """
  _check_split(split)
  from sklearn.datasets import load_digits

  bunch = load_digits()
  order = np.random.RandomState(0).permutation(len(bunch.target))  # this generator's stream never changes
  test = np.concatenate([np.flatnonzero(bunch.target[order] == digit)[-36:] for digit in range(10)])
  is_test = np.isin(np.arange(len(order)), test)
  images = np.round(bunch.images[order] * 255 / 16).astype(np.uint8)[..., None]
  whole = image_source([images], [bunch.target[order]], "digits", 10)
  return whole.select(np.flatnonzero(is_test == (split == "test")))


def npz_or_digits(path: Path = "", split: str = "train", num_classes: int | None = None) -> ImageSource:
  """`npz` of `path`, or the bundled digits where path is '': for smoke tests that must run anywhere."""
  return npz(path, split, num_classes) if path else digits(split)


SOURCES: dict[str, Callable[..., ImageSource]] = {
  "npz": npz,
  "npy": npy,
  "image_folder": image_folder,
  "cifar_binary": cifar_binary,
  "cifar_python": cifar_python,
  "tfds": tfds,
  "digits": digits,
  "npz_or_digits": npz_or_digits,
}


# ---- helpers: checks ----


def _checked_images(images, where: str):
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or images.shape[-1] > 4 or 0 in images.shape[1:]:
    raise InputError(
      f"{where}: images of shape {list(images.shape)}; expected [n, height, width, channels 1 to 4]"
    )
  if np.issubdtype(images.dtype, np.floating):
    return _bytes_from_unit(images, where)
  if images.dtype != np.uint8:
    raise InputError(f"{where}: images of type {images.dtype}; expected uint8, or floats in [0, 1]")
  return images


def _bytes_from_unit(images: np.ndarray, where: str) -> np.ndarray:
  out = np.empty(images.shape, np.uint8)
  rows = max(1, 2**24 // int(np.prod(images.shape[1:])))
  for start in range(0, len(images), rows):
    part = np.asarray(images[start : start + rows], np.float64)
    finite = np.isfinite(part).all((1, 2, 3))
    if not finite.all():
      bad = start + int(np.argmin(finite))
      raise InputError(
        f"{where}: image {bad} has values that are not finite (NaN or infinite); expected floats in [0, 1]"
      )
    if part.min() < 0 or part.max() > 1:
      raise InputError(
        f"{where}: float images in [{part.min():g}, {part.max():g}]; expected floats in [0, 1], or uint8"
      )
    out[start : start + rows] = np.round(part * 255)
  return out


def _checked_labels(labels: np.ndarray, where: str) -> np.ndarray:
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise InputError(
      f"{where}: labels of type {labels.dtype} and shape {list(labels.shape)}; expected integers [n]"
    )
  return labels


def _joined(images: list, where: str) -> np.ndarray | Rows:
  if len(images) == 1 and isinstance(images[0], np.ndarray) and not isinstance(images[0], np.memmap):
    return images[0]
  try:
    return Rows(images)
  except InputError as error:
    raise InputError(f"{where}: {error}") from error


# ---- helpers: files ----


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise InputError(f"unknown split {split!r}; there are 'train' and 'test'")


def _existing(path: Path, expected: str) -> pathlib.Path:
  if not str(path):
    raise InputError(f"this data set needs a path: {expected}")
  root = pathlib.Path(path).expanduser()
  if not root.exists():
    raise InputError(f"no such file or folder: {root} (expected {expected})")
  return root


def _natural(path: pathlib.Path) -> list:
  """Sort key with numbers in order: part_2 before part_10."""
  return [(0, int(text), "") if text.isdigit() else (1, 0, text) for text in re.split(r"(\d+)", path.name)]


def _split_files(root: pathlib.Path, pattern: str, split: str) -> list[pathlib.Path]:
  found = sorted(root.glob(pattern), key=_natural)
  named = [file for file in found if file.name.startswith(SPLITS)]
  files = [file for file in named if file.name.startswith(split)]
  if not named and split == "train":
    files = found
  if not files:
    names = ", ".join(file.name for file in found[:5]) or f"no {pattern}"
    raise InputError(f"{root} has no files {split}{pattern}; found {names}")
  return files


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
  """root/split, or `root` itself for 'train' if it is not divided into splits."""
  if (root / split).is_dir():
    return root / split
  if split == "train" and not (root / "test").is_dir():
    return root
  raise InputError(f"{root} has no folder {split}/ for the split '{split}'")


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


def _decoded_now(images: Decoded) -> Decoded | np.ndarray:
  """The decoded images if they are few enough to keep."""
  size = int(np.prod(images.shape, dtype=np.int64))
  return images[np.arange(len(images))] if size <= DECODE_AT_ONCE else images


# ---- helpers: CIFAR ----

_CIFAR_FILES = {  # split: (CIFAR-10, CIFAR-100)
  "train": ([f"data_batch_{i}" for i in range(1, 6)], "train"),
  "test": (["test_batch"], "test"),
}


def _member(members: dict[str, bytes], name: str, root: pathlib.Path) -> bytes:
  if name not in members:
    raise InputError(f"{root} has no {name}; expected the files of CIFAR-10 or CIFAR-100 as published")
  return members[name]


def _cifar_images(flat: np.ndarray) -> np.ndarray:
  """[n 3072], channel by channel, to [n 32 32 3]"""
  return np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


# ---- helpers: TFDS ----


def _tfds_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
  """The folder of the newest prepared version."""
  if (data_dir / "dataset_info.json").exists():
    return data_dir
  base, _, version = name.partition(":")
  found = [info.parent for info in (data_dir / base).glob("**/dataset_info.json")]
  found = [folder for folder in found if not version or folder.name == version]
  return max(found, key=_natural, default=None)


def _tfds_prepare(tensorflow_datasets, name: str, data_dir: Path) -> pathlib.Path:
  data_dir = str(pathlib.Path(data_dir).expanduser())
  try:
    builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
  except ImportError as error:
    raise InputError(f"preparing {name} needs TensorFlow (pip install tensorflow-cpu): {error}") from error
  except Exception as error:  # network, unknown name, manual download: TFDS has many kinds
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(f"cannot prepare {name}: {line}") from error
  return pathlib.Path(builder.data_path)


def _tfds_records(tensorflow_datasets, builder, split: str, encoded_key: str | None) -> Callable[[int], dict]:
  """Function from position to decoded record; the feature `encoded_key` stays encoded (bytes)."""
  decoders = {encoded_key: tensorflow_datasets.decode.SkipDecoding()} if encoded_key else None
  path = pathlib.Path(builder.data_path)
  kind = json.loads((path / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
  if kind == "array_record":
    return builder.as_data_source(split, decoders=decoders).__getitem__
  if kind != "tfrecord":
    raise InputError(
      f"{path} is stored as {kind}; prepare it again as array_record:"
      f" tfds.builder('{builder.name}', file_format='array_record').download_and_prepare()"
    )
  info = builder.info.splits[split]
  files = [pathlib.Path(file) for file in info.filepaths]
  for file in files:
    if not file.exists():
      raise InputError(f"{path} is incomplete: {file.name} is missing")
  records = readers.TFRecords(files)
  if len(records) != info.num_examples:
    raise InputError(f"{path}: {len(records)} records in the split '{split}', expected {info.num_examples}")
  return lambda i: builder.info.features.deserialize_example_np(records[i], decoders=decoders)
