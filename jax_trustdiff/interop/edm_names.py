"""Our diffusion U-Nets under the names of the code released with Karras et al. 2022: state_dicts <-> variables, and the
arguments of networks and preconditionings.

'model.enc.32x32_block0.norm0.weight' is such a name; the networks' own part follows 'model.'. Convolutions go from OIHW
to HWIO, linear layers are transposed. Filters ('resample_filter') are no parameters here: they are compared with the
network's own and dropped.
"""

import re
from collections.abc import Iterable, Mapping
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
# Arguments of theirs -> ours. Both classes of networks take the first ones.
FIELDS = {
  "label_dim": "num_classes",
  "augment_dim": "num_augment_labels",
  "model_channels": "model_channels",
  "channel_mult": "channel_mult",
  "channel_mult_emb": "embedding_channel_mult",
  "num_blocks": "num_blocks",
  "attn_resolutions": "attention_resolutions",
  "dropout": "dropout",
  "label_dropout": "label_dropout",
}
SONG_FIELDS = FIELDS | {
  "embedding_type": "embedding",
  "channel_mult_noise": "noise_channel_mult",
  "encoder_type": "encoder",
  "decoder_type": "decoder",
  "resample_filter": "taps",
}
NETWORKS = {  # class -> (name in DIFFUSION_NETWORKS, fields, values of the arguments that were left out)
  "SongUNet": ("ddpmpp", SONG_FIELDS, {"channel_mult": (1, 2, 2, 2), "dropout": 0.1}),
  "DhariwalUNet": ("adm", FIELDS, {"dropout": 0.1}),
}
PRECONDITIONINGS = {  # class -> (name, arguments); what is left out has the same value on both sides
  "EDMPrecond": ("edm", {"sigma_data": "sigma_data", "sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
  "VEPrecond": ("ve", {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
  "VPPrecond": ("vp", {"beta_d": "beta_d", "beta_min": "beta_min", "M": "num_steps", "epsilon_t": "t_min"}),
  "iDDPMPrecond": ("iddpm", {"M": "num_steps", "C_1": "c1", "C_2": "c2"}),
}
LARGEST_LIST = 32  # levels, resolutions, or taps of a filter
LARGEST_STEPS = 100_000  # noise levels of an iDDPM denoiser
OUTSIDE = (
  "img_resolution",
  "img_channels",
  "label_dim",
  "use_fp16",
  "model_type",
)  # of every preconditioning


def network_section(class_name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """{'name': in DIFFUSION_NETWORKS, **arguments} of a network of theirs; InputError for a class or argument not known."""
  if class_name not in NETWORKS:
    raise InputError(f"unknown network {class_name}; known: {', '.join(NETWORKS)}")
  name, fields, defaults = NETWORKS[class_name]
  arguments = dict(arguments)
  size, channels, out = (
    arguments.pop(key, None) for key in ("img_resolution", "in_channels", "out_channels")
  )
  if not all(type(n) is int and n >= 1 for n in (size, channels, out)):
    raise InputError(
      f"{class_name}: img_resolution, in_channels and out_channels must be positive integers, "
      f"got {size!r}, {channels!r}, {out!r}"
    )
  _check_known(class_name, arguments, fields)
  for key, value in arguments.items():
    if isinstance(value, (list, tuple)) and len(value) > LARGEST_LIST:
      raise InputError(f"{class_name}: {key} has {len(value)} values, more than {LARGEST_LIST}")
  section = {
    "name": name,
    "image_shape": (size, size, channels),
    "out_channels": 0 if out == channels else out,
  }
  section |= defaults | {fields[key]: value for key, value in arguments.items()}
  return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}


def denoiser_section(
  class_name: str, arguments: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
  """{'name': of a preconditioning, **arguments} of a preconditioned network of theirs.

  arguments: its own, and those that it handed to its network, `model`. InputError for a class or argument not known.
  """
  if class_name not in PRECONDITIONINGS:
    raise InputError(f"unknown preconditioning {class_name}; known: {', '.join(PRECONDITIONINGS)}")
  name, fields = PRECONDITIONINGS[class_name]
  _check_known(class_name, arguments, (*fields, *OUTSIDE, *model))
  found = {fields[key]: value for key, value in arguments.items() if key in fields}
  for key, value in found.items():
    if type(value) not in (int, float) or not value >= 0:
      raise InputError(f"{class_name}: {key} must be a number of at least 0, got {value!r}")
  steps = found.get("num_steps", 1)
  if type(steps) is not int or not 1 <= steps <= LARGEST_STEPS:
    raise InputError(f"{class_name}: M must be a whole number from 1 to {LARGEST_STEPS}, got {steps!r}")
  return {"name": name} | found


def _check_known(what: str, arguments: Mapping[str, Any], known: Iterable[str]) -> None:
  if unknown := sorted(arguments.keys() - set(known)):
    raise InputError(f"{what}: unknown argument {', '.join(unknown)}; known: {', '.join(known)}")


def from_edm(
  network: DiffusionNetwork, state_dict: Mapping[str, Any], *, iddpm_levels: bool = False
) -> Variables:
  """The float32 variables of `network` from a state_dict of the reference; names with or without 'model.'.

  Every tensor is used but filters. iddpm_levels: the state_dict is that of an iDDPM denoiser, and its noise levels 'u'
  are left out too. Raises InputError that names the tensors that are there twice, missing, left over, or of another
  shape, or a filter that is not the network's.
  """
  doubled = [name for name in state_dict if PREFIX + name in state_dict]
  if doubled:
    raise InputError(f"the state_dict holds the same tensors with and without {PREFIX!r}: {some(doubled)}")
  found = {name.removeprefix(PREFIX): np.asarray(value) for name, value in state_dict.items()}
  if iddpm_levels and IDDPM_TABLE in state_dict:
    found.pop(IDDPM_TABLE)
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
