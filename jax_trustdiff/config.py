"""Recipes to objects: finding and loading recipes, `:variants`, overrides, and `build`.

A recipe is a Python file with `get_config(variant: str = "") -> ConfigDict`: locked, every key present with its
default. A section of it is `name` plus the keyword arguments of the thing it builds.
"""

import ast
import difflib
import fnmatch
import hashlib
import importlib
import importlib.util
import inspect
import json
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from jax_trustdiff.types import InputError

ConfigDict = ml_collections.ConfigDict

# Which registry a section chooses from, and the arguments that do not come from the config but from the wiring.
# Looked up only when a name is overridden.
_OF_NETWORKS = (
  "jax_trustdiff.models.registry:NETWORKS",
  ("num_classes", "image_shape", "num_augment_labels", "backbone"),
)
SECTIONS = {
  "model": _OF_NETWORKS,
  "untrained.model": _OF_NETWORKS,
  "untrained.preconditioning": ("jax_trustdiff.diffusion.denoisers:PRECONDITIONINGS", ()),
  "untrained_codec.model": ("jax_trustdiff.models.registry:CODECS", ("image_shape",)),
  "adapter": ("jax_trustdiff.models.adapters:ADAPTERS", ("backbone",)),
  "diffusion.preconditioning": ("jax_trustdiff.diffusion.denoisers:PRECONDITIONINGS", ()),
  "diffusion.loss": ("jax_trustdiff.diffusion.losses:LOSSES", ()),
  "sampler": ("jax_trustdiff.tasks.denoisers:SAMPLERS", ()),
  "own_sampler": ("jax_trustdiff.tasks.denoisers:SAMPLERS", ()),
  "solver": ("jax_trustdiff.diffusion.samplers:SAMPLERS", ()),
  "likelihood": ("jax_trustdiff.diffusion.likelihood:LIKELIHOODS", ("solver",)),
  "data": ("jax_trustdiff.data.sources:SOURCES", ("split", "class_names")),
  "mark": ("jax_trustdiff.watermark.initial_noise:MARKS", ("secret", "image_shape")),
  "null": ("jax_trustdiff.data.sources:SOURCES", ("split", "class_names")),
  "images": ("jax_trustdiff.data.sources:SOURCES", ("split", "class_names")),
  "reference": ("jax_trustdiff.data.sources:SOURCES", ("split", "class_names")),
  "generated": ("jax_trustdiff.data.sources:SOURCES", ("split", "class_names")),
  "metrics.features": ("jax_trustdiff.tasks.generation_metrics:FEATURES", ()),
  "augment": ("jax_trustdiff.data.augment:AUGMENTATIONS", ()),
  "augment_pipe": ("jax_trustdiff.diffusion.augment:AUGMENT_PIPES", ()),
  "objective": ("jax_trustdiff.robustness.objectives:OBJECTIVES", ()),
  "optimizer": ("jax_trustdiff.training.optimizers:OPTIMIZERS", ("schedule",)),
  "schedule": (
    "jax_trustdiff.training.optimizers:ALL_SCHEDULES",
    ("num_epochs", "steps_per_epoch", "batch_size"),
  ),
  "eval.*attack": ("jax_trustdiff.attacks.registry:ATTACKS", ()),
}
_PACKAGE = pathlib.Path(__file__).resolve().parent
# In an installed wheel the recipes lie inside the package; in a checkout beside it.
_RECIPE_ROOTS = (_PACKAGE, _PACKAGE.parent)


def build(registry: Mapping[str, Callable], section: Mapping[str, Any] | ConfigDict, **extra) -> Any:
  """The object that `section` names: registry[section['name']](**rest of the section, **extra).

  InputError for a name that is not in the registry, an argument it does not take, or one it needs and misses.
  """
  kwargs = to_plain(section)
  name = kwargs.pop("name")
  constructor = _find(registry, name)
  parameters = inspect.signature(constructor).parameters
  for key in kwargs:
    if key not in parameters:
      raise InputError(
        f"{name!r} does not take {key!r}{_did_you_mean(key, parameters)}; it takes: {', '.join(parameters)}"
      )
  missing = [
    key for key, p in parameters.items() if p.default is p.empty and key not in kwargs and key not in extra
  ]
  if missing:
    raise InputError(f"{name!r} needs {', '.join(missing)}")
  return constructor(**kwargs, **extra)


