"""Nested dicts of arrays <-> safetensors files with '.'-joined names."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from jax_trustdiff.types import InputError, PyTree


def flatten(tree: PyTree) -> dict[str, np.ndarray]:
  """The arrays of a nested dict by '.'-joined name, each contiguous; they are fetched from the devices.

  Raises InputError for a name that is not a string or contains '.', which would not come back.
  """
  flat = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names = [getattr(entry, "key", None) for entry in path]
    if not all(isinstance(name, str) and "." not in name for name in names):
      raise InputError(
        f"cannot be saved by name: {jax.tree_util.keystr(path)} (names are strings without '.')"
      )
    flat[".".join(names)] = np.asarray(leaf, order="C")
  return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """The nested dict whose '.'-joined names are the keys of `flat`; InputError if 'a' and 'a.b' are both there."""
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, leaf = name.split(".")
    node = tree
    for i, parent in enumerate(parents, 1):
      if ".".join(parents[:i]) in flat:
        raise InputError(f"{'.'.join(parents[:i])!r} is an array, and {name!r} would be inside it")
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def save(path: str | pathlib.Path, tree: PyTree):
  """Writes a nested dict of arrays; the file appears whole or not at all."""
  save_flat(path, flatten(tree))


def save_flat(path: str | pathlib.Path, arrays: dict[str, np.ndarray]):
  """Writes contiguous arrays by name; the file appears whole or not at all."""
  write_atomically(path, safetensors_numpy.save(arrays))


def load(path: str | pathlib.Path) -> dict[str, Any]:
  """The nested dict of numpy arrays in a file; InputError when it is missing, truncated or another format."""
  flat = load_flat(path)
  try:
    return unflatten(flat)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None


def load_flat(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a file by name; InputError when it is missing, truncated or another format."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path}: no such file; expected a .safetensors file")
  try:
    return safetensors_numpy.load_file(path)
  except (SafetensorError, OSError, ValueError) as error:
    raise InputError(f"{path}: not a safetensors file, or truncated ({error})") from None


def write_atomically(path: str | pathlib.Path, data: bytes):
  """Writes `data` to a temporary file beside `path`, flushes it to the disk and renames it."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
