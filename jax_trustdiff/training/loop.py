"""The one training loop: dispatch, log, validate, checkpoint, resume, stop."""

import contextlib
import dataclasses
import importlib.util
import math
import signal
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jax_trustdiff import parallel
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.progress import ProgressReport, duration, say
from jax_trustdiff.training.state import StepFn, TrainState
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError, Stopped


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long to train and how often to do what, in optimizer steps.

  What happens at a step depends on its number alone, so that an interrupted run does the same as an undisturbed
  one. validate_every = 0: never.
  """

  num_steps: int
  log_every: int
  checkpoint_every: int
  validate_every: int = 0
  steps_per_dispatch: int = 1

  def __post_init__(self):
    for field in ("num_steps", "log_every", "checkpoint_every", "steps_per_dispatch"):
      if getattr(self, field) < 1:
        raise InputError(f"train.{field} must be at least 1, found {getattr(self, field)}")

  def dispatch_end(self, step: int) -> int:
    """The step at which the dispatch that starts at `step` ends."""
    periods = (self.steps_per_dispatch, self.log_every, self.checkpoint_every, self.validate_every)
    return min([self.num_steps, *((step // p + 1) * p for p in periods if p)])

  def validates_at(self, step: int) -> bool:
    """Whether validation is due once `step` steps are done."""
    return bool(self.validate_every) and (step % self.validate_every == 0 or step == self.num_steps)

  def checkpoints_at(self, step: int) -> bool:
    """Whether a checkpoint is due once `step` steps are done."""
    return step % self.checkpoint_every == 0 or step == self.num_steps or self.validates_at(step)


def fit(
  state: TrainState,
  train_step: StepFn,
  feed,
  schedule: Schedule,
  workdir: Workdir,
  checkpoints: Checkpoints,
  batch_size: int,
  validate: Callable[[TrainState], dict[str, float]] | None = None,
  score: str | None = None,
  profile: tuple[int, int] = (0, 0),
) -> TrainState:
  """Trains `state` (its buffers are given up) to schedule.num_steps and returns the final state.

  Starts from the newest checkpoint in the workdir if there is one, exactly: parameters, optimizer, average,
  statistics, step and so the order of the data. `validate(state)` returns metrics, of which `score` ranks the
  checkpoints. `batch_size` is for images/s. RunError at a loss that is not finite, naming the step; Stopped after SIGTERM or Ctrl-C, saved.
  profile = (first, last): traces those steps into workdir/profile.
  """
  restored = checkpoints.restore_latest(state)
  if restored is not None:
    state = restored[0]
    say(f"resuming at step {int(state.step)} of {schedule.num_steps}")
  step = int(state.step)
  workdir.forget_metrics_after(step)
  if step >= schedule.num_steps:
    return state

  feed.start(step)
  compiled = _Compiler(train_step, feed)
  log = _Log(workdir, schedule, batch_size)
  with (
    checkpoints.finished(),
    _stop_signals() as stop,
    ProgressReport("step", schedule.num_steps, step, batch_size) as progress,
  ):
    log.progress = progress
    while step < schedule.num_steps:
      end = schedule.dispatch_end(step)
      payload = feed.next(end - step)
      if profile[0] == step and profile[1] > step:
        jax.profiler.start_trace(str(workdir / "profile"))
      run = compiled(state, payload, end - step)
      state, metrics = run(state, feed.arrays, payload)
      log.add(step, metrics)
      if step < profile[1] <= end:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      step = end
      stopping = stop.requested(step)
      if schedule.checkpoints_at(step) or stopping:
        log.flush()
        progress.pause()
        found = validate(state) if validate is not None and schedule.validates_at(step) else {}
        if found:
          log.write(step, {f"validation/{k}": v for k, v in found.items()})
        meta = {"step": step, "feed": feed.state(), "metrics": found}
        checkpoints.save(step, state, meta, score=found.get(score) if score else None)
        progress.resume()
      if stopping:
        raise Stopped(f"saved at step {step}; the same command goes on from there", 128 + stopping)
  return state


class _Compiler:
  """The compiled program of n steps, one for each n that occurs; says how long compiling took and what memory it needs."""

  def __init__(self, train_step: StepFn, feed):
    self._programs = {}

    def run(state, arrays, payloads):
      def body(state, payload):
        return train_step(state, feed.take(arrays, payload))

      if jax.tree.leaves(payloads)[0].shape[0] == 1:  # no loop around a single step: XLA:CPU likes it better
        state, metrics = body(state, jax.tree.map(lambda x: x[0], payloads))
        return state, jax.tree.map(lambda m: m[None], metrics)
      return jax.lax.scan(body, state, payloads)

    self._run = jax.jit(run, donate_argnums=0)
    self._arrays = feed.arrays

  def __call__(self, state, payload, num_steps):
    if num_steps not in self._programs:
      start = time.perf_counter()
      self._programs[num_steps] = self._run.lower(state, self._arrays, payload).compile()
      seconds = time.perf_counter() - start
      say(f"compiled {num_steps} step(s) in {seconds:.1f} s; {_memory(self._programs[num_steps])}")
    return self._programs[num_steps]


def _memory(program) -> str:
  analysis = program.memory_analysis()
  if analysis is None:
    return "this backend does not tell what memory it needs"
  needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
  return f"estimate: {(needed - analysis.alias_size_in_bytes) / 2**30:.2f} GiB on each device"


class _Log:
  """Metrics to metrics.jsonl, TensorBoard and the progress line; fetched one dispatch late, so the device never waits."""

  def __init__(self, workdir: Workdir, schedule: Schedule, batch_size: int):
    self._workdir, self._schedule, self._batch_size = workdir, schedule, batch_size
    self._pending = None
    self._window: list[dict[str, float]] = []
    self._started = None
    self._estimated = False
    self._tensorboard = _tensorboard_writer(workdir)
    self.progress: ProgressReport | None = None

  def add(self, first_step: int, metrics: dict) -> None:
    """The metrics, arrays [n], of the dispatch that starts at `first_step`."""
    pending, self._pending = self._pending, (first_step, metrics)
    if pending is not None:
      self._take(*pending)

  def flush(self) -> None:
    """Fetches what is pending."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      self._take(*pending)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """One line of metrics at `step`."""
    self._workdir.append_metrics(step, metrics)
    if self._tensorboard is not None:
      self._tensorboard.write_scalars(step, metrics)
      self._tensorboard.flush()

  def _take(self, first_step: int, metrics: dict) -> None:
    host = jax.device_get(metrics)
    count = len(host["loss"])
    for i in range(count):
      row = {name: float(values[i]) for name, values in host.items()}
      for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
          raise RunError(
            f"{name} is {row[name]} at step {first_step + i}: stopped; "
            "earlier checkpoints are untouched (try a smaller learning rate or optimizer.clip_norm)"
          )
      self._window.append(row)
    step = first_step + count
    self._estimate(step, count)
    if step % self._schedule.log_every == 0 or step == self._schedule.num_steps:
      means = {name: float(np.mean([row[name] for row in self._window])) for name in self._window[0]}
      self.write(step, means)
      self._window.clear()
    self.progress.update(step, f"loss {row['loss']:.3f}")

  def _estimate(self, step: int, count: int) -> None:
    """Says once, from the third dispatch, how long training will take."""
    now = time.perf_counter()
    if self._started is None:
      self._started = (now, step)
      return
    then, first = self._started
    if not self._estimated and step - first >= 2 * count:
      self._estimated = True
      seconds = (now - then) / (step - first)
      left = (self._schedule.num_steps - step) * seconds
      say(
        f"estimate: {seconds * 1e3:.0f} ms a step, {self._batch_size / seconds:,.0f} images/s, "
        f"about {duration(left)} of training steps to go, validation apart"
      )


def _tensorboard_writer(workdir: Workdir):
  """clu's writer where TensorFlow and TensorBoard are installed, else None."""
  installed = all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard"))
  if not installed or not parallel.is_main_process():
    return None
  from clu import metric_writers

  return metric_writers.SummaryWriter(str(workdir / "tensorboard"))


