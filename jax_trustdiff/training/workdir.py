"""A run's folder: its config, its lock, its metrics and its result.

workdir/ config.json  metrics.jsonl  result.json  checkpoints/  export/  export_last/  report/
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

import jax_trustdiff
from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.training.progress import say
from jax_trustdiff.types import InputError

READS, LEAVES, SEAL = "reads", "leaves", "sha256"  # in result.json
State = Callable[[], str | None]


class Workdir:
  """The folder `path` of the run of `config`. Nothing is written before `open`.

  In a multi-host run only process 0 writes; the others hold the same object and their writes do nothing.
  of_parts: the run is one of parts that have folders of their own, which refuse another config each; so its own may change (more
  seeds, other columns), and then it goes on, also if it was finished.
  """

  def __init__(
    self, path: str | os.PathLike, config: Any, parent: "Workdir | None" = None, of_parts: bool = False
  ):
    self.path = pathlib.Path(os.path.abspath(path))
    self._config = config
    self._parent = parent
    self._of_parts = of_parts
    self._lock = None
    self._records: dict[str, Any] = {}
    self._started = time.monotonic()
    self._seconds_before = 0.0

  def __truediv__(self, name: str) -> pathlib.Path:
    return self.path / name

  def sub(self, name: str, config: Any) -> "Workdir":
    """The folder of a run that is part of this one; opening it opens this one."""
    return Workdir(self.path / name, config, parent=self)

  def check(self) -> None:
    """Writes nothing. InputError if this folder cannot be written, is in use, or is not one of this config's run."""
    with _input_errors(self.path):
      if not self.path.exists():
        self._check_creatable()
        return
      if not self.path.is_dir():
        raise InputError(f"workdir {self.path} is a file")
      self._check_config()
      if parallel.is_main_process() and self._lock is None:
        if not os.access(self.path, os.W_OK | os.X_OK):
          raise InputError(f"workdir {self.path} is not writable: take another --workdir")
        if (self / ".lock").exists():
          with open(self / ".lock", "r+") as file:
            _flock(file, self.path)

  def open(self) -> None:
    """Creates the folder, takes its lock and writes config.json; InputError as `check`. Opening twice is fine."""
    if self._parent is not None:
      self._parent.open()
    self.check()
    if not parallel.is_main_process() or self._lock is not None:
      return
    with _input_errors(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
      lock = open(self / ".lock", "a")
      _flock(lock, self.path)
      self._lock = lock
      if (self / ".seconds").exists():
        self._seconds_before = float((self / ".seconds").read_text())
      changed = self._changes()
      if changed:
        (self / "result.json").unlink(missing_ok=True)
      if changed or not (self / "config.json").exists():
        write_atomically(self / "config.json", config_lib.to_json(self._config) + "\n")

  def close(self) -> None:
    """Gives the lock back (the system does so too when the process dies)."""
    if self._lock is not None:
      with contextlib.suppress(OSError):  # a full disk: whoever filled it has been told
        self.keep_seconds()
      self._lock.close()
      self._lock = None

  def keep_seconds(self) -> None:
    """Writes down the seconds spent so far, here and in the run this one is part of, for later sessions."""
    if self._parent is not None:
      self._parent.keep_seconds()
    if self._lock is not None:
      write_atomically(self / ".seconds", f"{self._seconds():.3f}\n")

  def append_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """One line of metrics.jsonl."""
    if parallel.is_main_process():
      with open(self / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")

  def read_metrics(self) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, a torn last one left out."""
    file = self / "metrics.jsonl"
    return [line for line in map(_parse_line, file.read_text().splitlines()) if line] if file.exists() else []

  def forget_metrics_after(self, step: int) -> None:
    """Drops the lines past `step`: a resumed run writes them again."""
    file = self / "metrics.jsonl"
    if parallel.is_main_process() and file.exists():
      kept = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
      write_atomically(file, "".join(kept))

  def finished_metrics(self) -> dict[str, Any] | None:
    """The metrics of result.json, or None while the run is not finished."""
    file = self / "result.json"
    return json.loads(file.read_text())["metrics"] if file.exists() else None

  def complete(
    self, run: Callable[[], Mapping[str, Any]], reads: State | None = None, leaves: State | None = None
  ) -> dict[str, Any]:
    """The metrics of result.json if this run is finished, else those of `run()`, written there; InputError as `check`.

    reads: the state of what the run reads and others change, such as the shards of a bundle. The run is finished for the state at its
    beginning alone, with None for none. leaves: the state of what the run itself changes; it is finished for the state at its end.
    The lock, which `run` takes by `open`, is given back.
    """
    self.check()
    metrics = None if self._changes() else self.finished_metrics()
    if metrics is not None and not self._is_as_recorded(reads, leaves):
      metrics = None
    if metrics is None:
      try:
        if reads is not None:
          self.record(READS, reads() or "")
        metrics = dict(run())
        if leaves is not None:
          self.record(LEAVES, leaves() or "")
        self.write_result(metrics)
      finally:
        self.close()
    return metrics

  def _is_as_recorded(self, reads: State | None, leaves: State | None) -> bool:
    for name, state in ((READS, reads), (LEAVES, leaves)):
      if state is not None and (now := state()) != self.recorded(name):
        if now is not None:
          say(f"what {self.path} was made of has changed since: it is made again")
        return False
    return True

  def information(self) -> dict[str, Any]:
    """Task, config hash, seed, versions, device and the seconds spent, earlier sessions included.

    Of a session that was killed, the seconds up to its last checkpoint count.
    """
    device = jax.devices()[0]
    return {
      "task": self._config.task,
      "config_hash": config_lib.config_hash(self._config),
      "seed": self._config.seed,
      "versions": {
        name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")
      }
      | {"jax_trustdiff": jax_trustdiff.__version__, "python": platform.python_version()},
      "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
      "seconds": round(self._seconds(), 1),
    }

  def record(self, name: str, value: Any) -> None:
    """Puts JSON beside the metrics of result.json: what has more than one number for a name."""
    self._records[name] = value

  def recorded(self, name: str) -> Any:
    """What was put beside the metrics, in this session or in the one that finished the run; None if nothing was."""
    file = self / "result.json"
    before = json.loads(file.read_text()) if not self._records and file.exists() else {}
    return (before | self._records).get(name)

  def write_result(self, metrics: Mapping[str, Any]) -> None:
    """result.json: `information`, the flat dict `metrics`, what was recorded, and the SHA-256 of all this (`result_fault`)."""
    if parallel.is_main_process():
      result = self.information() | {"metrics": dict(metrics)} | self._records
      write_atomically(self / "result.json", _text_of(result | {SEAL: _seal(result)}))

  def _seconds(self) -> float:
    return self._seconds_before + time.monotonic() - self._started

  def _check_creatable(self) -> None:
    existing = next(p for p in self.path.parents if p.exists())
    if not existing.is_dir():
      raise InputError(f"workdir {self.path} cannot be made: {existing} is a file")
    if parallel.is_main_process() and not os.access(existing, os.W_OK | os.X_OK):
      raise InputError(
        f"workdir {self.path} cannot be made: {existing} is not writable; take another --workdir"
      )

  def _changes(self) -> list[str]:
    """What differs between the config that is stored, if one is, and this one."""
    file = self / "config.json"
    if not file.exists():
      return []
    try:
      stored = json.loads(file.read_text())
    except ValueError:
      raise InputError(f"{file} is not JSON: it is not the config of a run; take another --workdir") from None
    return config_lib.difference(stored, self._config)

  def _check_config(self) -> None:
    if (self / "config.json").exists():
      changed = self._changes()
      if self._of_parts and not any(change.startswith("task: ") for change in changed):
        return
      if changed:
        shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
        raise InputError(
          f"workdir {self.path} holds a run of another config ({shown}): take another --workdir"
        )
    elif any(not p.name.startswith(".") for p in self.path.iterdir()):
      raise InputError(f"workdir {self.path} is not empty and holds no config.json: it is not a run's folder")


def result_fault(file: pathlib.Path) -> str:
  """What is wrong with the text of a result.json: '' if it is as it was written."""
  try:
    text = file.read_bytes()
    result = json.loads(text)
  except ValueError:
    return "it was changed"
  whole = isinstance(result, dict) and text == _text_of(result).encode() and result.pop(SEAL, "") == _seal(result)
  return "" if whole else "it was changed"


def _text_of(result: Mapping[str, Any]) -> str:
  return json.dumps(result, indent=2) + "\n"


def _seal(result: Mapping[str, Any]) -> str:
  return hashlib.sha256(_text_of(result).encode()).hexdigest()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a run's folder, as the run itself does; InputError while another has it."""
  with _input_errors(path):
    file = open(path / ".lock", "a")
    _flock(file, path)
  try:
    yield
  finally:
    file.close()


def write_atomically(path: pathlib.Path, text: str, private: bool = False) -> None:
  """Writes a text file whole or not at all; private: nobody but its owner may read it."""
  temporary = path.with_name(f".{path.name}.tmp")
  if private:  # what a killed writer left may be open to all
    temporary.unlink(missing_ok=True)
  with open(temporary, "w", opener=_for_its_owner if private else None) as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _for_its_owner(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_EXCL, 0o600)


def _flock(file, path: pathlib.Path) -> None:
  """Takes the lock of the folder `path`; closes `file` and raises InputError if it cannot be had.

  `file` must be writable: NFS makes flock a lock of fcntl, which asks for that; a lock that another holds may
  then be EACCES.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.close()
    if error.errno in (errno.EAGAIN, errno.EACCES):
      raise InputError(f"workdir {path} is in use by another process") from None
    raise InputError(
      f"workdir {path} cannot be locked ({error.strerror}): take a --workdir on a file system that has locks"
    ) from None


@contextlib.contextmanager
def _input_errors(path: pathlib.Path) -> Iterator[None]:
  """What the system refuses to do with the folder `path` as InputError; a full disk stays an OSError."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise InputError(f"workdir {path} cannot be used: {error.strerror}; take another --workdir") from None


def _parse_line(line: str) -> dict | None:
  try:
    return json.loads(line)
  except json.JSONDecodeError:
    return None
