"""Watermark codecs from configs and from files."""

import hashlib
import os
from typing import Any

import jax
import numpy as np

from jax_trustdiff import config as config_lib
from jax_trustdiff.interop import export
from jax_trustdiff.models.registry import CODECS, NETWORKS
from jax_trustdiff.tasks.denoisers import Section
from jax_trustdiff.types import InputError, Variables, WatermarkCodec
from jax_trustdiff.watermark.codec import BoundCodec


def build_codec(section: Section, image_shape: tuple[int, int, int]) -> WatermarkCodec:
  """The codec of a section of CODECS for images of this shape."""
  return config_lib.build(CODECS, section, image_shape=image_shape)


def model_section(section: Section, codec: WatermarkCodec) -> dict[str, Any]:
  """A section of CODECS completed with what the data decided: what an export stores and is built from."""
  return config_lib.to_plain(section) | {"image_shape": codec.image_shape}


def load_codec(directory: str | os.PathLike) -> BoundCodec:
  """The codec of an export, its variables on the default device; a callable pytree.

  InputError, in one line, if there is nothing to read or it is another kind of network.
  """
  name = export.read_description(directory)["model"].get("name")
  if name in NETWORKS and name not in CODECS:
    raise InputError(
      f"{directory} holds another network ({name}), no watermark codec: train one with configs/wm_codec.py"
    )
  codec, variables, _ = export.load_export(directory)
  return BoundCodec(codec, jax.tree.map(jax.numpy.asarray, variables))


def parameters_sha256(variables: Variables) -> str:
  """64 hexadecimal digits of the names, shapes, types and values of all parameters, whatever file they lie in."""
  digest = hashlib.sha256()
  leaves = {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
  }
  for path in sorted(leaves):
    digest.update(f"{path} {leaves[path].dtype.str} {leaves[path].shape}\n".encode())
    digest.update(np.ascontiguousarray(leaves[path]).tobytes())
  return digest.hexdigest()
