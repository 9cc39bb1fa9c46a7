"""Nested dicts of arrays as safetensors files: names are joined with dots."""

import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from jax_trustdiff.types import InputError, PyTree


def flatten(tree: PyTree, prefix: str = "") -> dict[str, np.ndarray]:
  """{'params.conv.kernel': array, ...} of a nested dict; arrays are made contiguous, which safetensors needs."""
  flat = {}
  for name, value in tree.items():
    if "." in name:
      raise ValueError(f"the name {prefix}{name!r} holds a dot and could not be split again")
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = np.ascontiguousarray(np.asarray(value))
  return flat


def unflatten(flat: dict[str, np.ndarray]) -> PyTree:
  """The nested dict whose `flatten` is `flat`."""
  tree = {}
  for name, value in flat.items():
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def save(path: str | os.PathLike, tree: PyTree) -> None:
  """Writes `tree` whole or not at all."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  safetensors.numpy.save_file(flatten(tree), temporary)
  os.replace(temporary, path)


def load(path: str | os.PathLike) -> PyTree:
  """The nested dict of numpy arrays in a file; InputError if there is none or it is damaged."""
  try:
    return unflatten(safetensors.numpy.load_file(path))
  except FileNotFoundError:
    raise InputError(f"no file {path}") from None
  except safetensors.SafetensorError as error:
    raise InputError(f"{path} is not a whole safetensors file ({error})") from None
