"""A trained network as two files anyone can read: model.safetensors (arrays) and model.json (how to build it)."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jax_trustdiff.interop import safetensors_io
from jax_trustdiff.models.registry import (
  CODECS,
  DIFFUSION_NETWORKS,
  GRAPHS,
  NETWORKS,
  NOISE_CLASSIFIERS,
  Network,
  bind,
)
from jax_trustdiff.types import InputError, LogitsFn, Variables

FORMAT = 1
ARRAYS = "model.safetensors"
DESCRIPTION = "model.json"


def save_export(
  directory: str | os.PathLike,
  model: Mapping[str, Any],
  variables: Variables,
  extra: Mapping[str, Any] | None = None,
) -> None:
  """Writes `directory`/model.safetensors and model.json, each whole or not at all.

  model: {'name': in NETWORKS, **the arguments it is built with}. extra: JSON kept beside it, of a diffusion model
  'denoiser' and of a classifier of noisy images 'preconditioning': {'name': a preconditioning, **arguments}; InputError for
  the keys 'format' and 'model', which are taken.
  """
  directory = pathlib.Path(directory)
  meta = {"format": FORMAT, "model": dict(model)}
  if taken := sorted(meta.keys() & (extra or {}).keys()):
    raise InputError(
      f"extra holds {', '.join(taken)}: these keys of {DESCRIPTION} are taken; choose other names"
    )
  meta |= extra or {}
  text = json.dumps(meta, indent=2) + "\n"
  safetensors_io.save(directory / ARRAYS, variables)
  safetensors_io.write_atomically(directory / DESCRIPTION, text.encode())


def load_export(
  directory: str | os.PathLike,
) -> tuple[Network, Variables, dict[str, Any]]:
  """(network, variables, everything in model.json) of an export, the variables as numpy arrays.

  Raises InputError if a file is missing or damaged, or the arrays are not those of the network.
  """
  directory = pathlib.Path(directory)
  network, meta = load_network(directory)
  variables = safetensors_io.load(directory / ARRAYS)
  _check_arrays(directory, variables, jax.eval_shape(network.init, jax.random.key(0)))
  return network, variables, meta


def load_network(directory: str | os.PathLike) -> tuple[Network, dict[str, Any]]:
  """(network, everything in model.json) of an export, whose arrays are not read; InputError if it is damaged."""
  meta = read_description(directory)
  return _build(pathlib.Path(directory) / DESCRIPTION, meta["model"]), meta


def load_classifier(directory: str | os.PathLike) -> LogitsFn:
  """The classifier of an export: images Unit [b h w c] -> logits [b k]; a callable pytree."""
  name = read_description(directory)["model"].get("name")
  if name in DIFFUSION_NETWORKS:
    raise InputError(f"{directory} holds a diffusion model ({name}), no classifier: see load_denoiser")
  if name in NOISE_CLASSIFIERS:
    raise InputError(
      f"{directory} holds a classifier of noisy images ({name}), to be told their noise: see load_noise_classifier"
    )
  if name in CODECS:
    raise InputError(f"{directory} holds a watermark codec ({name}), no classifier: see load_codec")
  network, variables, _ = load_export(directory)
  return bind(network, jax.tree.map(jax.numpy.asarray, variables))


def read_description(directory: str | os.PathLike) -> dict[str, Any]:
  """Everything in model.json, 'model' included; InputError if it is missing or damaged."""
  directory = pathlib.Path(directory)
  file = directory / DESCRIPTION
  if not file.is_file():
    raise InputError(f"no export in {directory}: expected {DESCRIPTION} and {ARRAYS} there")
  try:
    meta = json.loads(file.read_text())
  except ValueError as error:
    raise InputError(f"{file}: not JSON, or truncated ({error})") from None
  if not isinstance(meta, dict) or meta.get("format") != FORMAT or not isinstance(meta.get("model"), dict):
    raise InputError(
      f"{file}: not the description of an export (needs 'format': {FORMAT} and 'model': {{...}})"
    )
  return meta


def _build(file: pathlib.Path, section: Mapping[str, Any]) -> Network:
  arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in section.items()}
  name = arguments.pop("name", None)
  known = NETWORKS | GRAPHS
  if name not in known:
    raise InputError(f"{file}: unknown model {name!r}; known: {', '.join(sorted(known))}")
  try:
    return known[name](**arguments)
  except (InputError, TypeError) as error:
    raise InputError(f"{file}: {error}") from None


def _check_arrays(directory: pathlib.Path, found: Variables, wanted: Variables) -> None:
  found, wanted = (
    {
      jax.tree_util.keystr(path): (x.shape, str(x.dtype))
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (found, wanted)
  )
  wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
  if wrong:
    name = wrong[0]
    raise InputError(
      f"{directory}: {ARRAYS} does not fit {DESCRIPTION}: {name} is {found.get(name, 'absent')}, "
      f"expected {wanted.get(name, 'nothing of that name')} ({len(wrong)} such arrays)"
    )
