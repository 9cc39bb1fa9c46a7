"""What is done of a task in chunks, kept in a folder of its workdir so that it goes on where it was cut off."""

import os
import pathlib

import numpy as np

from jax_trustdiff import parallel
from jax_trustdiff.training.progress import say


class FolderJournal:
  """Named arrays in .npz files, each written whole or not at all: an `autoattack.Journal`, and one of any work in chunks.

  What `get` finds was there when the journal was opened: processes of one run must agree on it.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    if parallel.is_main_process():
      folder.mkdir(exist_ok=True)
    parallel.barrier("journal")
    self._known = {file.stem for file in folder.glob("*.npz")}
    if self._known:
      say(f"{len(self._known)} chunks are there already")

  def get(self, name: str) -> dict[str, np.ndarray] | None:
    if name not in self._known:
      return None
    with np.load(self._folder / f"{name}.npz", allow_pickle=False) as file:
      return {key: file[key] for key in file.files}

  def put(self, name: str, arrays: dict[str, np.ndarray]) -> None:
    if parallel.is_main_process():
      temporary = self._folder / f".{name}.tmp"
      with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, self._folder / f"{name}.npz")
