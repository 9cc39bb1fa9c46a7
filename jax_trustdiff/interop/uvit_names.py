"""Variables of `models.uvit.UViT` <-> state_dicts under the names of github.com/baofff/U-ViT.

'in_blocks.0.attn.qkv.weight' is such a name. Convolutions go from OIHW to HWIO, linear layers are transposed; the tables
of positions and of class labels stay as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jax_trustdiff.interop.safetensors_io import unflatten
from jax_trustdiff.interop.torch_layout import (
  from_torch_layout,
  leaves,
  some,
  to_torch_layout,
  transposed_shape,
)
from jax_trustdiff.models.uvit import UViT
from jax_trustdiff.types import InputError, Variables

TABLES = {"pos_embed": "pos_embed", "label_embed": "label_emb.weight"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
MODULES = {  # pattern of ours -> theirs
  r"(in|out)_block(\d+)": r"\1_blocks.\2",
  r"(attn|mlp|time_embed)_(\w+)": r"\1.\2",
  r"patch_embed": "patch_embed.proj",
}


def from_uvit(network: UViT, state_dict: Mapping[str, Any]) -> Variables:
  """The float32 variables of `network` from a state_dict of the reference.

  Raises InputError that names the tensors that are missing, left over, or of another shape.
  """
  found = {name: np.asarray(value) for name, value in state_dict.items()}
  flat, missing = {}, []
  for path, leaf in leaves(jax.eval_shape(network.init, jax.random.key(0))):
    name, is_table = _uvit_name(path), path[-1] in TABLES
    if name in found and found[name].shape == (leaf.shape if is_table else transposed_shape(leaf.shape)):
      value = found.pop(name)
      flat[".".join(path)] = np.array(value if is_table else from_torch_layout(value), np.float32, order="C")
    else:
      missing.append(name)
  if missing or found:
    raise InputError(
      f"the state_dict does not fit {network}: missing or of another shape: {some(missing)}; "
      f"left over: {some(f'{name} {value.shape}' for name, value in found.items())}"
    )
  return unflatten(flat)


def to_uvit(variables: Variables) -> dict[str, np.ndarray]:
  """The state_dict under the reference's names and in torch's layout."""
  state_dict = {}
  for path, leaf in leaves(variables):
    value = np.asarray(leaf)
    value = value if path[-1] in TABLES else to_torch_layout(value)
    state_dict[_uvit_name(path)] = np.array(value, order="C")
  return state_dict


def _uvit_name(path: tuple[str, ...]) -> str:
  _, *modules, leaf = path
  if leaf in TABLES:
    return TABLES[leaf]
  return ".".join([*(_translate(module) for module in modules), LEAVES[leaf]])


def _translate(module: str) -> str:
  for pattern, theirs in MODULES.items():
    if match := re.fullmatch(pattern, module):
      return match.expand(theirs)
  return module
