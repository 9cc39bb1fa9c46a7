"""Variables of a network from a file of ours or of torch, and the file that torch reads."""

import dataclasses
import os
import pathlib
from typing import Any

from jax_trustdiff.interop import export, safetensors_io
from jax_trustdiff.interop.torch_names import from_torch, to_torch
from jax_trustdiff.interop.torch_reader import read_torch
from jax_trustdiff.types import Classifier, InputError, Variables

READERS = {".pt": read_torch, ".pth": read_torch, ".safetensors": safetensors_io.load_flat}
FREE = ("dtype", "remat", "bn_groups")  # fields that do not change what a network computes from its variables


def load_variables(path: str | os.PathLike, network: Classifier) -> tuple[Variables, dict[str, Any] | None]:
  """(variables for `network` as numpy arrays, the model section stored with them or None) of an export or a torch file.

  path: the folder of an export, which must describe `network` in all fields but dtype, remat and bn_groups; or a
  file .pt, .pth or .safetensors with a state_dict under the names of `torch_names`, which tells neither activation
  nor, usually, mean and std: these are then taken to be those of `network`. Nothing in a .pt file is executed.
  Raises InputError, in one line, if there is nothing to read or it does not fit.
  """
  path = pathlib.Path(path)
  if path.is_dir() or path.suffix not in READERS:
    return _from_export(path, network)
  if path.name == export.ARRAYS and (path.parent / export.DESCRIPTION).is_file():
    raise InputError(f"{path} is part of an export: give the folder, {path.parent}")
  state_dict = READERS[path.suffix](path)
  try:
    return from_torch(network, state_dict), None
  except InputError as error:
    raise InputError(f"{path}: {error}") from None


def save_torch(path: str | os.PathLike, network: Classifier, variables: Variables):
  """Writes a .safetensors file for torch: `net.load_state_dict(safetensors.torch.load_file(path))`.

  Names and layouts are those of `torch_names`. There is no num_batches_tracked, which torch then sets to 0. Images
  must be normalised on the other side as `network` does it: mean and std are not in the file.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise InputError(f"{path}: the file for torch is a .safetensors file; choose a name with that ending")
  safetensors_io.save_flat(path, to_torch(network, variables))


def _from_export(path: pathlib.Path, network: Classifier) -> tuple[Variables, dict[str, Any]]:
  if not path.is_dir():
    kinds = ", ".join(READERS)
    raise InputError(f"{path}: expected the folder of an export, or a file with one of the endings {kinds}")
  stored, variables, meta = export.load_export(path)
  if differences := _differences(stored, network):
    raise InputError(f"{path} holds another network than the one described here: {'; '.join(differences)}")
  return variables, meta["model"]


def _differences(stored: Classifier, wanted: Classifier) -> list[str]:
  """'width is 2 there, 1 here' for each field that differs and changes what the network computes."""
  if type(stored) is not type(wanted):
    return [f"name is {type(stored).__name__} there, {type(wanted).__name__} here"]
  names = [field.name for field in dataclasses.fields(wanted) if field.name not in FREE]
  pairs = [(name, getattr(stored, name), getattr(wanted, name)) for name in names]
  return [f"{name} is {there!r} there, {here!r} here" for name, there, here in pairs if there != here]
