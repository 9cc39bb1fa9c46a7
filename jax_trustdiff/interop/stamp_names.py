"""Variables of a `StampCodec` <-> the state_dicts of the encoder and the decoder of Yu et al. 2021 and Zhao et al. 2023.

Both are files of their own there; the names are those of github.com/yunqing-me/WatermarkDM and of
github.com/ningyu1991/ArtificialGANFingerprints. Convolutions go from OIHW to HWIO and linear layers are transposed; the first
linear layer of the encoder yields, and that of the decoder takes, maps in the order of NCHW there and of NHWC here.
"""

import math
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
from jax_trustdiff.models.watermark_codec import DOWN, READ, SECRET, UP, StampCodec
from jax_trustdiff.types import InputError, Variables

_LEAVES = {"kernel": "weight", "bias": "bias"}
_ENCODER = (  # our layer -> theirs
  {"secret": "secret_dense", "last": "conv10", "image": "residual"}
  | {f"down{i}": f"conv{i + 1}" for i in range(len(DOWN))}
  | {f"up{i}": f"up{i + 6}" for i in range(len(UP))}
  | {f"merge{i}": f"conv{i + 6}" for i in range(len(UP))}
)
_DECODER = {f"conv{i}": f"decoder.{2 * i}" for i in range(len(READ))} | {
  "hidden": "dense.0",
  "logits": "dense.2",
}
_NAMES = {"encoder": _ENCODER, "decoder": _DECODER}


def from_torch(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> tuple[StampCodec, Variables]:
  """(codec, float32 variables) from both state_dicts, which tell the number of bits and the size of the images.

  InputError where tensors are missing, left over or of another shape, or where the two belong to different codecs.
  """
  given = {"encoder": encoder, "decoder": decoder}
  codec = _codec(given)
  found = {
    (part, name): np.asarray(value, np.float32) for part in given for name, value in given[part].items()
  }
  wanted, flat = jax.eval_shape(codec.init, jax.random.key(0)), {}
  for path, leaf in leaves(wanted):
    name = _torch_name(path)
    if name in found and found[name].shape == transposed_shape(leaf.shape):
      value = _reordered(path, codec, from_torch_layout(found.pop(name)), to_ours=True)
      flat[".".join(path)] = np.ascontiguousarray(value)
  missing = [".".join(_torch_name(path)) for path, _ in leaves(wanted) if ".".join(path) not in flat]
  if missing or found:
    left = [f"{part}.{name} {list(value.shape)}" for (part, name), value in found.items()]
    raise InputError(
      f"the state_dicts do not fit a stamp codec of {codec.num_bits} bits for images {list(codec.image_shape)}: missing or of "
      f"another shape: {some(missing)}; left over: {some(left)}"
    )
  return codec, unflatten(flat)


def to_torch(codec: StampCodec, variables: Variables) -> dict[str, dict[str, np.ndarray]]:
  """{'encoder': state_dict, 'decoder': state_dict} under the reference's names and in torch's layout."""
  found = {"encoder": {}, "decoder": {}}
  for path, leaf in leaves(variables):
    part, name = _torch_name(path)
    value = _reordered(path, codec, np.asarray(leaf), to_ours=False)
    found[part][name] = np.array(to_torch_layout(value), order="C")
  return found


def _codec(given: Mapping[str, Mapping[str, Any]]) -> StampCodec:
  """The codec that the shapes of both state_dicts describe."""
  shapes = {}
  for part, name in (
    ("encoder", "secret_dense.weight"),
    ("encoder", "residual.weight"),
    ("decoder", "dense.0.weight"),
    ("decoder", "dense.2.weight"),
  ):
    if name not in given[part]:
      raise InputError(f"the state_dict of the {part} has no {name}: it is not that of a stamp codec")
    shapes[name] = np.shape(given[part][name])
  bits, read = shapes["secret_dense.weight"][-1], shapes["dense.2.weight"][0]
  if bits != read:
    raise InputError(
      f"the encoder writes {bits} bits and the decoder reads {read}: they are not of one codec"
    )
  side = 32 * math.isqrt(shapes["dense.0.weight"][-1] // READ[-1][0])
  return StampCodec(bits, (side, side, shapes["residual.weight"][0]))


def _torch_name(path: tuple[str, ...]) -> tuple[str, str]:
  _, part, layer, leaf = path
  return part, f"{_NAMES[part][layer]}.{_LEAVES[leaf]}"


def _reordered(path: tuple[str, ...], codec: StampCodec, value: np.ndarray, to_ours: bool) -> np.ndarray:
  """The parameter `value` in our layout with the axis that is a flattened map from CHW to HWC order, or back."""
  height, width, channels = codec.image_shape
  if path[1:3] == ("encoder", "secret"):
    axis, shape = -1, (channels, SECRET, SECRET)
  elif path[1:] == ("decoder", "hidden", "kernel"):
    axis, shape = 0, (READ[-1][0], height // 32, width // 32)
  else:
    return value
  order = np.arange(math.prod(shape)).reshape(shape).transpose(1, 2, 0).ravel()
  return np.take(value, order if to_ours else np.argsort(order), axis)
