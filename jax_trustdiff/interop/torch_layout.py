"""Arrays of torch and ours: the order of their axes, and their names in messages."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jax_trustdiff.types import Variables


def leaves(tree: Variables) -> list[tuple[tuple[str, ...], Any]]:
  """The arrays of `tree` with their paths: the names of its nested dicts."""
  return [
    (tuple(entry.key for entry in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def from_torch_layout(value: np.ndarray) -> np.ndarray:
  """A kernel OIHW as HWIO, or a matrix [out, in] as [in, out]; vectors stay."""
  return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def to_torch_layout(value: np.ndarray) -> np.ndarray:
  """A kernel HWIO as OIHW, or a matrix [in, out] as [out, in]; vectors stay."""
  return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def transposed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in torch of an array of ours."""
  return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def some(names: Iterable[str]) -> str:
  """The first eight of `names` in order, and how many more there are."""
  names = sorted(names)
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
