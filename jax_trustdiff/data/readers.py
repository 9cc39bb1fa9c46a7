"""Files to arrays: .npy and .npz mapped into memory, image files decoded.

Whatever is wrong with a file becomes an InputError that names it. Nothing here executes what it reads.
"""

import gzip
import io
import math
import os
import pathlib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib import format as npy_format

from jax_trustdiff.types import InputError, RunError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Nothing else is tried, whatever a file is called: Pillow would run Ghostscript for PostScript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
DECODE_AT_ONCE = 2 * 2**30  # bytes; encoded data sets up to this size are decoded when they are opened


class Rows:
  """Several arrays one after the other along the first axis, or chosen rows of them, read when asked for.

  Indexed by integer arrays or slices, which copies those rows. The parts stay where they are (memory maps,
  `Decoded` files), so memory holds what was asked for and no more.
  """

  def __init__(self, parts: Sequence, index: np.ndarray | None = None):
    shapes = sorted({f"{part.dtype} {list(part.shape[1:])}" for part in parts})
    if len(shapes) != 1:
      raise InputError(f"the parts of one data set must agree; found images {' and '.join(shapes)}")
    self.parts, self.index = [detached(part) for part in parts], index
    self.starts = np.cumsum([0] + [len(part) for part in parts])
    self.dtype = parts[0].dtype
    self.shape = (int(self.starts[-1]) if index is None else len(index), *parts[0].shape[1:])

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def __getitem__(self, rows) -> np.ndarray:
    rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
    if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
      raise IndexError(f"rows {rows.min()}..{rows.max()} of an array of {len(self)}")
    flat = rows.reshape(-1) if self.index is None else self.index[rows.reshape(-1)]
    if len(self.parts) == 1:
      out = _gather(self.parts[0], flat)
    else:
      part_of = np.searchsorted(self.starts, flat, side="right") - 1
      out = np.empty((flat.size, *self.shape[1:]), self.dtype)
      for part in np.unique(part_of):
        here = part_of == part
        out[here] = _gather(self.parts[part], flat[here] - self.starts[part])
    return out.reshape(*rows.shape, *self.shape[1:])

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return self[:].astype(dtype or self.dtype, copy=False)

  def select(self, rows: np.ndarray) -> "Rows":
    """These rows only, still unread."""
    return Rows(self.parts, np.asarray(rows) if self.index is None else self.index[rows])


class FileRows:
  """The rows of a memory-mapped array, read with `pread`: a part of `Rows`.

  Rows taken at random from a large map cost one page fault for every 4 KiB, with a read-ahead that is thrown
  away. One system call for each run of neighbouring rows reads the same bytes about ten times faster from a
  cold file, and other threads go on meanwhile. The file is open only while it is read: a data set may have more parts
  than a process may have open files. RunError if the file is no longer the one it was, or is gone.
  """

  def __init__(self, array: np.memmap):
    root = array
    while isinstance(root.base, np.ndarray):
      root = root.base
    self.path = root.filename
    self._identity = _identity(os.stat(self.path))
    self.offset = root.offset + array.ctypes.data - root.ctypes.data
    self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
    self.row_bytes = array.nbytes // len(array)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), *self.shape[1:]), self.dtype)
    view = memoryview(out.reshape(-1).view(np.uint8))
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    stops = np.append(starts, len(rows))[1:]
    try:
      with open(self.path, "rb", buffering=0) as file:
        if _identity(os.fstat(file.fileno())) != self._identity:
          raise RunError(f"{self.path} has changed since it was opened; start again with the file as it is")
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
          piece = view[start * self.row_bytes : stop * self.row_bytes]
          self._read(file, piece, self.offset + int(rows[start]) * self.row_bytes)
    except OSError as error:
      raise RunError(f"{self.path} can no longer be read: {error.strerror}") from error
    return out

  def _read(self, file, piece: memoryview, at: int) -> None:
    while piece:
      count = os.preadv(file.fileno(), [piece[: 2**30]], at)
      if not count:
        raise RunError(f"{self.path} became shorter while it was read; start again with the whole file")
      piece, at = piece[count:], at + count


