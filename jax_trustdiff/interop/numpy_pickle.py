"""What numbers and arrays of numpy in a pickle stand for (see `pickle_data`): numpy's own classes are not called."""

import math
from typing import Any

import numpy as np

from jax_trustdiff.interop.pickle_data import Function, Stateful, one_line
from jax_trustdiff.types import InputError

SCALARS = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()
LARGEST_RANK = 32


class DType(Stateful):
  """Stands for a numpy dtype: `code` such as 'f8', `order` its byte order."""

  def __init__(self, code: Any, *_):
    if type(code) is not str or code not in SCALARS:
      raise InputError(f"refused: a numpy value of type {one_line(code)}; expected a number")
    self.code, self.order = code, "|"

  def set_state(self, state: Any) -> None:
    if type(state) is not tuple or len(state) != 8 or state[1] not in ("|", "<", ">"):
      raise InputError("refused the state of a dtype")
    self.order = state[1]


class PickledArray(Stateful):
  """Stands for a numpy array; `values` is a read-only view of the pickle's bytes, None before they came."""

  values: np.ndarray | None = None

  def set_state(self, state: Any) -> None:
    if self.values is not None or type(state) is not tuple or len(state) != 5:
      raise InputError("refused the state of a numpy array")
    _, shape, dtype, is_fortran, data = state
    if type(dtype) is not DType or type(data) is not bytes or type(shape) is not tuple:
      raise InputError("refused: a numpy array that is not a shape, a type of numbers, and bytes")
    if len(shape) > LARGEST_RANK or not all(type(n) is int and n >= 0 for n in shape):
      raise InputError(f"refused: a numpy array whose shape is not up to {LARGEST_RANK} lengths")
    kind = np.dtype(dtype.order + dtype.code)
    if len(data) != math.prod(shape) * kind.itemsize:
      raise InputError(f"a numpy array of shape {shape} and type {kind} in {len(data)} bytes")
    self.values = np.frombuffer(data, kind).reshape(shape, order="F" if is_fortran else "C")


def _scalar(dtype: Any, data: Any) -> int | float | bool:
  """The number that numpy stores as a dtype and its bytes."""
  if type(dtype) is not DType or type(data) is not bytes:
    raise InputError("refused: a numpy value that is no number")
  return np.frombuffer(data, dtype.order + dtype.code, 1)[0].item()


_NDARRAY = object()


def _reconstruct(kind: Any, *_) -> PickledArray:
  if kind is not _NDARRAY:
    raise InputError(f"refused: an array of the class {one_line(kind)}")
  return PickledArray()


def _of_core(name: str, function: Function) -> dict[tuple[str, str], Any]:
  return {(f"numpy.{core}.multiarray", name): function for core in ("core", "_core")}


SCALAR_NAMES = {("numpy", "dtype"): Function(DType), **_of_core("scalar", Function(_scalar))}
ARRAY_NAMES = {
  ("numpy", "dtype"): Function(DType),
  ("numpy", "ndarray"): _NDARRAY,
  **_of_core("_reconstruct", Function(_reconstruct)),
}
