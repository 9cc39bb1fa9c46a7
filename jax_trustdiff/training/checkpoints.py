"""Asynchronous checkpoints that survive kill -9: the last two and the best, read back with a fallback."""

import contextlib
import logging
import math
import os
import pathlib
import shutil
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jax_trustdiff import parallel
from jax_trustdiff.training.progress import say
from jax_trustdiff.types import PyTree, RunError


class _RaisedAgain(logging.Filter):
  """Drops the tracebacks that Orbax's threads print of errors which it then raises to its caller, who is us."""

  def filter(self, record: logging.LogRecord) -> bool:
    from_orbax = record.exc_info and "orbax" in record.pathname
    return not (from_orbax or record.getMessage().startswith("Task exception was never retrieved"))


def _quiet_unraisablehook(found, *, before=sys.unraisablehook):
  """`before`, except for what TensorStore's threads print after a failed read or write has been reported to us."""
  if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
    before(found)


for _logger in ("absl", "asyncio"):
  logging.getLogger(_logger).addFilter(_RaisedAgain())
sys.unraisablehook = _quiet_unraisablehook


class Checkpoints:
  """The folder `directory/<step>/`, written by Orbax: each step appears whole or not at all.

  Two latest steps are kept, so that an unreadable newest one has a predecessor, and the one with the highest
  score; of equal scores the later wins. RunError with one line when the disk is full.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(os.path.abspath(directory))
    keep = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(2),
        checkpoint_managers.BestN(get_metric_fn=_score, n=1),
      ]
    )
    with self._errors():
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=keep, best_fn=_score, cleanup_tmp_directories=True
        ),
      )

  def save(self, step: int, state: PyTree, meta: dict, score: float | None = None) -> None:
    """Starts saving `state` and the JSON `meta` as `step`; returns before the write is done."""
    if step in self._manager.all_steps():
      return
    with self._errors():
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
        metrics={"score": -math.inf if score is None else float(score)},
        force=True,
      )

  def restore_latest(self, template: PyTree) -> tuple[PyTree, dict] | None:
    """(state, meta) of the newest readable step, placed as `template`'s arrays are; None if there is no step.

    A step that cannot be read is moved to `<directory>.unreadable/`, one line says so, and the one before is
    taken. RunError when there are steps and none can be read; then nothing is moved.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    failures = {}
    for step in steps:
      try:
        restored = self._restore(step, template)
      except Exception as error:  # whatever is wrong with the files: the checkpoint before is there for this
        failures[step] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        continue
      for bad, reason in failures.items():
        say(f"checkpoint {bad} cannot be read ({reason}): going on from step {step}")
        self._set_aside(bad)
      return restored
    if steps:
      raise RunError(f"none of the checkpoints in {self.directory} can be read: {failures}")
    return None

  def restore_best(self, template: PyTree) -> tuple[PyTree, dict] | None:
    """(state, meta) of the step with the highest score, or None if no step has one."""
    self.wait()
    scores = [(_score(self._manager.metrics(step)), step) for step in self._manager.all_steps()]
    score, step = max(scores, default=(-math.inf, 0))
    return None if score == -math.inf else self._restore(step, template)

  def wait(self) -> None:
    """Returns when everything is on disk."""
    with self._errors():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def finished(self):
    """Waits for the last save at the end of the block, also when the block fails."""
    try:
      yield
    finally:
      self.wait()

  def close(self) -> None:
    """Waits and gives the manager's threads back."""
    with self._errors():
      self._manager.close()

  def latest_step(self) -> int | None:
    """The newest finished step."""
    return self._manager.latest_step()

  def _restore(self, step: int, template: PyTree) -> tuple[PyTree, dict]:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()),
    )
    return restored["state"], restored["meta"]

  def _set_aside(self, step: int) -> None:
    if parallel.is_main_process():
      aside = self.directory.with_name(self.directory.name + ".unreadable")
      aside.mkdir(exist_ok=True)
      shutil.rmtree(aside / str(step), ignore_errors=True)
      shutil.move(self.directory / str(step), aside / str(step))
    parallel.barrier(f"set aside {step}")
    self._manager.reload()

  @contextlib.contextmanager
  def _errors(self):
    try:
      yield
    except Exception as error:
      text = str(error)
      if any(sign in text for sign in ("No space left", "RESOURCE_EXHAUSTED", "quota exceeded")):
        good = [int(p.name) for p in self.directory.glob("*") if p.name.isdigit()]
        left = f"the last good checkpoint is step {max(good)}" if good else "there is no checkpoint yet"
        raise RunError(f"the disk is full: a checkpoint could not be written in {self.directory}; {left}") from error
      raise


def _score(metrics: dict[str, Any]) -> float:
  """-inf for a checkpoint without a score."""
  return metrics["score"]
