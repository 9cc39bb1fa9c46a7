"""Reads the tensors of a torch checkpoint (.pt, .pth) without torch and without executing anything.

A checkpoint is a pickle, and a pickle can call any function. This reader resolves only the few names
that a checkpoint of tensors needs, to functions of its own; every other name is an InputError that
says which one was refused.
"""

import io
import math
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jax_trustdiff.interop.pickle_data import BROKEN, Function, check_key, load, one_line
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
LARGEST_GROWTH = 4  # tensors may hold this many times the bytes of their file, and LARGEST_EXPANSION more
LARGEST_EXPANSION = 4 * LARGEST_EXPANDED
LARGEST_RANK, LARGEST_INT = 32, 2**62


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
    tree = _read_zip(path) if zipfile.is_zipfile(path) else read_legacy(path.read_bytes())
    return to_arrays(tree, path.stat().st_size)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except BROKEN as error:
    reason = one_line(str(error)) or type(error).__name__
    raise InputError(f"{path}: not a torch checkpoint, or truncated ({reason})") from None


class StorageType(NamedTuple):
  """Stands for a class such as torch.FloatStorage."""

  dtype: np.dtype


class Storage:
  """Stands for a storage of `size` values; `values` is None until they are read, `swapped` if their bytes are."""

  def __init__(self, dtype: np.dtype, size: int):
    self.dtype, self.size = dtype, size
    self.values: np.ndarray | None = None
    self.swapped = False


