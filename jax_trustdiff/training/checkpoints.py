"""Asynchronous checkpoints that survive kill -9: the last two and the best, read back with a fallback."""

import contextlib
import errno
import logging
import math
import os
import pathlib
import shutil
import sys
import traceback
import types
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jax_trustdiff import parallel
from jax_trustdiff.training.progress import say
from jax_trustdiff.types import PyTree, RunError


def template(state: PyTree) -> PyTree:
  """Shapes, dtypes and places of the arrays of `state`, to restore by once the arrays themselves are gone."""
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


class Checkpoints:
  """The folder `directory/<step>/`, written by Orbax: each step appears whole or not at all.

  Two latest steps are kept, so that an unreadable newest one has a predecessor, and the one with the highest
  score; of equal scores the later wins. RunError with one line when the disk is full.

  Until `close`, the tracebacks that Orbax's threads print of errors which reach the caller too are held back.
  """

  def __init__(self, directory: str | os.PathLike):
    self.directory = pathlib.Path(os.path.abspath(directory))
    keep = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(2),
        checkpoint_managers.BestN(get_metric_fn=_score, n=1),
      ]
    )
    self._failed = False
    self._quiet = _Quiet()
    self._quiet.install()
    with self._errors():
      self._manager = _Manager(
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
    """(state, meta) of the newest readable step, or None if there is no step.

    The arrays are placed as those of `template`, a state or what the function `template` made of one.
    A step that cannot be read is moved to `<directory>.unreadable/`, one line says so, and the one before is
    taken. RunError when there are steps and none can be read; then nothing is moved.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    failures = {}
    for step in steps:
      try:
        restored = self._restore(step, template)
      except Exception as error:  # whatever is wrong with the files: the checkpoint before is there for this
        failures[step] = _one_line(error)
        self._failed = True
        continue
      for bad, reason in failures.items():
        say(f"checkpoint {bad} cannot be read ({reason}): going on from step {step}")
        self._set_aside(bad)
      return restored
    if steps:
      raise RunError(f"none of the checkpoints in {self.directory} can be read: {failures}")
    return None

  def restore_best(self, template: PyTree) -> tuple[PyTree, dict] | None:
    """(state, meta) of the readable step with the highest score, of equal ones the latest; None without scores.

    One line for every better step that cannot be read. After the steps with a score come those without,
    newest first. RunError if none can be read.
    """
    self.wait()
    ranking = sorted(
      ((_score(self._metrics(step)), step) for step in self._manager.all_steps()), reverse=True
    )
    if not ranking or ranking[0][0] == -math.inf:
      return None
    failures = {}
    for score, step in ranking:
      try:
        restored = self._restore(step, template)
      except Exception as error:  # whatever is wrong with the files
        failures[step] = _one_line(error)
        self._failed = True
        continue
      for bad, reason in failures.items():
        say(f"checkpoint {bad} cannot be read ({reason}): taking step {step}, its score is {score:.4g}")
      return restored
    raise RunError(f"none of the checkpoints in {self.directory} can be read: {failures}")

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
    if not self._failed:  # else what its threads say about an error that was reported may come later still
      self._quiet.remove()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

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

  def _metrics(self, step: int) -> dict[str, Any] | None:
    try:
      return self._manager.metrics(step)
    except Exception as error:  # whatever is wrong with the file
      say(f"the score of checkpoint {step} cannot be read ({_one_line(error)}): it is not the best")
      return None

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
      self._failed = True
      if _disk_is_full(error):
        good = [int(p.name) for p in self.directory.glob("*") if p.name.isdigit()]
        left = f"the last good checkpoint is step {max(good)}" if good else "there is no checkpoint yet"
        raise RunError(
          f"the disk is full: a checkpoint could not be written in {self.directory}; {left}"
        ) from error
      raise


class _Manager(ocp.CheckpointManager):
  """Leaves it to the training loop to ask JAX whether all processes stop now: to ask is to set a counter."""

  def reached_preemption(self, step: int) -> bool:
    """False: a save is due when the loop says so."""
    return False


def _score(metrics: dict[str, Any] | None) -> float:
  """-inf for a checkpoint without a score."""
  return -math.inf if metrics is None else metrics["score"]


def _one_line(error: Exception) -> str:
  return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _disk_is_full(error: BaseException) -> bool:
  """Whether a full disk or a spent quota is among the causes of `error`.

  TensorStore gives the system's text in a message of its own. Its status RESOURCE_EXHAUSTED would not do:
  XLA's out-of-memory has the same.
  """
  full = (errno.ENOSPC, errno.EDQUOT)
  seen, waiting = set(), [error]
  while waiting:
    found = waiting.pop()
    if found is None or id(found) in seen:
      continue
    seen.add(id(found))
    if isinstance(found, OSError) and found.errno in full:
      return True
    if any(os.strerror(number) in str(found) for number in full):
      return True
    waiting += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]
  return False


def _through_orbax(trace: types.TracebackType | None) -> bool:
  """Whether code of Orbax is in the traceback."""
  return any("orbax" in frame.filename for frame in traceback.extract_tb(trace))


class _Quiet(logging.Filter):
  """Once installed, drops what Orbax's threads print of errors that are raised to their caller as well."""

  def install(self) -> None:
    """From now on."""
    self._installed = True
    for name in ("absl", "asyncio"):
      logging.getLogger(name).addFilter(self)
    self._hook_before, sys.unraisablehook = sys.unraisablehook, self._unraisable

  def remove(self) -> None:
    """No longer; a hook that another has been put over stays and passes everything on."""
    self._installed = False
    for name in ("absl", "asyncio"):
      logging.getLogger(name).removeFilter(self)
    if sys.unraisablehook == self._unraisable:
      sys.unraisablehook = self._hook_before

  def filter(self, record: logging.LogRecord) -> bool:
    """False for a traceback that Orbax logs, and for what asyncio logs of a task or future of Orbax."""
    from_orbax = record.exc_info and ("orbax" in record.pathname or _through_orbax(record.exc_info[2]))
    text = record.getMessage()
    # asyncio says this of a Task, a Future or a _GatheringFuture, with or without the exception itself
    return not (from_orbax or ("exception was never retrieved" in text and "orbax" in text))

  def _unraisable(self, found) -> None:
    # TensorStore's threads: a read or write that failed has been reported, and its event loop is gone.
    reported = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    if not (self._installed and reported):
      self._hook_before(found)
