"""Entries of RobustBench's leaderboards (Croce et al. 2021, arXiv:2010.09670), from a JSON file of them."""

import difflib
import json
import os
import pathlib
from typing import Any

from jax_trustdiff.types import InputError

WANTED = ("id", "clean_acc", "autoattack_acc", "eps")


def entry(path: str | os.PathLike, dataset: str, threat: str, name: str) -> dict[str, Any]:
  """The entry `name`, such as 'Wang2023Better_WRN-28-10', of the leaderboard '<dataset>/<threat>' in the file.

  The file: {'cifar10/Linf': [{'id', 'clean_acc', 'autoattack_acc', 'eps', ...}], ...}, accuracies in percent, as text or
  numbers. InputError, with near names, where there is no such entry.
  """
  boards = _read(pathlib.Path(path))
  board = f"{dataset}/{threat}"
  if board not in boards:
    raise InputError(f"{path} has no leaderboard {board!r}; it has {', '.join(sorted(boards))}")
  entries = {found.get("id"): found for found in boards[board] if isinstance(found, dict)}
  if name not in entries:
    near = difflib.get_close_matches(name, [key for key in entries if key], 3, 0.4) or list(entries)[:3]
    raise InputError(f"the leaderboard {board!r} has no entry {name!r}; near: {', '.join(near)}")
  missing = [key for key in WANTED if entries[name].get(key) is None]
  if missing:
    raise InputError(f"the entry {name!r} of {path} has no {', '.join(missing)}")
  return entries[name]


def compare(found: dict[str, Any], clean: float, robust: float) -> dict[str, float]:
  """leaderboard/... accuracies of an entry, and by how much ours (fractions) are above them."""
  theirs = {"clean": float(found["clean_acc"]) / 100, "autoattack": float(found["autoattack_acc"]) / 100}
  metrics = {f"leaderboard/{name}_accuracy": value for name, value in theirs.items()}
  for name, ours in (("clean", clean), ("autoattack", robust)):
    metrics[f"leaderboard/{name}_difference"] = ours - theirs[name]
  return metrics


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise InputError(f"{path}: no such file; expected a JSON file of leaderboards")
  try:
    boards = json.loads(path.read_text())
  except ValueError:
    boards = None
  if not isinstance(boards, dict) or not all(isinstance(board, list) for board in boards.values()):
    raise InputError(f"{path} is no JSON file of leaderboards: {{'cifar10/Linf': [entries], ...}}")
  return boards
