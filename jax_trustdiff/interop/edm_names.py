"""Variables of our diffusion U-Nets <-> state_dicts under the names of the code released with Karras et al. 2022.

'model.enc.32x32_block0.norm0.weight' is such a name; the networks' own part follows 'model.'. Convolutions go from OIHW
to HWIO, linear layers are transposed. Filters ('resample_filter') are no parameters here: they are compared with the
network's own and dropped.
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
from jax_trustdiff.types import DiffusionNetwork, InputError, Variables

PREFIX = "model."
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
FREQUENCIES = "map_noise.freqs"
FILTER = ".resample_filter"
IDDPM_TABLE = "u"  # the noise levels of an iDDPM denoiser: its preconditioning knows them


def from_edm(network: DiffusionNetwork, state_dict: Mapping[str, Any]) -> Variables:
  """The float32 variables of `network` from a state_dict of the reference; names with or without 'model.'.

  Every tensor is used but filters and the noise levels of iDDPM. Raises InputError that names the tensors that are
  missing, left over, or of another shape, or a filter that is not the network's.
  """
  found = {name.removeprefix(PREFIX): np.asarray(value) for name, value in state_dict.items()}
  found.pop(IDDPM_TABLE, None)
  for name in [name for name in found if name.endswith(FILTER)]:
    _check_filter(name, found.pop(name), getattr(network, "taps", (1, 1)))
  flat, missing = {}, []
  for path, leaf in leaves(jax.eval_shape(network.init, jax.random.key(0))):
    name = _edm_name(path)
    if name in found and transposed_shape(leaf.shape) == found[name].shape:
      flat[".".join(path)] = np.asarray(from_torch_layout(found.pop(name)), np.float32, order="C")
    else:
      missing.append(name)
  if missing or found:
    raise InputError(
      f"the state_dict does not fit {network}: missing or of another shape: {some(missing)}; "
      f"left over: {some(f'{name} {value.shape}' for name, value in found.items())}"
    )
  return unflatten(flat)


def to_edm(variables: Variables) -> dict[str, np.ndarray]:
  """The state_dict under the reference's names and in torch's layout, without its derivable filters."""
  return {
    PREFIX + _edm_name(path): np.array(to_torch_layout(np.asarray(leaf)), order="C")
    for path, leaf in leaves(variables)
  }


def _edm_name(path: tuple[str, ...]) -> str:
  collection, *modules, leaf = path
  if collection == "constants":
    return FREQUENCIES
  return ".".join([*(re.sub("^(enc|dec)_", r"\1.", module) for module in modules), LEAVES[leaf]])


def _check_filter(name: str, found: np.ndarray, taps: tuple[float, ...]) -> None:
  wanted = np.outer(taps, taps) / sum(taps) ** 2
  if found.shape != (1, 1, *wanted.shape) or not np.allclose(found[0, 0], wanted, atol=1e-6):
    raise InputError(f"{name} is not the filter {list(taps)} of the network")
