"""Variables of our networks <-> state_dicts of the swish networks of github.com/wzekai99/DM-Improves-AT.

These are the networks of Gowal et al. 2020: 'layer.0.block.1.conv_0.weight' is a name in a WideResNet (WRN-D-W-swish),
'layer_0.1.conv_2d_1.weight' one in a PreActResNet (with 3x3 shortcuts). Both namings are checked against values
computed by that code, for WRN-10-2-swish and PreActResNet-18-swish; PreActResNet-34-swish repeats the blocks of 18.
The networks of that code without '-swish' have other names and are not read. Our networks with ReLU or 1x1 shortcuts
are written and read under the names of the swish networks, so the names do not tell the activation.
Convolutions go from OIHW to HWIO, linear layers are transposed.
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
from jax_trustdiff.models.preact_resnet import PreActResNet
from jax_trustdiff.models.wide_resnet import WideResNet
from jax_trustdiff.types import Classifier, InputError, Variables

# our module name -> theirs; applied to each part of 'group0_block1/norm0'
WIDE_RESNET = {
  r"group(\d+)_block(\d+)": r"layer.\1.block.\2",
  r"norm(\d)": r"batchnorm_\1",
  r"norm": "batchnorm",
  r"conv(\d)": r"conv_\1",
  r"conv": "init_conv",
}
PREACT_RESNET = {
  r"group(\d+)_block(\d+)": r"layer_\1.\2",
  r"norm(\d)": r"batchnorm_\1",
  r"norm": "batchnorm",
  r"conv0": "conv_2d_1",
  r"conv1": "conv_2d_2",
  r"conv": "conv_2d",
}
NAMES = {WideResNet: WIDE_RESNET, PreActResNet: PREACT_RESNET}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys of checkpoints that hold the state_dict
PREFIX = re.compile(r"^(module\.)?(0\.)?")  # torch.nn.DataParallel, and a Sequential around the network


def from_torch(network: Classifier, state_dict: Any) -> Variables:
  """The float32 variables of `network` from a state_dict with the reference's names.

  A checkpoint that holds the state_dict under 'model_state_dict', 'state_dict' or 'model' is unwrapped, and the
  prefixes 'module.', '0.' and 'module.0.' are removed. Every tensor is used but num_batches_tracked, a counter that has
  no meaning here, and the constants mean and std where they agree with the network's.
  Raises InputError that names the tensors that are missing, left over, or of another shape.
  """
  for key in WRAPPERS:
    if isinstance(state_dict, Mapping):
      state_dict = state_dict.get(key, state_dict)
  if not (isinstance(state_dict, Mapping) and all(isinstance(name, str) for name in state_dict)):
    raise InputError(
      f"expected a state_dict (names -> tensors), alone or under {' or '.join(map(repr, WRAPPERS))}"
    )
  found = {PREFIX.sub("", name): np.asarray(_tensor(value)) for name, value in state_dict.items()}
  if len(found) < len(state_dict):
    raise InputError("the state_dict holds tensors whose names differ only in the prefix 'module.' or '0.'")
  found = {name: value for name, value in found.items() if not name.endswith("num_batches_tracked")}
  for name in {"mean", "std"} & found.keys():
    _check_constant(name, found.pop(name), getattr(network, name))
  wanted = jax.eval_shape(network.init, jax.random.key(0))
  flat = {}
  for path, leaf in leaves(wanted):
    name = _torch_name(network, path)
    if name in found and transposed_shape(leaf.shape) == found[name].shape:
      flat[".".join(path)] = np.asarray(from_torch_layout(found.pop(name)), np.float32, order="C")
  missing = [_torch_name(network, path) for path, _ in leaves(wanted) if ".".join(path) not in flat]
  if missing or found:
    wrong = {name: f"{name} {found[name].shape}" for name in found}
    raise InputError(
      f"the state_dict does not fit {network}: "
      f"missing or of another shape: {some(missing)}; left over: {some(wrong.values())}"
    )
  return unflatten(flat)


def to_torch(network: Classifier, variables: Variables) -> dict[str, np.ndarray]:
  """The state_dict under the reference's names and in torch's layout; without num_batches_tracked."""
  return {
    _torch_name(network, path): np.array(to_torch_layout(np.asarray(leaf)), order="C")
    for path, leaf in leaves(variables)
  }


def _tensor(value: Any) -> Any:
  """`value`; a scalar in place of what is no tensor, such as the settings of an optimizer, which fits nowhere."""
  return value if hasattr(value, "shape") else np.zeros(())


def _torch_name(network: Classifier, path: tuple[str, ...]) -> str:
  if type(network) not in NAMES:
    known = ", ".join(kind.__name__ for kind in NAMES)
    raise InputError(f"no torch names for {type(network).__name__}; there are names for: {known}")
  _, *modules, leaf = path
  return ".".join([*(_translate(module, NAMES[type(network)]) for module in modules), LEAVES[leaf]])


def _translate(module: str, names: Mapping[str, str]) -> str:
  for pattern, theirs in names.items():
    if match := re.fullmatch(pattern, module):
      return match.expand(theirs)
  return module


def _check_constant(name: str, found: np.ndarray, wanted: tuple[float, ...]):
  found = np.asarray(found, np.float32).reshape(-1)
  if not (found.size in (1, len(wanted)) and np.allclose(found, np.asarray(wanted, np.float32), atol=1e-6)):
    raise InputError(f"the state_dict was made for {name} {found.tolist()}, the network has {list(wanted)}")
