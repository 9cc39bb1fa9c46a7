"""Data classes as pytrees: structures tell classes apart, fields have names, static ones are not traced."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_trustdiff.cdm import weights
from jax_trustdiff.pytrees import register_pytree

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jax_trustdiff"


@register_pytree
@dataclasses.dataclass(frozen=True)
class One:
  value: Any = 1.0
  name: str = dataclasses.field(default="one", metadata={"static": True})


@register_pytree
@dataclasses.dataclass(frozen=True)
class Other:
  value: Any = 1.0
  name: str = dataclasses.field(default="one", metadata={"static": True})


@pytest.mark.floor
def test_structures_are_equal_only_for_one_class():
  structure = jax.tree.structure
  for a, b in ((One(), Other()), (weights.Prior(), weights.Equal()), (One(), One(name="two"))):
    assert structure(a) != structure(b)
    assert structure(a) == structure(dataclasses.replace(a))
  assert structure(One(1.0)) == structure(One(2.0))


@pytest.mark.floor
def test_fields_are_children_or_static():
  one = One({"a": jnp.ones(2), "b": 3.0}, "two")
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
  assert paths == [".value['a']", ".value['b']"]
  doubled = jax.jit(lambda x: jax.tree.map(lambda leaf: 2 * leaf, x))(one)
  assert isinstance(doubled, One) and doubled.name == "two" and float(doubled.value["b"]) == 6
  assert jax.vmap(lambda x: x.value)(One(jnp.arange(3.0))).shape == (3,)


def test_nothing_else_is_registered_by_fields():
  found = [file.name for file in PACKAGE.rglob("*.py") if "tree_util.register_dataclass" in file.read_text()]
  assert found == ["pytrees.py"]  # its docstring
