"""Reads the tensors of a TorchScript archive (torch.jit.save) without torch and without executing anything.

Such an archive holds a module with the code of its classes. The code is not looked at: the tensors are taken from the
modules' attributes.
"""

import pathlib
import zipfile
from typing import Any

import numpy as np

from jax_trustdiff.interop.pickle_data import BROKEN, Function, Stateful, one_line
from jax_trustdiff.interop.torch_reader import (
  STORAGE_TYPES,
  TENSOR_NAMES,
  Tensor,
  read_archive,
  to_arrays,
)
from jax_trustdiff.types import InputError

CODE = "__torch__"  # the package of the classes in an archive
LISTS = {
  ("torch.jit._pickle", f"build_{kind}list"): Function(lambda values: values)
  for kind in ("int", "double", "bool")
}
DEEPEST = 50  # modules in modules


def read_torchscript(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of the module in an archive by name: 'net.layers.conv.weight', in the order of its attributes.

  Tensors are attributes of the module or of modules in it; those in lists or in the table of constants (a frozen
  module's) are not read. Raises InputError when the file is missing, truncated, no such archive, or names anything
  but classes of its own, tensors and plain containers; nothing is executed in any case.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path}: no such file; expected a TorchScript archive (.pt)")
  try:
    module = _read_module(path)
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors, set(), 0)
    return to_arrays(tensors, path.stat().st_size)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  except BROKEN as error:
    reason = one_line(str(error)) or type(error).__name__
    raise InputError(f"{path}: not a TorchScript archive, or truncated ({reason})") from None


def is_torchscript(path: str | pathlib.Path) -> bool:
  """Whether the file is a zip archive with a table of constants, as torch.jit.save writes and torch.save does not."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())


class _Module(Stateful):
  """Stands for a module, whatever its class."""

  def __init__(self):
    self.attributes: dict[str, Any] | None = None

  def set_state(self, state: Any) -> None:
    if self.attributes is not None or type(state) is not dict:
      raise InputError("refused the state of a module; expected its attributes, once")
    self.attributes = state


class _Names(dict):
  """The names of tensors and containers, and every class whose code the archive holds: a _Module."""

  def __contains__(self, key: object) -> bool:
    return super().__contains__(key) or key[0].split(".")[0] == CODE

  def __missing__(self, key: tuple[str, str]) -> Function:
    return Function(_Module)


def _read_module(path: pathlib.Path) -> _Module:
  with zipfile.ZipFile(path) as archive:
    roots = [
      name.removesuffix("constants.pkl")
      for name in archive.namelist()
      if name.split("/")[-1] == "constants.pkl"
    ]
    if len(roots) != 1:
      raise InputError("a zip file without constants.pkl; expected a TorchScript archive")
    (root,) = roots
    read = [info for info in archive.infolist() if not info.filename.startswith(f"{root}code/")]
    if any(info.compress_type != zipfile.ZIP_STORED for info in read):
      raise InputError("a compressed archive; torch compresses only the code")
    module = read_archive(archive, root, _Names(TENSOR_NAMES | STORAGE_TYPES | LISTS))
  if type(module) is not _Module:
    raise InputError(f"expected a module, found a {type(module).__name__}")
  return module


def _collect(module: _Module, prefix: str, tensors: dict[str, Tensor], seen: set[int], depth: int) -> None:
  """Adds the tensors of a module and of those in it."""
  if id(module) in seen or depth > DEEPEST:
    raise InputError(f"refused: a module in two places, or more than {DEEPEST} modules in each other")
  seen.add(id(module))
  for name, value in (module.attributes or {}).items():
    if type(value) is Tensor:
      tensors[f"{prefix}{name}"] = value
    elif type(value) is _Module:
      _collect(value, f"{prefix}{name}.", tensors, seen, depth + 1)
