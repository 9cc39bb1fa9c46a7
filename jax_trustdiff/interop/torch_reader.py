"""Reads the tensors of a torch checkpoint (.pt, .pth) without torch and without executing anything.

A checkpoint is a pickle, and a pickle can call any function. This reader resolves only the few names
that a checkpoint of tensors needs, to functions of its own; every other name is an InputError that
says which one was refused.
"""

import collections
import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_trustdiff.types import InputError

DTYPES = {
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "BoolStorage": np.dtype(np.bool_),
  "ByteStorage": np.dtype(np.uint8),
  "CharStorage": np.dtype(np.int8),
  "ComplexDoubleStorage": np.dtype(np.complex128),
  "ComplexFloatStorage": np.dtype(np.complex64),
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "IntStorage": np.dtype(np.int32),
  "LongStorage": np.dtype(np.int64),
  "ShortStorage": np.dtype(np.int16),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
LARGEST_EXPANDED = 2**26  # values of an expanded tensor; a larger one is taken for an attack on the memory
BROKEN = (
  pickle.UnpicklingError,
  zipfile.BadZipFile,
  struct.error,
  ArithmeticError,
  AttributeError,
  EOFError,
  LookupError,
  MemoryError,
  NotImplementedError,
  RecursionError,
  TypeError,
  UnicodeError,
  ValueError,
)


def read_torch(path: str | pathlib.Path) -> Any:
  """The object in a torch checkpoint, its tensors and parameters as numpy arrays.

  Usually nested dicts: a state_dict, or a checkpoint that holds one. Both file formats are read (the
  zip of torch >= 1.6 and the older one). bfloat16 tensors have the dtype of `ml_dtypes`.
  Raises InputError when the file is missing, truncated, not a checkpoint, or names anything but
  tensors, parameters and plain containers; nothing is executed in any case.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path}: no such file; expected a torch checkpoint (.pt or .pth)")
  try:
    if zipfile.is_zipfile(path):
      return _read_zip(path)
    with path.open("rb") as file:
      return _read_legacy(file)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except BROKEN as error:
    raise InputError(
      f"{path}: not a torch checkpoint, or truncated ({error or type(error).__name__})"
    ) from None


# The stand-ins are named tuples because pickle can set attributes of other objects.


class _StorageType(NamedTuple):
  """Stands for a class such as torch.FloatStorage."""

  dtype: np.dtype


class _Storage(NamedTuple):
  """Stands for a storage; its values are read apart."""

  key: str
  dtype: np.dtype
  size: int


class _Tensor(NamedTuple):
  """Stands for a tensor: a view of a storage."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Function(NamedTuple):
  """Stands for a function or class that the pickle calls."""

  function: Callable

  def __call__(self, *args):
    return self.function(*args)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
  tensor = _Tensor(storage, offset, tuple(shape), tuple(strides))
  if not isinstance(storage, _Storage):
    raise InputError(f"a tensor without a storage ({type(storage).__name__})")
  if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides)) or len(shape) != len(strides):
    raise InputError(f"a tensor with offset {offset}, shape {shape}, strides {strides}")
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if 0 not in shape and last >= storage.size:
    raise InputError(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} values")
  if math.prod(shape) > max(storage.size, LARGEST_EXPANDED):
    raise InputError(f"a tensor of shape {shape} repeats a storage of only {storage.size} values")
  return tensor


def _rebuild_parameter(data, *_) -> Any:
  return data


ALLOWED: dict[tuple[str, str], Any] = {
  ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
  ("torch", "Size"): _Function(tuple),
  ("collections", "OrderedDict"): _Function(collections.OrderedDict),
  **{("torch", name): _StorageType(dtype) for name, dtype in DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Builds plain containers and the stand-ins above; knows no other name."""

  def __init__(self, file: io.BufferedIOBase, load_storage: Callable[[tuple], _Storage] | None = None):
    super().__init__(file, encoding="utf-8")
    self._load_storage = load_storage

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
      raise InputError(
        f"refused: the file names {module}.{name}; only tensors, parameters and plain containers are read "
        "(save a state_dict instead of a whole object)"
      )
    return ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    if self._load_storage is None or not isinstance(pid, tuple) or pid[:1] != ("storage",):
      raise InputError(f"refused: the file refers to an object outside it, {str(pid)[:80]}")
    if not isinstance(pid[1], _StorageType) or not isinstance(pid[4], int) or pid[4] < 0:
      raise InputError(f"refused: a storage described as {str(pid)[:80]}")
    return self._load_storage(*pid[1:])


def _read_zip(path: pathlib.Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[-1] == "data.pkl"]
    if len(roots) != 1:
      raise InputError("a zip file without data.pkl; expected a torch checkpoint (not TorchScript, not .npz)")
    root = roots[0]
    if f"{root}constants.pkl" in names:
      raise InputError("a TorchScript archive holds code; save a state_dict instead")
    byteorder = f"{root}byteorder"
    order = ">" if byteorder in names and archive.read(byteorder) == b"big" else "<"
    values: dict[_Storage, np.ndarray] = {}

    def load_storage(kind: _StorageType, key: str, _, size: int) -> _Storage:
      storage = _Storage(key, kind.dtype, size)
      if storage not in values:
        values[storage] = _values(storage, archive.read(f"{root}data/{key}"), order)
      return storage

    tree = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), load_storage).load()
    return _to_arrays(tree, values)


def _read_legacy(file: io.BufferedIOBase) -> Any:
  """Five pickles in a row (magic, protocol, system, object, storage keys), then the storages' bytes."""
  magic, protocol, _ = (_Unpickler(file).load() for _ in range(3))
  if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
    raise InputError("not a torch checkpoint: neither a zip file nor the older format")
  storages: dict[str, _Storage] = {}

  def load_storage(kind: _StorageType, key: str, _, size: int, view: Any) -> _Storage:
    if view is not None:
      raise InputError("a storage that is a view of another one; such files (torch < 0.4) are not read")
    return storages.setdefault(key, _Storage(key, kind.dtype, size))

  tree = _Unpickler(file, load_storage).load()
  values: dict[_Storage, np.ndarray] = {}
  for key in _Unpickler(file).load():
    (size,) = struct.unpack("<q", file.read(8))
    storage = storages[key]
    if size != storage.size:
      raise InputError(f"storage {key} holds {size} values, the tensors expect {storage.size}")
    values[storage] = _values(storage, file.read(size * storage.dtype.itemsize), "<")
  return _to_arrays(tree, values)


def _values(storage: _Storage, data: bytes, order: str) -> np.ndarray:
  if len(data) < storage.size * storage.dtype.itemsize:
    raise InputError(
      f"truncated: a storage of {storage.size} {storage.dtype} values has only {len(data)} bytes"
    )
  values = np.frombuffer(data, storage.dtype, storage.size)
  return values.byteswap() if order == ">" else values


def _to_arrays(tree: Any, values: dict[_Storage, np.ndarray]) -> Any:
  if isinstance(tree, _Tensor):
    if 0 in tree.shape:
      return np.zeros(tree.shape, tree.storage.dtype)
    strides = [stride * tree.storage.dtype.itemsize for stride in tree.strides]
    view = np.lib.stride_tricks.as_strided(values[tree.storage][tree.offset :], tree.shape, strides)
    return np.array(view, order="C")
  if isinstance(tree, dict):
    return {key: _to_arrays(value, values) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return type(tree)([_to_arrays(value, values) for value in tree])
  return tree