def _identity(stat: os.stat_result) -> tuple[int, ...]:
  return stat.st_ino, stat.st_size, stat.st_mtime_ns


def detached(part):
  """A memory-mapped array as `FileRows`, which leaves no file open; any other part of `Rows` as it is."""
  mapped = isinstance(part, np.memmap) and part.flags.c_contiguous and len(part) > 0
  return FileRows(part) if mapped and hasattr(os, "preadv") else part


class Decoded:
  """Images that `decode(position)` makes when they are asked for: a part of `Rows`."""

  def __init__(self, length: int, image_shape: tuple[int, int, int], decode: Callable[[int], np.ndarray]):
    self.shape, self.dtype, self.ndim, self.decode = (length, *image_shape), np.dtype(np.uint8), 4, decode

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), *self.shape[1:]), np.uint8)
    for i, row in enumerate(rows):
      out[i] = self.decode(int(row))
    return out

  def now(self) -> "Decoded | np.ndarray":
    """All images decoded, if they are few enough to keep; else as before."""
    size = math.prod(self.shape)
    return self[np.arange(len(self))] if size <= DECODE_AT_ONCE else self


# ---- .npy and .npz ----

_BAD_NPY = (ValueError, TypeError, EOFError, OSError, SyntaxError, tokenize.TokenError, MemoryError)


def read_npy(file: pathlib.Path) -> np.ndarray:
  """The array of a .npy file, memory-mapped."""
  try:
    with open(file, "rb") as stream:
      return _map_npy(file, stream, file.stat().st_size)
  except _BAD_NPY as error:
    raise InputError(f"{file} is damaged or no plain array: {_line(error)}") from error