@dataclasses.dataclass
class _Stop:
  number: int = 0

  def requested(self, step: int) -> int:
    """The number of the signal that asked to stop, the same on every process; 0 if none did."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
    return self.number


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
  """SIGTERM and Ctrl-C ask for a stop after the step in flight; a second one kills.

  In a multi-host run JAX itself listens for SIGTERM and agrees with the other hosts on a common step.
  """
  stop = _Stop()

  def handler(number, frame):
    del frame
    stop.number = number
    signal.signal(number, signal.SIG_DFL)
    say("stopping after this step; once more kills")

  numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
  try:
    before = {number: signal.signal(number, handler) for number in numbers}
  except ValueError:  # not the main thread (a notebook server): its owner has the signals
    before = {}
  try:
    yield stop
  finally:
    for number, old in before.items():
      signal.signal(number, old)


def parse_profile(text: str) -> tuple[int, int]:
  """'10:20' -> (10, 20); '' -> (0, 0), no trace."""
  if not text:
    return (0, 0)
  try:
    first, last = (int(part) for part in text.split(":"))
  except ValueError:
    raise InputError(f"train.profile takes 'first:last' steps, found {text!r}") from None
  if not 0 <= first < last:
    raise InputError(f"train.profile needs 0 <= first < last, found {text!r}")
  return first, last
