"""The one training loop: dispatch, log, validate, checkpoint, resume, stop."""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental import multihost_utils

from jax_trustdiff import parallel
from jax_trustdiff.training.checkpoints import Checkpoints, template
from jax_trustdiff.training.progress import ProgressReport, duration, say
from jax_trustdiff.training.state import StepFn, TrainState, joined, without_backbone
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, PyTree, RunError, Stopped


@runtime_checkable
class Feed(Protocol):
  """What `fit` needs of its data: the batch of every step is a function of the step's number alone."""

  arrays: PyTree  # stay on the devices; an argument of the compiled step

  def take(self, arrays: PyTree, payload: PyTree) -> Any:
    """The batch of one step, inside jit; `payload` is one row of what `next` returned."""

  def start(self, step: int) -> None:
    """The following `next` begins with the batch of `step`."""

  def next(self, num_steps: int) -> PyTree:
    """Global arrays [num_steps, ...]: the payloads of the following steps; moves on by as many."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """How long to train and how often to do what, in optimizer steps.

  What happens at a step depends on its number alone, so that an interrupted run does the same as an
  undisturbed one. validate_every = 0: never. profile = (first, last): the steps first .. last - 1 are traced;
  (0, 0): none. InputError for numbers that make no plan.
  """

  num_steps: int
  log_every: int
  checkpoint_every: int
  validate_every: int = 0
  steps_per_dispatch: int = 1
  profile: tuple[int, int] = (0, 0)

  def __post_init__(self):
    for field in ("num_steps", "log_every", "checkpoint_every", "steps_per_dispatch"):
      if getattr(self, field) < 1:
        raise InputError(f"train.{field} must be at least 1, found {getattr(self, field)}")
    if self.validate_every < 0:
      raise InputError(
        f"validation every {self.validate_every} steps: give a positive number, or 0 for never"
      )
    first, last = self.profile
    if last and not 0 <= first < min(last, self.num_steps):
      raise InputError(
        f"train.profile needs first < last and first below the {self.num_steps} steps of the run,"
        f" found {first}:{last}"
      )

  def dispatch_end(self, step: int) -> int:
    """The step at which the dispatch that starts at `step` ends: nothing is due inside a dispatch."""
    periods = (self.steps_per_dispatch, self.log_every, self.checkpoint_every, self.validate_every)
    events = [*((step // p + 1) * p for p in periods if p), *(p for p in self.profile if p > step)]
    return min([self.num_steps, *events])

  def validates_at(self, step: int) -> bool:
    """Whether validation is due once `step` steps are done."""
    return bool(self.validate_every) and (step % self.validate_every == 0 or step == self.num_steps)

  def checkpoints_at(self, step: int) -> bool:
    """Whether a checkpoint is due once `step` steps are done."""
    return step % self.checkpoint_every == 0 or step == self.num_steps or self.validates_at(step)

  def logs_at(self, step: int) -> bool:
    """Whether a line of metrics is due once `step` steps are done."""
    return step % self.log_every == 0 or step == self.num_steps

  def traces_at(self, step: int) -> bool:
    """Whether the step that starts once `step` steps are done is traced."""
    return self.profile[0] <= step < self.profile[1]


def fit(
  state: TrainState,
  train_step: StepFn,
  feed: Feed,
  plan: Plan,
  workdir: Workdir,
  checkpoints: Checkpoints,
  batch_size: int,
  validate: Callable[[TrainState], dict[str, float]] | None = None,
  score: str | None = None,
) -> TrainState:
  """Trains `state` to plan.num_steps and returns the final state.

  Starts from the newest checkpoint in the workdir if there is one, exactly: parameters, optimizer, average,
  statistics, step and so the order of the data, and the metrics since their last line. The buffers of `state`
  are given up, but for a frozen network's, before anything is restored. `validate(state)` returns metrics, of which
  `score` ranks the checkpoints. `batch_size` is for images/s. The steps of plan.profile are traced into workdir/profile. Records `input_stall`, at most
  the part of the time of training steps in which the devices waited for data, since the start or the resumption.
  RunError at a loss that is not finite, naming the step; Stopped after SIGTERM or Ctrl-C, saved.
  """
  window = None
  if checkpoints.latest_step() is not None:
    moving, frozen = without_backbone(state)
    wanted = template(moving)
    jax.tree.map(lambda x: x.delete(), moving)  # else two states would be on the devices
    moving, meta = checkpoints.restore_latest(wanted)
    state = joined(moving, frozen)
    window = meta["window"]
    say(f"resuming at step {int(state.step)} of {plan.num_steps}")
  step = int(state.step)
  workdir.forget_metrics_after(step)
  if step >= plan.num_steps:
    return state

  feed.start(step)
  compiled = _Compiler(train_step, feed)
  with (
    checkpoints.finished(),
    _stop_signals() as stop,
    ProgressReport("step", plan.num_steps, step, batch_size) as progress,
    _Log(workdir, plan, batch_size, progress, window) as log,
    _Trace(workdir, plan) as trace,
  ):
    idle, metrics = _Idle(), None
    while step < plan.num_steps:
      end = plan.dispatch_end(step)
      with idle.waiting(metrics):
        payload = feed.next(end - step)
      run = compiled(state, payload, end - step)
      trace.before(step)
      state, metrics = run(state, feed.arrays, payload)
      log.add(step, metrics)
      trace.after(end, state)
      step = end
      stopping = stop.requested()
      if plan.checkpoints_at(step) or stopping:
        log.flush()
        progress.pause()
        idle.pause()
        found = validate(state) if validate is not None and plan.validates_at(step) else {}
        if found:
          log.write(step, {f"validation/{k}": v for k, v in found.items()})
        meta = {"step": step, "metrics": found, "window": log.window()}
        moving, _ = without_backbone(state)
        checkpoints.save(step, moving, meta, score=found.get(score) if score else None)
        workdir.keep_seconds()
        idle.resume()
        progress.resume()
      if stopping:
        raise Stopped(f"saved at step {step}; the same command goes on from there", 128 + stopping)
  if (stall := idle.report()) is not None:
    workdir.record("input_stall", stall)
  return state


class _Idle:
  """How long the devices waited for data: at most the time that data took where the dispatch before was done when they came."""

  def __init__(self):
    self._waited, self._started, self._paused = 0.0, None, 0.0

  def pause(self) -> None:
    """Validation and checkpoints begin, whose time is not that of steps."""
    self._paused = time.perf_counter()

  def resume(self) -> None:
    """Steps go on."""
    if self._started is not None:
      self._started += time.perf_counter() - self._paused

  @contextlib.contextmanager
  def waiting(self, metrics: dict | None):
    """Around the reading of data; `metrics` are those of the dispatch before, None for the first."""
    start = time.perf_counter()
    yield
    if metrics is None:
      return
    if self._started is None:  # the first dispatch was compiled
      self._started = start
    if metrics["loss"].is_ready():
      self._waited += time.perf_counter() - start

  def report(self) -> float | None:
    """Says and returns it, as a part of the time since the second dispatch without pauses; None if there was no second."""
    if self._started is None:
      return None
    share = self._waited / (time.perf_counter() - self._started)
    say(f"the devices waited for data in {share:.2%} of the time of training steps, at most")
    return share


class _Compiler:
  """The compiled program of n steps, one for each n that occurs; says how long it took and what memory it needs."""

  def __init__(self, train_step: StepFn, feed: Feed):
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


class _Trace:
  """The profiler, on during the steps of plan.profile and off at the end, however it comes."""

  def __init__(self, workdir: Workdir, plan: Plan):
    self._folder, self._plan = workdir / "profile", plan
    self._tracing = False

  def before(self, step: int) -> None:
    """The dispatch that starts at `step` comes next."""
    if self._plan.traces_at(step) and not self._tracing:
      # a folder of its own: the profiler names its files by the second
      jax.profiler.start_trace(str(self._folder / f"from_step_{step}"))
      self._tracing = True

  def after(self, step: int, state: TrainState) -> None:
    """`state` is what the dispatch that ends at `step` returned, or will return."""
    if self._tracing and not self._plan.traces_at(step):
      jax.block_until_ready(state)
      self._stop()

  def _stop(self) -> None:
    self._tracing = False
    jax.profiler.stop_trace()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._tracing:
      self._stop()


class _Log:
  """Metrics to metrics.jsonl, TensorBoard and the progress line; fetched one dispatch late: the device never waits.

  window: what `window` returned when the checkpoint was saved that the run goes on from.
  """

  def __init__(
    self, workdir: Workdir, plan: Plan, batch_size: int, progress: ProgressReport, window: dict | None = None
  ):
    self._workdir, self._plan, self._batch_size, self._progress = workdir, plan, batch_size, progress
    self._pending = None
    self._count, self._sums = (window["count"], dict(window["sums"])) if window else (0, {})
    self._started = None
    self._estimated = False
    self._tensorboard = _tensorboard_writer(workdir)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._tensorboard is not None:
      self._tensorboard.close()

  def window(self) -> dict:
    """The sums of the metrics since the last line and the number of their steps, as JSON."""
    return {"count": self._count, "sums": dict(self._sums)}

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
      self._sums = {name: self._sums.get(name, 0.0) + value for name, value in row.items()}
      self._count += 1
    step = first_step + count
    self._estimate(step, count)
    if self._plan.logs_at(step):
      self.write(step, {name: total / self._count for name, total in self._sums.items()})
      self._count, self._sums = 0, {}
    self._progress.update(step, f"loss {row['loss']:.3f}")

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
      left = (self._plan.num_steps - step) * seconds
      say(
        f"estimate: {seconds * 1e3:.0f} ms a step, {self._batch_size / seconds:,.0f} images/s, "
        f"about {duration(left)} of training steps to go, validation apart"
      )


def _tensorboard_writer(workdir: Workdir):
  """clu's writer where TensorFlow and TensorBoard are installed, else None."""
  installed = all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorboard"))
  if not installed or not parallel.is_main_process():
    return None
  import tensorflow as tf

  try:
    tf.config.set_visible_devices([], "GPU")  # it would take the memory that the training needs
  except RuntimeError:
    say("TensorFlow is already in use in this process and keeps what it has of the GPU's memory")
  from clu import metric_writers

  return metric_writers.SummaryWriter(str(workdir / "tensorboard"))


# Dispatches of this process, counted through all its runs: processes of a multi-host run count alike.
_dispatches = itertools.count(1)


@dataclasses.dataclass
class _Stop:
  number: int = 0

  def requested(self) -> int:
    """The number of the signal that asked to stop, the same on every process, or 0; to be asked once a dispatch."""
    if jax.process_count() > 1:
      # True at one count only, the one after the largest that a process had reached; steps would jump over it.
      return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(_dispatches)) else 0
    return self.number


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
  """SIGTERM and Ctrl-C ask for a stop after the step in flight; a second one kills.

  In a multi-host run JAX itself listens for SIGTERM and agrees with the other hosts on a common step; Ctrl-C in
  one process is passed on as SIGTERM, so that all stop there and not only this one.
  """
  stop = _Stop()

  def handler(number, frame):
    del frame
    signal.signal(number, signal.SIG_DFL)
    if jax.process_count() > 1:
      say("stopping with the other processes at a step they agree on; once more kills this one")
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      stop.number = number
      say("stopping after this step; once more kills")

  numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
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
