"""What the readers of one network's weights have in common: where files are, and whether they hold that network."""

import contextlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.interop.torch_layout import from_torch_layout, leaves, some, transposed_shape
from jax_trustdiff.types import InputError, Variables


@contextlib.contextmanager
def about(path: str | os.PathLike) -> Iterator[None]:
  """An InputError from within begins with the path."""
  try:
    yield
  except InputError as error:
    message = str(error)
    raise InputError(message if message.startswith(f"{path}: ") else f"{path}: {message}") from None


def installed_file(package: str, *parts: str) -> pathlib.Path | None:
  """A file of an installed package, which is found and not imported; None where there is none."""
  spec = importlib.util.find_spec(package)
  for folder in (spec and spec.submodule_search_locations) or []:
    if (file := pathlib.Path(folder, *parts)).is_file():
      return file
  return None


def save(path: str | os.PathLike, variables: Variables, usual_name: str) -> None:
  """Writes the variables to a .safetensors file; it appears whole or not at all."""
  if pathlib.Path(path).suffix != ".safetensors":
    raise InputError(f"{path}: the file must end in .safetensors, for example {usual_name}")
  safetensors_io.save(path, variables)


def from_state_dict(
  state_dict: Any,
  wanted: Variables,
  torch_name: Callable[[tuple[str, ...]], str],
  unused: re.Pattern,
  network: str,
) -> Variables:
  """The variables with the shapes of `wanted`, in float32, from a state_dict in torch's layout.

  torch_name: the name in torch of the leaf with this path. unused: names that are left aside; every other tensor must
  be one of the network. network: what to call it in an InputError.
  """
  if not (isinstance(state_dict, Mapping) and all(isinstance(name, str) for name in state_dict)):
    raise InputError("expected a state_dict (names -> tensors)")
  found = {name: np.asarray(value) for name, value in state_dict.items() if not unused.fullmatch(name)}
  flat, missing = {}, []
  for path, leaf in leaves(wanted):
    name = torch_name(path)
    if name in found and found[name].shape == transposed_shape(leaf.shape):
      flat[".".join(path)] = np.asarray(from_torch_layout(found.pop(name)), np.float32, order="C")
    else:
      missing.append(name)
  if missing or found:
    raise InputError(
      f"not {network}: missing or of another shape: {some(missing)}; "
      f"left over: {some(f'{name} {value.shape}' for name, value in found.items())}"
    )
  return safetensors_io.unflatten(flat)


def check(variables: Variables, wanted: Variables, network: str) -> Variables:
  """`variables` if they have the names, shapes and types of `wanted`, else an InputError that lists differences."""
  expected, found = dict(leaves(wanted)), dict(leaves(variables))
  wrong = [
    ".".join(path)
    for path in expected.keys() | found.keys()
    if path not in expected or path not in found or _kind(expected[path]) != _kind(found[path])
  ]
  if wrong:
    raise InputError(f"not {network}: missing, left over or of another shape: {some(wrong)}")
  return variables


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
  return leaf.shape, str(leaf.dtype)