class Tensor(NamedTuple):
  """Stands for a tensor: a view of a storage."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> Tensor:
  if type(storage) is not Storage:
    raise InputError(f"a tensor without a storage ({one_line(storage)})")
  numbers = (offset, *shape, *strides)
  if len(numbers) > 2 * LARGEST_RANK + 1 or not all(type(n) is int and abs(n) < LARGEST_INT for n in numbers):
    raise InputError(f"a tensor whose shape is not up to {LARGEST_RANK} integers")
  if min(numbers) < 0 or len(shape) != len(strides):
    raise InputError(f"a tensor with offset {offset}, shape {shape}, strides {strides}")
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if 0 not in shape and last >= storage.size:
    raise InputError(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} values")
  if math.prod(shape) > max(storage.size, LARGEST_EXPANDED):
    raise InputError(f"a tensor of shape {shape} repeats a storage of only {storage.size} values")
  return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_) -> Any:
  return data


def _size(sizes=()) -> tuple:
  return tuple(_list(sizes))


def _ordered_dict(pairs=()) -> dict:
  return {check_key(key): value for key, value in map(_list, _list(pairs))}


def _list(value: Any) -> list | tuple:
  """`value` if it is a list or a tuple, whose length `load` counts when it is an argument."""
  if type(value) not in (list, tuple):
    raise InputError(f"refused: items of a {type(value).__name__}; expected a list")
  return value


STORAGE_TYPES = {("torch", name): StorageType(dtype) for name, dtype in DTYPES.items()}
TENSOR_NAMES: dict[tuple[str, str], Any] = {
  ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_tensor"): Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_parameter"): Function(_rebuild_parameter),
  ("torch", "Size"): Function(_size),
  ("collections", "OrderedDict"): Function(_ordered_dict),
}


def read_legacy(data: bytes, names: Mapping[tuple[str, str], Any] = TENSOR_NAMES) -> Any:
  """The object in the older format, with `Tensor` and `Storage` in it (see `to_arrays`).

  Five pickles in a row (magic, protocol, system, object, storage keys), then the storages' bytes. They are not
  copied. names: what the object may name besides the types of storages.
  """
  file = io.BytesIO(data)
  magic, protocol, _ = (load(file, {}) for _ in range(3))
  if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
    raise InputError("not a torch checkpoint: neither a zip file nor the older format")
  storages: dict[str, Storage] = {}

  def load_storage(identifier: Any) -> Storage:
    kind, key, _, size, *view = _storage_fields(identifier)
    if view != [None]:
      raise InputError("a storage that is a view of another one; such files (torch < 0.4) are not read")
    return storages.setdefault(key, Storage(kind.dtype, size))

  tree = load(file, {**names, **STORAGE_TYPES}, load_storage)
  for key in load(file, {}):
    (size,) = struct.unpack("<q", file.read(8))
    storage = storages[_text(key)]
    if size != storage.size:
      raise InputError(f"storage {one_line(key)} holds {size} values, the tensors expect {storage.size}")
    start = file.tell()
    end = start + size * storage.dtype.itemsize
    storage.values = _values(storage, memoryview(data)[start:end])
    file.seek(end)
  return tree


def _read_zip(path: pathlib.Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.split("/")[-1] == "data.pkl"]
    if len(roots) != 1:
      raise InputError("a zip file without data.pkl; expected a torch checkpoint (not TorchScript, not .npz)")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
      raise InputError("a compressed zip file; torch writes its checkpoints uncompressed")
    root = roots[0]
    if f"{root}constants.pkl" in names:
      raise InputError("a TorchScript archive holds code; save a state_dict instead")
    return read_archive(archive, root, TENSOR_NAMES | STORAGE_TYPES)


def read_archive(archive: zipfile.ZipFile, root: str, names: Mapping[tuple[str, str], Any]) -> Any:
  """The object in `root`data.pkl with `Tensor` and `Storage` in it (see `to_arrays`). names: what it may name."""
  byteorder = f"{root}byteorder"
  is_big = byteorder in archive.namelist() and archive.read(byteorder) == b"big"
  data: dict[str, bytes] = {}  # read once, however many storages are said to be in it
  storages: dict[tuple, Storage] = {}

  def load_storage(identifier: Any) -> Storage:
    kind, key, _, size, *_ = _storage_fields(identifier)
    if (key, kind, size) not in storages:
      if key not in data:
        data[key] = archive.read(f"{root}data/{key}")
      storage = Storage(kind.dtype, size)
      storage.values, storage.swapped = _values(storage, data[key]), is_big
      storages[key, kind, size] = storage
    return storages[key, kind, size]

  return load(io.BytesIO(archive.read(f"{root}data.pkl")), names, load_storage)


def _storage_fields(identifier: Any) -> tuple:
  """(StorageType, key, location, size, ...) of the identifier of a storage; InputError for any other."""
  if type(identifier) is not tuple or len(identifier) < 5 or identifier[0] not in ("storage", b"storage"):
    raise InputError(f"refused: the file refers to an object outside it ({one_line(identifier)})")
  _, kind, key, _, size, *_ = identifier
  if type(kind) is not StorageType or type(size) is not int or not 0 <= size < LARGEST_INT:
    raise InputError("refused: a storage of an unknown type or an impossible size")
  _text(key)
  return identifier[1:]


def _text(value: Any) -> str:
  if type(value) is not str:
    raise InputError(f"refused: a storage whose key is a {type(value).__name__}")
  return value


def _values(storage: Storage, data: bytes | memoryview) -> np.ndarray:
  if len(data) < storage.size * storage.dtype.itemsize:
    raise InputError(
      f"truncated: a storage of {storage.size} {storage.dtype} values has only {len(data)} bytes"
    )
  return np.frombuffer(data, storage.dtype, storage.size)


def to_arrays(tree: Any, file_size: int, expansion: int = LARGEST_EXPANSION) -> Any:
  """`tree` with its tensors as arrays that share no memory with the file, of `file_size` bytes.

  InputError, before there is any array, if they are out of proportion to the file: many expanded tensors, or views of
  one storage, that take more than LARGEST_GROWTH times its bytes and `expansion` bytes.
  """
  if _num_bytes(tree) > LARGEST_GROWTH * file_size + expansion:
    raise InputError(f"refused: tensors that hold far more than the {file_size} bytes of the file")
  done: dict[int, Any] = {}  # by identity: containers that hold each other many times are walked once

  def convert(node: Any) -> Any:
    if type(node) not in (Tensor, Storage, dict, list, tuple):
      return node
    if id(node) not in done:
      if type(node) is Tensor:
        done[id(node)] = _array(node)
      elif type(node) is dict:
        done[id(node)] = {key: convert(value) for key, value in node.items()}
      elif type(node) is not Storage:
        done[id(node)] = type(node)([convert(value) for value in node])
      else:
        raise InputError("a storage outside a tensor")
    return done[id(node)]

  return convert(tree)


def _num_bytes(tree: Any) -> int:
  """Bytes of all tensors in `tree` as arrays of their own."""
  total, seen, waiting = 0, set(), [tree]
  while waiting:
    node = waiting.pop()
    if type(node) not in (Tensor, dict, list, tuple) or id(node) in seen:
      continue
    seen.add(id(node))
    if type(node) is Tensor:
      total += math.prod(node.shape) * node.storage.dtype.itemsize
    else:
      waiting.extend(node.values() if type(node) is dict else node)
  return total


def _array(tensor: Tensor) -> np.ndarray:
  storage = tensor.storage
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, storage.dtype)
  if storage.values is None:
    raise InputError("truncated: a storage without values")
  strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
  view = np.lib.stride_tricks.as_strided(storage.values[tensor.offset :], tensor.shape, strides)
  array = np.array(view, order="C")
  return array.byteswap() if storage.swapped else array
