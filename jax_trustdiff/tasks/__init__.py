"""Wiring: the only place that turns a config into objects and touches the disk; a task is a module with run(config, workdir)."""

import importlib
import pathlib
import types

from jax_trustdiff.types import InputError


def find(name: str) -> types.ModuleType:
  """The module of the task `name`, imported; InputError listing the tasks if there is none."""
  folder = pathlib.Path(__file__).parent
  known = sorted(p.stem for p in folder.glob("*.py") if "def run(config" in p.read_text())
  if name not in known:
    raise InputError(f"unknown task {name!r}; known: {', '.join(known)}")
  return importlib.import_module(f"{__name__}.{name}")
