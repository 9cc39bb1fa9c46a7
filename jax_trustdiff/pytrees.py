"""Data classes as pytrees whose structures are equal only if their classes are.

`jax.tree_util.register_dataclass` compares the fields of two classes and not the classes (seen with jax 0.10: structures of two classes with the
same fields are equal, their hashes are not), so that a cache of compiled functions, keyed by structures, now and then takes one for the
other. A mixture with `weights.Equal`, sampled in the process that had sampled one with `weights.Prior`, once gave the images of that.
"""

import dataclasses
from typing import TypeVar

import jax

T = TypeVar("T", bound=type)


def register_pytree(cls: T) -> T:
  """Class decorator, above `dataclasses.dataclass`: fields with metadata static=True are part of the structure, all others its children."""
  static = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]
  dynamic = [field.name for field in dataclasses.fields(cls) if field.name not in static]
  keys = [jax.tree_util.GetAttrKey(name) for name in dynamic]

  def flatten(x):
    return [getattr(x, name) for name in dynamic], tuple(getattr(x, name) for name in static)

  def flatten_with_keys(x):
    children, aux = flatten(x)
    return list(zip(keys, children, strict=True)), aux

  def unflatten(aux, children):
    return cls(**dict(zip(static, aux, strict=True)), **dict(zip(dynamic, children, strict=True)))

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
  return cls
