"""A trained network as two files anyone can read: model.safetensors (arrays) and model.json (how to build it)."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.models.registry import MODELS, bind
from jax_trustdiff.types import Classifier, InputError, LogitsFn, Variables

FORMAT = 1


def save_export(
  directory: str | os.PathLike, model: Mapping[str, Any], variables: Variables, extra: Mapping[str, Any] | None = None
) -> None:
  """Writes `directory`/model.safetensors and model.json, each whole or not at all.

  model: {'name': a name in MODELS, **the arguments it is built with}. extra: JSON kept beside it.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  safetensors_io.save(directory / "model.safetensors", variables)
  temporary = directory / ".model.json.tmp"
  temporary.write_text(json.dumps({"format": FORMAT, "model": dict(model), **(extra or {})}, indent=2) + "\n")
  os.replace(temporary, directory / "model.json")


def load_export(directory: str | os.PathLike) -> tuple[Classifier, Variables, dict[str, Any]]:
  """(network, variables, everything in model.json) of an export; InputError if it is missing, damaged or inconsistent."""
  directory = pathlib.Path(directory)
  file = directory / "model.json"
  try:
    meta = json.loads(file.read_text())
    section = dict(meta["model"])
    constructor = MODELS[section.pop("name")]
  except (FileNotFoundError, NotADirectoryError):
    raise InputError(f"no export in {directory}: expected model.json and model.safetensors there") from None
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise InputError(f"{file} is not the model.json of an export ({type(error).__name__}: {error})") from None
  try:
    network = constructor(**{key: tuple(v) if isinstance(v, list) else v for key, v in section.items()})
  except TypeError as error:
    raise InputError(f"{file}: {error}") from None
  variables = safetensors_io.load(directory / "model.safetensors")
  variables.setdefault("batch_stats", {})
  _check_shapes(directory, variables, jax.eval_shape(network.init, jax.random.key(0)))
  return network, variables, meta


def load_classifier(directory: str | os.PathLike) -> LogitsFn:
  """The classifier of an export: images Unit [b h w c] -> logits [b k]; a callable pytree."""
  network, variables, _ = load_export(directory)
  return bind(network, variables)


def _check_shapes(directory: pathlib.Path, found: Variables, wanted: Variables) -> None:
  found, wanted = ({name: x.shape for name, x in _flat(tree).items()} for tree in (found, wanted))
  wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
  if wrong:
    name = wrong[0]
    raise InputError(
      f"{directory}: model.safetensors does not fit model.json: {name} is {found.get(name, 'absent')}, "
      f"expected {wanted.get(name, 'nothing of that name')} ({len(wrong)} such arrays)"
    )


def _flat(tree: Variables) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
