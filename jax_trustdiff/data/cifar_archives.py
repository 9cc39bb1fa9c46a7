"""CIFAR-10 and CIFAR-100 from the archives their authors publish: the binary and the Python version.

The Python version consists of pickles, and a pickle can call any function. This reader knows a few names,
which stand for functions of its own; every other one is an InputError that says what was refused.
"""

import io
import math
import pathlib
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_trustdiff.data import records
from jax_trustdiff.data.readers import existing
from jax_trustdiff.data.records import ImageSource, image_source
from jax_trustdiff.types import InputError

PIXELS = 3072  # bytes of an image: 32 x 32, channel by channel

_FILES = {  # split: (CIFAR-10, CIFAR-100)
  "train": ([f"data_batch_{i}" for i in range(1, 6)], "train"),
  "test": (["test_batch"], "test"),
}


def cifar_binary(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """CIFAR-10 or CIFAR-100 from its binary version: the folder, or the .tar.gz itself.

  A record is the label (CIFAR-100: coarse label, fine label; the fine one is used) and 3072 bytes, channel by
  channel.
  num_classes: 10 or 100, as the archive has, or 0 for either. class_names: those of the training split.
  """
  records.check_split(split)
  root = existing(path, "cifar-10-batches-bin, cifar-100-binary or their .tar.gz")
  ten, hundred = _FILES[split]
  members = archive_members(
    root, [f"{name}.bin" for name in (*ten, hundred)] + ["batches.meta.txt", "fine_label_names.txt"]
  )
  is_ten = f"{ten[0]}.bin" in members
  names, head = ([f"{name}.bin" for name in ten], 1) if is_ten else ([f"{hundred}.bin"], 2)
  meta = members.get("batches.meta.txt" if is_ten else "fine_label_names.txt", b"").decode("latin1").split()
  images, labels = [], []
  for name in names:
    data = np.frombuffer(_member(members, name, root), np.uint8)
    if not len(data) or len(data) % (PIXELS + head):
      raise InputError(f"{root}, {name}: {len(data)} bytes; expected a multiple of {PIXELS + head}")
    rows = data.reshape(-1, PIXELS + head)
    images.append(rows[:, head:])
    labels.append(rows[:, head - 1].astype(np.int32))
  return _cifar(images, labels, root, is_ten, num_classes, records.agreed_names(meta, class_names, str(root)))


def cifar_python(
  path: str, num_classes: int = 0, *, split: str = "train", class_names: tuple[str, ...] = ()
) -> ImageSource:
  """CIFAR-10 or CIFAR-100 from its Python version: the folder, or the .tar.gz itself.

  Nothing that the pickles ask for is executed (see `load_array_pickle`).
  num_classes: 10 or 100, as the archive has, or 0 for either. class_names: those of the training split.
  """
  records.check_split(split)
  root = existing(path, "cifar-10-batches-py, cifar-100-python or their .tar.gz")
  ten, hundred = _FILES[split]
  members = archive_members(root, [*ten, hundred, "batches.meta", "meta"])
  is_ten = ten[0] in members
  names, label_key = (ten, "labels") if is_ten else ([hundred], "fine_labels")
  meta_file, meta_key = ("batches.meta", "label_names") if is_ten else ("meta", "fine_label_names")
  images, labels = [], []
  for name in names:
    content = load_array_pickle(_member(members, name, root), f"{root}, {name}")
    data, found = content.get("data"), content.get(label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,):
      raise InputError(f"{root}, {name}: expected 'data' uint8 [n, {PIXELS}] and '{label_key}'")
    if not _list_of(found, int) and not (isinstance(found, np.ndarray) and found.ndim == 1):
      raise InputError(f"{root}, {name}: expected '{label_key}', a list of integers")
    if len(data) != len(found):
      raise InputError(
        f"{root}, {name}: {len(data)} images and {len(found)} labels; expected as many of both"
      )
    images.append(data)
    labels.append(np.asarray(found))
  meta = []
  if meta_file in members:
    meta = load_array_pickle(members[meta_file], f"{root}, {meta_file}").get(meta_key)
    if not _list_of(meta, str):
      raise InputError(f"{root}, {meta_file}: expected '{meta_key}', a list of names")
  return _cifar(images, labels, root, is_ten, num_classes, records.agreed_names(meta, class_names, str(root)))


# ---- archives ----


def archive_members(root: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
  """{name: content} of those `names` that are in a folder (or one level below it) or in a tar archive."""
  if root.is_dir():
    found = {
      name: [file for file in (root / name, *sorted(root.glob(f"*/{name}"))) if file.is_file()]
      for name in names
    }
    return {name: files[0].read_bytes() for name, files in found.items() if files}
  try:
    with tarfile.open(root) as archive:
      members = [member for member in archive.getmembers() if member.isfile()]
      return {
        name: archive.extractfile(member).read()
        for member in members
        if (name := pathlib.PurePosixPath(member.name).name) in names
      }
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise InputError(f"{root} is neither a folder nor a complete tar archive: {error}") from error


# ---- pickles ----


def load_array_pickle(data: bytes, where: str) -> dict[str, Any]:
  """A pickled dictionary of numbers, strings, lists and numpy arrays of integers, keys as text.

  Whatever else the pickle asks for, any function or class, is refused before it is called. No object of numpy
  is within the pickle's reach: it builds stand-ins, which become arrays here once their contents are checked.
  """
  try:
    content = _Unpickler(io.BytesIO(data), encoding="latin1").load()  # encoding: of the strings of Python 2
  except InputError as error:
    raise InputError(f"{where}: {error}") from error
  except Exception as error:  # a damaged pickle can raise nearly anything
    raise InputError(f"{where} is no readable pickle: {type(error).__name__}: {error}") from error
  if type(content) is not dict:
    raise InputError(f"{where} holds a {type(content).__name__}; expected a dictionary")
  out = {}
  for key, value in content.items():
    if type(value) is _Array:
      if value.array is None:
        raise InputError(f"{where}: an array without contents")
      value = value.array
    if type(key) not in (str, bytes):
      raise InputError(f"{where}: a key of type {type(key).__name__}; expected text")
    out[key if type(key) is str else key.decode("latin1")] = value
  return out


# What a pickle holds it can call (REDUCE), fill (SETITEM, APPEND) and give a state (BUILD). The stand-ins
# accept a state through their `__setstate__` alone, once, and have neither items nor attributes to set.


class _Name(NamedTuple):
  """Stands for a class that the pickle may only mention."""

  name: str


class _Function(NamedTuple):
  """Stands for a function or class that the pickle calls."""

  function: Callable

  def __call__(self, *args):
    return self.function(*args)


class _DType:
  """Stands for a numpy dtype of integers: `code` such as 'u1', `order` its byte order."""

  __slots__ = ("code", "order")

  def __init__(self, code: str):
    self.code, self.order = code, None

  def __setstate__(self, state):
    if self.order is not None or type(state) is not tuple or len(state) != 8:
      raise InputError("refused the state of a dtype")
    version, order, *rest = state
    if version != 3 or order not in ("|", "<", ">") or rest != [None, None, None, -1, -1, 0]:
      raise InputError("refused the state of a dtype")
    self.order = order


class _Array:
  """Stands for a numpy array; `array` is its checked contents, read-only, or None before they came."""

  __slots__ = ("array",)

  def __init__(self):
    self.array = None

  def __setstate__(self, state):
    if self.array is not None or type(state) is not tuple or len(state) != 5:
      raise InputError("refused the state of an array")
    _, shape, dtype, fortran, data = state
    if type(dtype) is not _DType or dtype.order is None:
      raise InputError("refused an array of another type than integers")
    if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
      raise InputError("refused the shape of an array")
    dtype = np.dtype(dtype.order + dtype.code)
    data = data.encode("latin1") if type(data) is str else data
    if type(data) is not bytes or len(data) != math.prod(shape) * dtype.itemsize:
      raise InputError(f"refused an array of shape {shape} and type {dtype} whose bytes do not fit it")
    self.array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran is True else "C")


_NDARRAY = _Name("numpy.ndarray")


def _reconstruct(kind, shape, code) -> _Array:
  if kind is not _NDARRAY or shape != (0,):
    raise InputError("refused to build anything but an empty array")
  return _Array()


def _dtype(code, *flags) -> _DType:
  if type(code) is not str or not re.fullmatch("[iu][1248]", code) or [*map(type, flags)] not in _DTYPE_FLAGS:
    raise InputError(f"refused an array of type {str(code)[:20]!r}; only integers are read")
  return _DType(code)


_DTYPE_FLAGS = ([], [int, int], [bool, bool])  # align and copy, as older and newer numpy write them


def _encode(text, encoding) -> bytes:
  """How Python 3 writes bytes in a pickle for Python 2."""
  if type(text) is not str or encoding != "latin1":
    raise InputError("refused another encoding than latin1")
  return text.encode("latin1")


_ALLOWED = {
  ("numpy.core.multiarray", "_reconstruct"): _Function(_reconstruct),
  ("numpy._core.multiarray", "_reconstruct"): _Function(_reconstruct),
  ("numpy", "ndarray"): _NDARRAY,
  ("numpy", "dtype"): _Function(_dtype),
  ("_codecs", "encode"): _Function(_encode),
}


class _Unpickler(pickle.Unpickler):
  """Builds plain containers and the stand-ins above; knows no other name."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise InputError(
        f"refused to unpickle {module}.{name}: only numpy arrays and plain containers are read"
      )
    return _ALLOWED[module, name]


# ---- helpers ----


def _cifar(
  images: list[np.ndarray],
  labels: list[np.ndarray],
  root: pathlib.Path,
  is_ten: bool,
  num_classes: int,
  names: tuple[str, ...],
) -> ImageSource:
  classes = 10 if is_ten else 100
  if num_classes not in (0, classes):
    raise InputError(f"{root} is CIFAR-{classes}; num_classes={num_classes}, expected {classes} or 0")
  flat = np.concatenate(images)
  images = np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
  return image_source([images], [np.concatenate(labels)], str(root), classes, names)


def _member(members: dict[str, bytes], name: str, root: pathlib.Path) -> bytes:
  if name not in members:
    raise InputError(f"{root} has no {name}; expected the files of CIFAR-10 or CIFAR-100 as published")
  return members[name]


def _list_of(values, kind: type) -> bool:
  return type(values) is list and all(type(value) is kind for value in values)
