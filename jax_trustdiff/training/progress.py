"""What a run tells the person who waits for it: lines, a progress bar with images/s and ETA."""

import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 20.0  # where there is no terminal


def say(line: str) -> None:
  """One line to standard error, from process 0 of a run."""
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """'45 s', '12 min', '3.4 h'."""
  if seconds < 90:
    return f"{seconds:.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class ProgressReport:
  """Progress of `total` items of work ('step', 'image', ...): a bar on a terminal, else a line now and then.

  images_per_item turns items into images/s. The speed is that of the last stretch, so that it does not
  remember compilation or a validation pass.
  """

  def __init__(self, what: str, total: int, done: int = 0, images_per_item: float = 1.0, quiet: bool = False):
    self._quiet = quiet or jax.process_index() != 0
    self._what, self._total, self._done = what, total, done
    self._images_per_item = images_per_item
    self._speed = None
    self._mark = (time.perf_counter(), done)
    self._last_line = time.perf_counter()
    self._bar = None
    if sys.stderr.isatty() and not self._quiet:
      self._bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
      )
      self._task = self._bar.add_task(what, total=total, completed=done, note="")
      self._bar.start()

  def update(self, done: int, note: str = "") -> None:
    """`done` items are finished."""
    now = time.perf_counter()
    then, before = self._mark
    if done > before and now - then > 1.0:
      speed = (done - before) / (now - then)
      self._speed = speed if self._speed is None else 0.5 * self._speed + 0.5 * speed
      self._mark = (now, done)
    self._done = done
    text = ", ".join(filter(None, [self._speed_text(), note]))
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=text)
    elif not self._quiet and (now - self._last_line >= SECONDS_BETWEEN_LINES or done == self._total):
      self._last_line = now
      say(f"{self._what} {done}/{self._total}  {text}")

  def pause(self) -> None:
    """The time until `resume` does not count (a validation pass, a checkpoint)."""
    self._paused = time.perf_counter()

  def resume(self) -> None:
    """Work goes on."""
    then, before = self._mark
    self._mark = (then + time.perf_counter() - self._paused, before)

  def close(self) -> None:
    """Takes the bar away."""
    if self._bar is not None:
      self._bar.stop()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _speed_text(self) -> str:
    if not self._speed:
      return ""
    left = duration((self._total - self._done) / self._speed)
    return f"{self._speed * self._images_per_item:,.0f} images/s, ETA {left}"
