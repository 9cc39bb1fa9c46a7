"""Recipes, variants, overrides, and what they say about mistakes."""

import json
import pathlib
import re

import pytest

from jax_trustdiff import config
from jax_trustdiff.types import InputError

RECIPES = sorted(p.name for p in (pathlib.Path(__file__).resolve().parent.parent / "configs").glob("*.py"))


@pytest.mark.floor
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_locked_documented_and_survive_json(recipe):
  found = config.load(f"configs/{recipe}")
  assert found.is_locked
  assert {"task", "seed", "seeds"} <= set(found)
  again = config.from_plain(json.loads(config.to_json(found)))
  assert config.difference(found, again) == [] and config.config_hash(found) == config.config_hash(again)
  source = config.find_recipe(f"configs/{recipe}").read_text()
  assert re.match(r'""".+\n', source) and f"--config=configs/{recipe}" in source


def named_sections(section, path=""):
  """The paths of the sections that have a name."""
  for key in section:
    if isinstance(section[key], config.ConfigDict):
      yield from named_sections(section[key], f"{path}{key}.")
      if "name" in section[key]:
        yield f"{path}{key}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_line_knows_what_every_section_may_name(recipe):
  """A name from there gives a section the keys of what it names; those of shards and benchmarks are no choice of a thing."""
  found = config.load(f"configs/{recipe}").copy_and_resolve_references()
  for path in named_sections(found):
    if path in ("shards", "benchmark"):
      continue
    with pytest.raises(InputError, match="unknown name 'nothing of that name'"):
      config.rename(found, {f"{path}.name": "nothing of that name"})


def test_every_variant_of_a_recipe_builds_and_differs():
  recipe = config.find_recipe("configs/at_cifar.py")
  names = re.search(r"VARIANTS = \(([^)]*)\)", recipe.read_text())[1]
  plain = config.load("configs/at_cifar.py")
  for name in re.findall(r'"(\w+)"', names):
    assert config.difference(plain, config.load(f"configs/at_cifar.py:{name}")), name


def test_variant_overrides_and_python_overrides_agree():
  one = config.load("configs/at_cifar.py:cpu,model.width=2,eval.attack.loss=ce")
  two = config.load("configs/at_cifar.py:cpu", {"model.width": 2, "eval.attack.loss": "ce"})
  assert config.difference(one, two) == []
  assert (one.model.width, one.eval.attack.loss) == (2, "ce")


def test_parse_variant():
  assert config.parse_variant("cpu,a.b=(1,2),c=x", ("cpu",)) == (["cpu"], {"a.b": (1, 2), "c": "x"})
  with pytest.raises(InputError, match="unknown variant 'cpv' .did you mean 'cpu'"):
    config.parse_variant("cpv", ("cpu", "smoke"))


@pytest.mark.parametrize(
  "values, message",
  [
    (
      {"train.btach_size": 3},
      r"unknown config key 'train.btach_size' \(did you mean 'batch_size'\?\); keys of train: .*batch_size",
    ),
    ({"trian.batch_size": 3}, r"did you mean 'train'.*keys of the top level: .*model"),
    ({"seed.x": 3}, "'seed' is a value, not a section"),
    ({"train.batch_size": "many"}, "'train.batch_size' takes a value of type int, found 'many'"),
  ],
)
def test_overrides_that_cannot_be(values, message):
  with pytest.raises(InputError, match=message):
    config.load("configs/at_cifar.py", values)


def test_difference_names_what_changed():
  old, new = config.load("configs/at_cifar.py"), config.load("configs/at_cifar.py", {"seed": 3})
  assert config.difference(old, new) == ["seed: 0 -> 3"]
  assert config.config_hash(old) != config.config_hash(new)


def test_seeds():
  assert config.parse_seeds("", 7) == (7,)
  assert config.parse_seeds("0,1,2", 7) == (0, 1, 2)
  for seeds, default in (("", -1), ("0,-1", 0), ("4294967296", 0)):
    with pytest.raises(InputError, match="seed must be at least 0 and below"):
      config.parse_seeds(seeds, default)
  for bad in ("0,1,1", "0,x"):
    with pytest.raises(InputError, match="seeds"):
      config.parse_seeds(bad, 0)


def test_unknown_recipe_lists_the_installed_ones():
  with pytest.raises(
    InputError, match=r"no recipe 'configs/at_cifer.py' .did you mean 'configs/at_cifar.py'.*quickstart"
  ):
    config.load("configs/at_cifer.py")
