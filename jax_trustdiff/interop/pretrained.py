"""Variables of a network from a file of ours or of torch, and the file that torch reads."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from jax_trustdiff.interop import (
  edm_names,
  edm_snapshot,
  export,
  network_weights,
  safetensors_io,
  torch_names,
  uvit_names,
)
from jax_trustdiff.interop.torch_reader import read_torch
from jax_trustdiff.models.registry import Network
from jax_trustdiff.models.uvit import UViT
from jax_trustdiff.types import Classifier, DiffusionNetwork, InputError, Variables

READERS = {".pt": read_torch, ".pth": read_torch, ".safetensors": safetensors_io.load_flat}
SNAPSHOT = ".pkl"
# Fields that do not change what a network computes from its variables in evaluation mode.
FREE = ("dtype", "remat", "bn_groups", "dropout", "label_dropout")


def load_variables(path: str | os.PathLike, network: Network) -> tuple[Variables, dict[str, Any] | None]:
  """(variables for `network` as numpy arrays, the model section stored with them or None) of an export or a torch file.

  path: the folder of an export or an EDM snapshot (.pkl), which must describe `network` in all fields but those in FREE;
  or a file .pt, .pth or .safetensors with a state_dict under the names of `torch_names` for classifiers, `edm_names` and
  `uvit_names` for diffusion networks. A state_dict of a classifier tells neither activation nor, usually, mean and std:
  these are then taken to be those of `network`. Nothing in a .pt or .pkl file is executed.
  Raises InputError, in one line, if there is nothing to read or it does not fit.
  """
  path = pathlib.Path(path)
  if path.is_dir() or path.suffix not in (*READERS, SNAPSHOT):
    return _from_export(path, network)
  if path.suffix == SNAPSHOT:
    return _from_snapshot(path, network)
  if path.name == export.ARRAYS and (path.parent / export.DESCRIPTION).is_file():
    raise InputError(f"{path} is part of an export: give the folder, {path.parent}")
  state_dict = READERS[path.suffix](path)
  try:
    return _from_state_dict(network, state_dict), None
  except InputError as error:
    raise InputError(f"{path}: {error}") from None


def save_torch(path: str | os.PathLike, network: Network, variables: Variables):
  """Writes a .safetensors file for torch: `net.load_state_dict(safetensors.torch.load_file(path))`.

  Names and layouts are those of `torch_names`, `edm_names` or `uvit_names`. For a classifier there is no
  num_batches_tracked, which torch then sets to 0; images must be normalised on the other side as `network` does it: mean
  and std are not in the file. For an EDM network there are no filters and no noise levels, which its constructor makes:
  load with strict=False.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise InputError(f"{path}: the file for torch is a .safetensors file; choose a name with that ending")
  safetensors_io.save_flat(path, _to_state_dict(network, variables))


def _from_state_dict(network: Network, state_dict: Any) -> Variables:
  _check_named(network)
  if isinstance(network, Classifier):
    return torch_names.from_torch(network, state_dict)
  if not isinstance(state_dict, dict) or not all(
    isinstance(value, np.ndarray) for value in state_dict.values()
  ):
    raise InputError("not a state_dict: expected tensors by name")
  if isinstance(network, UViT):
    return uvit_names.from_uvit(network, state_dict)
  # the networks of iDDPM, which alone have twice the channels, come with their denoiser's noise levels
  is_iddpm = network.out_channels == 2 * network.image_shape[-1]
  return edm_names.from_edm(network, state_dict, iddpm_levels=is_iddpm)


def _to_state_dict(network: Network, variables: Variables) -> dict[str, np.ndarray]:
  _check_named(network)
  if isinstance(network, Classifier):
    return torch_names.to_torch(network, variables)
  return uvit_names.to_uvit(variables) if isinstance(network, UViT) else edm_names.to_edm(variables)


def _check_named(network: Network) -> None:
  if not isinstance(network, (Classifier, DiffusionNetwork)):
    raise InputError(
      f"{type(network).__name__} has no names of torch: its variables are kept in exports alone"
    )


def _from_snapshot(path: pathlib.Path, network: Network) -> tuple[Variables, dict[str, Any]]:
  snapshot = edm_snapshot.read_snapshot(path)
  with network_weights.about(path):
    stored, section = snapshot.network, snapshot.model_section
  _check_same(path, stored, network)
  with network_weights.about(path):
    return snapshot.variables, section


def _from_export(path: pathlib.Path, network: Network) -> tuple[Variables, dict[str, Any]]:
  if not path.is_dir():
    kinds = ", ".join((*READERS, SNAPSHOT))
    raise InputError(f"{path}: expected the folder of an export, or a file with one of the endings {kinds}")
  stored, variables, meta = export.load_export(path)
  _check_same(path, stored, network)
  return variables, meta["model"]


def _check_same(path: pathlib.Path, stored: Network, wanted: Network) -> None:
  if differences := _differences(stored, wanted):
    raise InputError(f"{path} holds another network than the one described here: {'; '.join(differences)}")


def _differences(stored: Network, wanted: Network) -> list[str]:
  """'width is 2 there, 1 here' for each field that differs and changes what the network computes."""
  if type(stored) is not type(wanted):
    return [f"name is {type(stored).__name__} there, {type(wanted).__name__} here"]
  names = [field.name for field in dataclasses.fields(wanted) if field.name not in FREE]
  pairs = [(name, getattr(stored, name), getattr(wanted, name)) for name in names]
  return [f"{name} is {there!r} there, {here!r} here" for name, there, here in pairs if there != here]
