"""The one form of a data set, `ImageSource`: uint8 images [n h w c], integer labels, ids; and parts of it."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jax_trustdiff.data.readers import Rows, detached
from jax_trustdiff.types import InputError

SPLITS = ("train", "test")
UNLABELLED = "unlabelled"  # the one class name of images without labels
SURE = 20  # expected images of a class: a fair draw then holds none of it with probability 2e-9

Positions = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Images with labels and ids.

  images: uint8 [n h w c], an array or `Rows`, which read memory-mapped files when indexed
  labels: int32 [n] in [0, num_classes)
  ids: int64 [n]; an image's position in its whole data set, the same after any selection
  soft_labels: float [n num_classes], rows that sum to 1, an array or `Rows`, where labels are not certain; usually None
  labelled: False for images of no known class, whose labels are all 0 and mean nothing
  key_id: names the string of bits that all images are marked with; '' where none is known
  """

  images: np.ndarray | Rows
  labels: np.ndarray
  ids: np.ndarray
  class_names: tuple[str, ...]
  num_classes: int
  soft_labels: np.ndarray | Rows | None = None
  labelled: bool = True
  key_id: str = ""

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
    """The records at these positions: {'image': uint8 [b h w c], 'label': int32 [b], 'id': int64 [b]}.

    With soft labels also 'soft_label': float32 [b num_classes].
    """
    indices = np.asarray(indices, np.int64)
    found = {"image": self.images[indices], "label": self.labels[indices], "id": self.ids[indices]}
    if self.soft_labels is not None:
      found["soft_label"] = np.asarray(self.soft_labels[indices], np.float32)
    return found

  def select(self, indices: Positions) -> "ImageSource":
    """The source of these rows, in this order; ids stay. Memory-mapped images are not read."""
    indices = np.asarray(indices, np.int64)

    def chosen(rows):
      return rows.select(indices) if isinstance(rows, Rows) else rows[indices]

    parts = {"images": chosen(self.images), "labels": self.labels[indices], "ids": self.ids[indices]}
    if self.soft_labels is not None:
      parts["soft_labels"] = chosen(self.soft_labels)
    return dataclasses.replace(self, **parts)


def image_source(
  images: Iterable,
  labels: Iterable[np.ndarray],
  where: str,
  num_classes: int = 0,
  class_names: Sequence[str] = (),
) -> ImageSource:
  """An ImageSource of checked parts; `where` names them in error messages.

  Parts that are memory maps are let go one by one: given by generators, no more than one file is open.
  images: parts uint8 [n h w c], or [n h w] for one channel, or floats in [0, 1] (become round(255 x))
  labels: parts of integers [n] or [n 1], one for each part of images
  num_classes: 0 is the number of class names, or without names the largest label plus one
  class_names: one for each class; without them the classes are called '0', '1', ...
  """
  images = [detached(_checked_images(part, where)) for part in images]
  labels = [np.array(_checked_labels(part, where)) for part in labels]
  for image_part, label_part in zip(images, labels, strict=True):
    if len(image_part) != len(label_part):
      raise InputError(
        f"{where}: {len(image_part)} images and {len(label_part)} labels; expected as many of both"
      )
  labels = np.concatenate(labels)
  if not len(labels):
    raise InputError(f"{where}: no images")
  if num_classes < 0 or class_names and num_classes not in (0, len(class_names)):
    expected = f"{len(class_names)}, as it has names," if class_names else "a positive number"
    raise InputError(f"{where}: num_classes={num_classes}; expected {expected} or 0 (what the data say)")
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


def unlabelled(images: np.ndarray, what: str) -> ImageSource:
  """A source of images, uint8 [n h w c], of no known class; `what` names them in an InputError."""
  source = image_source([images], [np.zeros(len(images), np.int32)], what, 1, (UNLABELLED,))
  return dataclasses.replace(source, labelled=False)


def check_split(split: str) -> None:
  """InputError unless `split` is 'train' or 'test'."""
  if split not in SPLITS:
    raise InputError(f"unknown split {split!r}; there are 'train' and 'test'")


def agreed_names(
  found: Sequence[str], of_train: Sequence[str], where: str, whose: str = "the training split"
) -> tuple[str, ...]:
  """The class names `found` in a split, or those `of_train`; InputError if both are there and differ.

  where, whose: the words of its message for the one and the other.
  """
  if not found or not of_train:
    return tuple(of_train or found)
  if len(found) != len(of_train):
    raise InputError(f"{where}: {len(found)} classes; expected the {len(of_train)} of {whose}")
  for i, (name, expected) in enumerate(zip(found, of_train, strict=True)):
    if name != expected:
      raise InputError(f"{where}: class {i} is {name!r}; in {whose} it is {expected!r}")
  return tuple(found)


