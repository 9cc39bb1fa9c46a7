"""Data classes as pytrees whose structures are equal only if their classes are; the leaves of a pytree by name.

`jax.tree_util.register_dataclass` compares the fields of two classes and not the classes (seen with jax 0.10: structures of two classes with the
same fields are equal, their hashes are not), so that a cache of compiled functions, keyed by structures, now and then takes one for the
other. A mixture with `weights.Equal`, sampled in the process that had sampled one with `weights.Prior`, once gave the images of that.
"""

import dataclasses
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

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


def leaf_name(path: tuple) -> str:
  """The path of a leaf, as of `jax.tree_util.tree_map_with_path`, as text: 'params/conv1/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
  """{'params/conv1/kernel': leaf} in the order of the leaves."""
  return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def shapes_by_name(tree: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
  """{'params/conv1/kernel': ((3, 3, 16, 32), 'float32')} of arrays or `jax.eval_shape` results."""
  return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in leaves_by_name(tree).items()}