def _find(registry: Mapping[str, Callable], name: str) -> Callable:
  if name not in registry:
    raise InputError(
      f"unknown name {name!r}{_did_you_mean(name, registry)}; known: {', '.join(sorted(registry))}"
    )
  return registry[name]


def _default(parameter: inspect.Parameter) -> Any:
  """The value a key starts from: the default; a placeholder of the right type for None; else the type's empty value."""
  if parameter.default is None:
    choices = typing.get_args(parameter.annotation)
    return ml_collections.config_dict.placeholder(next(t for t in (float, int, bool, str) if t in choices))
  return parameter.annotation() if parameter.default is parameter.empty else parameter.default


def parse_variant(variant: str, names: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
  """The parts of a variant string: 'cpu,model.width=2' -> (['cpu'], {'model.width': 2}).

  A part without '=' must be one of `names`; a value is a Python literal, or else a string.
  """
  chosen, overrides = _names_and_values(variant)
  if unknown := [part for part in chosen if part not in names]:
    known = ", ".join(names) or "none"
    raise InputError(
      f"unknown variant {unknown[0]!r}{_did_you_mean(unknown[0], names)}; this recipe has: {known}"
    )
  return chosen, overrides


def split_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
  """('configs/at_cifar.py:cpu', {'seed': 3}) of 'configs/at_cifar.py:cpu,seed=3': what `load` takes apart."""
  path, _, variant = recipe.partition(":")
  names, overrides = _names_and_values(variant)
  return (f"{path}:{','.join(names)}" if names else path), overrides


def in_order(**sections: Mapping[str, Any]) -> dict[str, Any]:
  """The sections and `order`: {name of a section: its keys in order}, which a ConfigDict does not keep."""
  return {**sections, "order": {name: tuple(section) for name, section in sections.items()}}


def finish(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """`config` with the overrides of its variant applied, locked: the last line of every get_config."""
  config.lock()
  override(config, overrides)
  return config


def override(config: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets 'section.key' -> value in place, names first (`rename`); InputError for unknown keys and wrong types."""
  rename(config, values)
  for path, value in values.items():
    check_key(config, path)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
      section = section[parent]
    try:
      section[last] = value
    except (TypeError, ValueError):
      wanted = section.get_type(last).__name__
      raise InputError(f"config key {path!r} takes a value of type {wanted}, found {value!r}") from None


def rename(config: ConfigDict, values: Mapping[str, Any]) -> None:
  """Gives every section of SECTIONS whose 'section.name' is in `values` the keys of the thing it then names.

  Keys that the old and the new thing both take keep their values, the others have the new one's defaults, e.g.
  'objective.name' -> 'mart' drops label_smoothing and keeps beta and radius. InputError for an unknown name.
  """
  for path, name in values.items():
    section_path, _, last = path.rpartition(".")
    known = [where for pattern, where in SECTIONS.items() if fnmatch.fnmatchcase(section_path, pattern)]
    if last != "name" or not known:
      continue
    check_key(config, path)
    *parents, key = section_path.split(".")
    parent = config
    for part in parents:
      parent = parent[part]
    if name == parent[key].name:
      continue
    where, wired = known[0]
    module, _, registry = where.partition(":")
    constructor = _find(getattr(importlib.import_module(module), registry), name)
    parameters = {k: p for k, p in inspect.signature(constructor).parameters.items() if k not in wired}
    kept = to_plain(parent[key])
    section = {k: kept.get(k, _default(p)) for k, p in parameters.items()}
    with parent.unlocked():
      parent[key] = ConfigDict({"name": name} | section)
    config.lock()


def check_key(config: ConfigDict, path: str) -> None:
  """InputError unless 'section.key' exists: names the part that is wrong and lists what is there."""
  section: Any = config
  for depth, part in enumerate(path.split(".")):
    if not isinstance(section, ConfigDict):
      where = ".".join(path.split(".")[:depth])
      raise InputError(f"config key {path!r}: {where!r} is a value, not a section")
    if part not in section:
      where = ".".join(path.split(".")[:depth]) or "the top level"
      raise InputError(
        f"unknown config key {path!r}{_did_you_mean(part, section)}; keys of {where}: {', '.join(sorted(section))}"
      )
    section = section[part]


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The config of 'configs/at_cifar.py' or 'configs/at_cifar.py:cpu,seed=3', with overrides applied.

  The file is looked for below the current directory, then among the recipes installed with the package.
  """
  path, _, variant = recipe.partition(":")
  file = find_recipe(path)
  spec = importlib.util.spec_from_file_location(f"jax_trustdiff_recipe_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise InputError(f"{path}: a recipe defines get_config(variant='') and this file does not")
  config = module.get_config(variant)
  override(config, overrides or {})
  return config


def find_recipe(path: str) -> pathlib.Path:
  """The file of a recipe: `path` itself, or the one of that name installed with the package."""
  for candidate in (pathlib.Path(path), *(root / path for root in _RECIPE_ROOTS)):
    if candidate.is_file():
      return candidate.resolve()
  known = sorted(
    {str(p.relative_to(root)) for root in _RECIPE_ROOTS for p in (root / "configs").rglob("*.py")}
  )
  raise InputError(f"no recipe {path!r}{_did_you_mean(path, known)}; installed recipes: {', '.join(known)}")


def to_plain(section: Any) -> Any:
  """ConfigDicts as dicts, all the way down; tuples stay tuples."""
  if isinstance(section, (ConfigDict, Mapping)):
    return {key: to_plain(section[key]) for key in section}
  return section


def from_plain(values: Mapping[str, Any]) -> ConfigDict:
  """The locked ConfigDict of nested dicts."""
  return ConfigDict(dict(values)).lock()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
  """{'section.key': value} in the order of the recipe."""
  flat = {}
  for key, value in to_plain(config).items():
    if isinstance(value, dict) and value:
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def to_json(config: Any) -> str:
  """JSON of the config, keys sorted: the same text for the same config."""
  return json.dumps(to_plain(config), indent=2, sort_keys=True)


def config_hash(config: Any) -> str:
  """Twelve hexadecimal digits of the SHA-256 of the config's JSON."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]


def difference(old: Any, new: Any) -> list[str]:
  """'key: old -> new' for every key in which two configs differ; both may be parsed JSON."""
  old, new = (flatten(json.loads(to_json(c))) for c in (old, new))
  absent = "(absent)"
  return [
    f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key, absent) != new.get(key, absent)
  ]


def parse_seeds(seeds: str, default: int, key: str = "seeds") -> tuple[int, ...]:
  """'0,1,2' -> (0, 1, 2); '' -> (default,). key: that of the config, for error messages.

  InputError for what is no list of different seeds, each at least 0 and below 2**32.
  """
  try:
    parsed = tuple(int(s) for s in seeds.strip("()").split(",") if s.strip()) if seeds else (default,)
  except ValueError:
    raise InputError(f"config key {key!r} takes integers separated by commas, found {seeds!r}") from None
  if len(set(parsed)) != len(parsed):
    raise InputError(f"config key {key!r} names a seed twice: {seeds!r}")
  for seed in parsed:
    if not 0 <= seed < 2**32:
      raise InputError(f"seed must be at least 0 and below 2**32; found {seed}")
  return parsed


def _did_you_mean(word: str, known) -> str:
  close = difflib.get_close_matches(word, list(known), n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _names_and_values(variant: str) -> tuple[list[str], dict[str, Any]]:
  """The parts of a variant string without '=', and {key: value} of those with one."""
  names, values = [], {}
  for part in filter(None, map(str.strip, _split_outside_brackets(variant))):
    key, equals, value = part.partition("=")
    if equals:
      values[key] = _literal(value)
    else:
      names.append(part)
  return names, values


def _split_outside_brackets(text: str) -> list[str]:
  parts, depth = [""], 0
  for char in text:
    depth += (char in "([{") - (char in ")]}")
    if char == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += char
  return parts