def given_names(source: ImageSource) -> tuple[str, ...]:
  """The class names of a source, () where they are only the numbers of the classes."""
  return () if source.class_names == tuple(map(str, range(source.num_classes))) else source.class_names


def check_labelled(source: ImageSource, advice: str = "label them with label_generated.py") -> None:
  """InputError for images without labels, whose labels must not be taken for those of class 0."""
  if not source.labelled:
    raise InputError(f"the images have no labels: {advice}")


def of_classes(source: ImageSource, num_classes: int) -> ImageSource:
  """Images without labels as images of so many classes, which they are yet to be given."""
  names = tuple(map(str, range(num_classes)))
  return dataclasses.replace(source, class_names=names, num_classes=num_classes)


def check_alike(train: ImageSource, test: ImageSource) -> None:
  """InputError unless both splits have the same image shape, number of classes and class names."""
  if train.image_shape != test.image_shape:
    raise InputError(
      f"the images of the training split are {list(train.image_shape)} and those of the test split"
      f" {list(test.image_shape)}; expected one shape"
    )
  if train.num_classes != test.num_classes:
    raise InputError(
      f"the training split has {train.num_classes} classes and the test split {test.num_classes};"
      " expected the same classes"
    )
  agreed_names(test.class_names, train.class_names, "the test split")


# ---- parts of a source ----


def split_validation(
  source: ImageSource, num: int, how: str = "first", seed: int = 0
) -> tuple[ImageSource, ImageSource]:
  """(training source, validation source of `num` examples).

  how: 'first' takes the first `num` in file order, as the adversarial-training literature does with 1024 of
  CIFAR-10; 'random' takes `num` positions drawn with `seed`, and keeps both parts in file order.
  InputError if a class loses all its images to one of the parts: if none is left for training, or if the
  validation part holds none although a fair draw would hold 20 or more (file order that is sorted by class).
  """
  if how not in ("first", "random"):
    raise InputError(f"unknown validation split {how!r}; there are 'first' and 'random'")
  if not 0 <= num < len(source):
    raise InputError(f"{num} validation examples of {len(source)}: 0 to {len(source) - 1} are possible")
  held_out = np.zeros(len(source), bool)
  held_out[_first_or_drawn(len(source), num, None if how == "first" else seed)] = True
  train, validation = source.select(np.flatnonzero(~held_out)), source.select(np.flatnonzero(held_out))
  for part, name, absent in (
    (train, "training", _absent(source, train, 0)),
    (validation, "validation", _absent(source, validation, SURE)),
  ):
    if absent is not None:
      advice = "choose the validation split 'random'" if how == "first" else "take fewer validation images"
      raise InputError(
        f"the {name} part has {len(part)} of {len(source)} images and none of class {absent}, when the {how}"
        f" {num} are for validation; {advice}, or shuffle the data"
      )
  return train, validation


def first(source: ImageSource, num: int) -> ImageSource:
  """The first `num` images, or all where there are no more or num is 0; whatever their classes are (see `limit`)."""
  return source.select(np.arange(min(num, len(source)))) if num else source


def limit(source: ImageSource, num: int, seed: int | None = None) -> ImageSource:
  """The first `num` examples, or `num` drawn with `seed` (in file order); all if there are no more.

  InputError if a class is absent of which a fair draw would hold 20 or more (file order sorted by class).
  """
  if num < 1:
    raise InputError(f"a source of {num} examples; at least 1 is needed")
  if num >= len(source):
    return source
  part = source.select(np.sort(_first_or_drawn(len(source), num, seed)))
  absent = _absent(source, part, SURE)
  if absent is not None:
    raise InputError(
      f"the first {num} of {len(source)} images hold none of class {absent}: they are sorted by class;"
      " shuffle the data, or take all images"
    )
  return part


# ---- helpers ----


def _first_or_drawn(count: int, num: int, seed: int | None) -> np.ndarray:
  """Positions of the first `num`, or `num` drawn with `seed` from a generator whose stream never changes."""
  return np.arange(num) if seed is None else np.random.RandomState(seed).permutation(count)[:num]


def _absent(whole: ImageSource, part: ImageSource, expected: int) -> str | None:
  """A class without images in `part` of which a fair draw of that size would hold `expected` or more."""
  of_whole, of_part = (np.bincount(source.labels, minlength=whole.num_classes) for source in (whole, part))
  fair = of_whole * (len(part) / len(whole))
  absent = np.flatnonzero((of_whole > 0) & (of_part == 0) & (fair >= expected))
  return f"{whole.class_names[absent[0]]!r} (label {absent[0]})" if len(absent) else None


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