def npz_members(file: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
  """{key: function that returns the array}: uncompressed members are mapped, compressed ones are read."""
  try:
    with zipfile.ZipFile(file) as archive:
      infos = [info for info in archive.infolist() if info.filename.endswith(".npy")]
  except (zipfile.BadZipFile, EOFError, OSError) as error:
    raise InputError(f"{file} is not a complete .npz file: {error}") from error
  return {info.filename.removesuffix(".npy"): lambda info=info: _npz_array(file, info) for info in infos}


def _npz_array(file: pathlib.Path, info: zipfile.ZipInfo) -> np.ndarray:
  try:
    if info.compress_type != zipfile.ZIP_STORED:
      with zipfile.ZipFile(file) as archive, archive.open(info) as stream:
        return npy_format.read_array(stream, allow_pickle=False)
    with open(file, "rb") as stream:
      stream.seek(info.header_offset)
      local = stream.read(30)  # its name and extra field may differ in length from those in the directory
      name_length, extra_length = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
      stream.seek(name_length + extra_length, io.SEEK_CUR)
      return _map_npy(file, stream, stream.tell() + info.file_size)
  except (*_BAD_NPY, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
    raise InputError(
      f"{file}, member {info.filename}, is damaged or no plain array: {_line(error)}"
    ) from error


def _map_npy(file: pathlib.Path, stream, end: int) -> np.ndarray:
  """Memory map of the .npy data that lie in `file` from the position of `stream` to the byte `end`."""
  version = npy_format.read_magic(stream)
  read_header = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
  if version not in read_header:
    raise ValueError(f"npy format {version}")
  shape, fortran, dtype = read_header[version](stream)
  if dtype.hasobject:
    raise ValueError("it holds Python objects")
  if min(shape, default=0) < 0:
    raise ValueError(f"shape {shape}")
  start, size = stream.tell(), math.prod(shape) * dtype.itemsize
  found = min(end, file.stat().st_size) - start
  if found < size:
    raise ValueError(f"{size} bytes of data expected, {found} found: the file is cut short")
  if not size:
    return np.empty(shape, dtype)
  return np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")


# ---- image files ----


def read_idx(file: pathlib.Path, rank: int) -> np.ndarray:
  """uint8 array of `rank` axes in a file of the MNIST format, gzipped if its name ends in .gz.

  Two zero bytes, 8 for uint8, the rank, the extents as big-endian uint32, the values. InputError for anything else.
  """
  opened = gzip.open(file) if file.suffix == ".gz" else open(file, "rb")
  try:
    with opened as stream:
      header = stream.read(4 + 4 * rank)
      if header[:4] != bytes([0, 0, 8, rank]) or len(header) != 4 + 4 * rank:
        raise InputError(f"{file} is no idx file of bytes with {rank} axes")
      shape = [int(extent) for extent in np.frombuffer(header, ">u4", rank, 4)]
      size = math.prod(shape)
      values = bytearray()  # grows by what is there, whatever the header says
      while chunk := stream.read(min(2**20, size + 1 - len(values))):
        values += chunk
  except (OSError, EOFError, zlib.error) as error:
    raise InputError(f"{file} cannot be read: {error}") from None
  if len(values) != size:
    raise InputError(f"{file} holds another number of bytes than the {size} of its shape {shape}")
  return np.frombuffer(values, np.uint8).reshape(shape)


def decode_image(data, where: str, size: int = 0, channels: int = 3) -> np.ndarray:
  """uint8 [h w channels] of an encoded image (a path or a binary stream) in one of `IMAGE_FORMATS`.

  Greyscale becomes RGB if channels is 3, colour becomes greyscale if it is 1.
  size: the shorter side is resized to it (bicubic) and the centre size x size is cut out; 0 leaves the image.
  """
  from PIL import Image

  try:
    with Image.open(data, formats=IMAGE_FORMATS) as image:
      if image.mode.startswith("I") or image.mode == "F":
        raise InputError(f"{where}: image mode {image.mode} (16 or 32 bits); expected 8 bits a channel")
      image = image.convert("RGB" if channels == 3 else "L")
  except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"{where} cannot be read as an image: {error}") from error
  if size and image.size != (size, size):
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
  return np.asarray(image).reshape(image.height, image.width, channels)


def image_extent(file: pathlib.Path) -> tuple[int, int]:
  """(height, width) of an image file, from its header."""
  from PIL import Image

  try:
    with Image.open(file, formats=IMAGE_FORMATS) as image:
      return image.height, image.width
  except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
    raise InputError(f"{file} cannot be read as an image: {error}") from error


# ---- paths ----


def existing(path: str | pathlib.Path, expected: str) -> pathlib.Path:
  """`path` with ~ expanded; InputError that names what is `expected` if there is nothing."""
  if not str(path):
    raise InputError(f"this data set needs a path: {expected}")
  root = pathlib.Path(path).expanduser()
  if not root.exists():
    raise InputError(f"no such file or folder: {root} (expected {expected})")
  return root


def split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
  """root/split; root/val for 'test' without root/test; `root` itself for 'train' if it is not divided."""
  if (root / split).is_dir():
    return root / split
  held_out = [folder for folder in (root / "test", root / "val") if folder.is_dir()]
  if split == "test" and held_out:
    return held_out[0]
  if split == "train" and not held_out:
    return root
  raise InputError(f"{root} has no folder {split}/ for the split '{split}'")


def natural(path: pathlib.Path) -> list:
  """Sort key with numbers in order: part_2 before part_10."""
  return [(0, int(text), "") if text.isdecimal() else (1, 0, text) for text in re.split(r"(\d+)", path.name)]


# ---- helpers ----


def _line(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__


def _gather(part, rows: np.ndarray) -> np.ndarray:
  if (
    isinstance(part, np.ndarray) and part.flags.c_contiguous
  ):  # np.take would first copy any other layout whole
    return np.take(part.view(np.ndarray), rows, axis=0)
  return np.asarray(part[rows])
