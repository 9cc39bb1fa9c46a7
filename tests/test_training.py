"""The training loop on a linear classifier of the bundled digits: exact resume, stops, checkpoints, sharding."""

import asyncio
import dataclasses
import errno
import fcntl
import gc
import importlib.machinery
import io
import json
import logging
import os
import pathlib
import shutil
import signal
import socket
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workers

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, sources
from jax_trustdiff.training import loop, optimizers, progress, state, workdir
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError, Stopped, to_unit

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = {"task": "test", "seed": 0}


def init(key):
  kernel = 0.01 * jax.random.normal(
    key, (64, 16)
  )  # six classes more than there are: large enough to be sharded
  return {"params": {"kernel": kernel, "bias": jnp.zeros(16)}}


def loss_fn(params, collections, batch, key, step):
  x = to_unit(batch["image"]).reshape(len(batch["image"]), -1)
  x = x + 0.05 * jax.random.normal(key, x.shape)
  logits = x @ params["kernel"] + params["bias"]
  losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
  return losses.mean(), (collections, {"clean_correct": (logits.argmax(1) == batch["label"]).mean()})


class Run:
  """One linear run in `path`, restartable; `poison` makes the loss not a number from that step on."""

  def __init__(self, path, poison=None, mesh=None, rules=(), **plan):
    defaults = dict(num_steps=40, log_every=10, checkpoint_every=15, validate_every=20)
    self.plan = loop.Plan(**(defaults | plan))
    self.workdir = Workdir(path, CONFIG)
    self.mesh, self.rules = mesh or parallel.make_mesh(), rules
    source = sources.digits(split="train")
    self.feed = pipeline.ResidentFeed(source, pipeline.EpochSampler(len(source), 64, seed=5), self.mesh)
    self.optimizer = optimizers.sgd(optimizers.one_cycle(0.5, 1, 40), weight_decay=1e-3)
    self.poison = poison

  def loss(self, params, collections, batch, key, step):
    loss, aux = loss_fn(params, collections, batch, key, step)
    return (loss if self.poison is None else jnp.where(step >= self.poison, jnp.nan, loss)), aux

  def __call__(self, validate=None, accumulate=1):
    self.workdir.open()
    self.fresh = state.create_sharded(init, self.optimizer, jax.random.key(3), self.mesh, self.rules)
    step = state.make_train_step(
      self.loss, self.optimizer, lambda t: optimizers.ema_decay(t, 0.9, 4), accumulate
    )
    self.checkpoints = Checkpoints(self.workdir / "checkpoints")
    try:
      return loop.fit(
        self.fresh,
        step,
        self.feed,
        self.plan,
        self.workdir,
        self.checkpoints,
        64,
        validate=validate,
        score="score",
      )
    finally:
      self.workdir.close()
      self.checkpoints.close()


def bits(train_state):
  leaves = jax.tree.leaves(dataclasses.replace(train_state, key=jax.random.key_data(train_state.key)))
  return [np.asarray(leaf).tobytes() for leaf in leaves]


def lines(path):
  return (path / "metrics.jsonl").read_text().splitlines()


def signal_at(run, step, number=signal.SIGTERM):
  """Sends this process a signal when the payload of `step` is asked for."""
  plain = run.feed.next

  def next(num_steps):
    if run.feed.step <= step < run.feed.step + num_steps:
      os.kill(os.getpid(), number)
    return plain(num_steps)

  run.feed.next = next


@pytest.mark.floor
@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_stop_and_resume_is_bit_for_bit(tmp_path, per_dispatch):
  undisturbed = Run(tmp_path / "a", steps_per_dispatch=per_dispatch)
  expected = bits(undisturbed())
  for at in (7, 23):
    run = Run(tmp_path / "b", steps_per_dispatch=per_dispatch)
    signal_at(run, at)
    with pytest.raises(Stopped) as stopped:
      run()
    assert stopped.value.exit_code == 143 and "the same command goes on" in str(stopped.value)
    assert run.checkpoints.latest_step() > at
  resumed = Run(tmp_path / "b", steps_per_dispatch=per_dispatch)
  assert bits(resumed()) == expected
  assert [json.loads(line)["step"] for line in lines(tmp_path / "a")] == [10, 20, 30, 40]
  assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_frozen_network_is_in_no_checkpoint_and_there_again(tmp_path, monkeypatch):
  plain = init

  def with_backbone(key):
    return plain(key) | {"backbone": {"shift": jax.random.normal(jax.random.fold_in(key, 1), (64,))}}

  monkeypatch.setattr(sys.modules[__name__], "init", with_backbone)
  expected = Run(tmp_path / "a")()
  assert expected.collections["backbone"]["shift"].shape == (64,)
  run = Run(tmp_path / "b")
  signal_at(run, 7)
  with pytest.raises(Stopped):
    run()
  stored = "".join(p.read_text() for p in (tmp_path / "b" / "checkpoints").rglob("_METADATA"))
  assert "kernel" in stored and "backbone" not in stored
  assert bits(Run(tmp_path / "b")()) == bits(expected)


def test_ctrl_c_saves_and_stops_with_its_own_exit_code(tmp_path):
  run = Run(tmp_path)
  signal_at(run, 12, signal.SIGINT)
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(Stopped) as stopped:
    run()
  assert stopped.value.exit_code == 130 and "saved at step 13" in str(stopped.value)
  assert run.checkpoints.latest_step() == 13
  assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_left_as_it_is(tmp_path):
  expected = bits(Run(tmp_path)())
  before = (tmp_path / "metrics.jsonl").read_text()
  assert bits(Run(tmp_path)()) == expected
  assert (tmp_path / "metrics.jsonl").read_text() == before


def test_training_learns_and_the_average_lags(tmp_path):
  final = Run(tmp_path)()
  losses = [line["loss"] for line in Workdir(tmp_path, CONFIG).read_metrics()]
  assert losses[0] > 1.2 * losses[-1]
  gap = jnp.abs(final.ema["kernel"] - final.params["kernel"]).max()
  assert 0 < gap < jnp.abs(final.params["kernel"]).max()


def test_dispatches_of_several_steps_give_the_same_training(tmp_path):
  """Dispatches of 1, 2 and 3 steps, cut by lines and checkpoints, beside single steps."""
  plain = Run(tmp_path / "1", log_every=7, checkpoint_every=5)
  cut = Run(tmp_path / "3", log_every=7, checkpoint_every=5, steps_per_dispatch=3)
  assert bits(plain()) == bits(cut())
  assert lines(tmp_path / "1") == lines(tmp_path / "3") and len(lines(tmp_path / "1")) == 6


def test_accumulation_averages_gradients():
  batch = {"image": jnp.arange(8.0).reshape(8, 1)}

  def loss(params, collections, batch, key, step):
    value = (params["w"] * batch["image"]).mean()
    return value, ({"count": collections["count"] + 1}, {"rows": jnp.float32(len(batch["image"]))})

  optimizer = optimizers.sgd(optimizers.constant(1.0, 1, 1, momentum=0.0), weight_decay=0.0)
  make = lambda key: {"params": {"w": jnp.ones(())}, "count": jnp.zeros(())}  # noqa: E731
  start = state.create(make, optimizer, jax.random.key(0))
  after = {}
  for accumulate in (1, 4):
    step = jax.jit(state.make_train_step(loss, optimizer, lambda t: 0.5, accumulate))
    after[accumulate], metrics = step(start, batch)
    assert metrics["rows"] == 8 / accumulate and after[accumulate].collections["count"] == accumulate
  assert after[1].params["w"] == after[4].params["w"] == 1 - 3.5
  assert after[4].ema["w"] == 0.5 * 1 + 0.5 * (1 - 3.5)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
  with pytest.raises(RunError, match="loss is nan at step 33"):
    Run(tmp_path, poison=33)()
  assert Checkpoints(tmp_path / "checkpoints").latest_step() == 30
  assert all(np.isfinite(line["loss"]) for line in Workdir(tmp_path, CONFIG).read_metrics())


def test_best_and_last_are_kept(tmp_path):
  scores = {10: 0.2, 20: 0.7, 30: 0.7, 40: 0.1}
  run = Run(tmp_path, validate_every=10, checkpoint_every=5)
  final = run(validate=lambda s: {"score": scores[int(s.step)]})
  best, meta = run.checkpoints.restore_best(final)
  assert int(best.step) == meta["step"] == 30  # of equal scores the later
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == [
    "30",
    "35",
    "40",
  ]


def test_an_unreadable_newest_checkpoint_is_set_aside(tmp_path, capfd):
  expected = bits(Run(tmp_path / "a")())
  run = Run(tmp_path / "b")
  signal_at(run, 32)
  with pytest.raises(Stopped):
    run()
  newest = run.checkpoints.latest_step()
  shutil.rmtree(tmp_path / f"b/checkpoints/{newest}/state/d")
  capfd.readouterr()
  assert bits(Run(tmp_path / "b")()) == expected
  said = capfd.readouterr().err
  assert said.count(f"checkpoint {newest} cannot be read") == 1 and "going on from step 30" in said
  assert "Traceback" not in said
  assert (tmp_path / f"b/checkpoints.unreadable/{newest}").is_dir()


def test_no_readable_checkpoint_is_an_error_that_moves_nothing(tmp_path):
  Run(tmp_path)()
  folder = tmp_path / "checkpoints"
  for step in [p for p in folder.iterdir() if p.name.isdigit()]:
    shutil.rmtree(step / "state")
  before = sorted(p.name for p in folder.iterdir())
  with pytest.raises(RunError, match="none of the checkpoints"):
    Run(tmp_path)()
  assert sorted(p.name for p in folder.iterdir()) == before


def test_workdir_refuses_another_config_and_a_second_writer(tmp_path):
  workdir = Workdir(tmp_path / "run", CONFIG)
  workdir.open()
  with pytest.raises(InputError, match=r"another config \(seed: 0 -> 1\)"):
    Workdir(tmp_path / "run", CONFIG | {"seed": 1}).check()
  with pytest.raises(InputError, match="in use by another process"):
    Workdir(tmp_path / "run", CONFIG).check()
  workdir.close()
  Workdir(tmp_path / "run", CONFIG).check()
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.tex").write_text("x")
  with pytest.raises(InputError, match="not a run's folder"):
    Workdir(tmp_path / "other", CONFIG).check()


def test_metrics_survive_a_torn_line(tmp_path):
  workdir = Workdir(tmp_path, CONFIG)
  workdir.append_metrics(10, {"loss": 1.0})
  workdir.append_metrics(20, {"loss": 0.5})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 30, "lo')
  workdir.forget_metrics_after(15)
  assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
    {"step": 10, "loss": 1.0}
  ]


def traces(path):
  return sorted(path.glob("profile/**/*.xplane.pb"))


def test_a_profile_does_not_change_the_training(tmp_path):
  """The bounds 10 and 19 are no multiples of the four steps of a dispatch."""
  expected = bits(Run(tmp_path / "a", steps_per_dispatch=4)())
  assert bits(Run(tmp_path / "b", steps_per_dispatch=4, profile=(10, 19))()) == expected
  assert len(traces(tmp_path / "b")) == 1 and traces(tmp_path / "a") == []


def test_a_stop_in_the_profile_closes_it_and_the_resumed_run_goes_on_tracing(tmp_path):
  run = Run(tmp_path, profile=(10, 30))
  signal_at(run, 12)
  with pytest.raises(Stopped):
    run()
  assert len(traces(tmp_path)) == 1
  Run(tmp_path, profile=(10, 30))()
  assert len(traces(tmp_path)) == 2


def test_a_profile_past_the_end_and_one_cut_by_an_error_are_closed(tmp_path):
  Run(tmp_path / "end", profile=(35, 100))()
  assert len(traces(tmp_path / "end")) == 1
  with pytest.raises(RunError, match="at step 33"):
    Run(tmp_path / "error", poison=33, profile=(31, 40))()
  assert len(traces(tmp_path / "error")) == 1


def test_dispatches_end_at_every_event():
  plan = loop.Plan(num_steps=25, log_every=10, checkpoint_every=7, steps_per_dispatch=4)
  ends, step = [], 0
  while step < 25:
    step = plan.dispatch_end(step)
    ends.append(step)
  assert ends == [4, 7, 8, 10, 12, 14, 16, 20, 21, 24, 25]
  profiled = dataclasses.replace(plan, steps_per_dispatch=10, profile=(3, 12))
  assert [profiled.dispatch_end(step) for step in (0, 3, 7, 10, 12)] == [3, 7, 10, 12, 14]
  assert [step for step in range(25) if profiled.traces_at(step)] == list(range(3, 12))


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"log_every": 0}, "train.log_every must be at least 1, found 0"),
    ({"validate_every": -98}, "validation every -98 steps: give a positive number, or 0 for never"),
    ({"profile": (25, 30)}, "first below the 25 steps of the run, found 25:30"),
    ({"profile": (9, 9)}, "needs first < last .* found 9:9"),
  ],
)
def test_a_wrong_plan_is_refused(wrong, message):
  with pytest.raises(InputError, match=message):
    loop.Plan(**(dict(num_steps=25, log_every=5, checkpoint_every=7) | wrong))


def test_profile_texts():
  assert loop.parse_profile("10:20") == (10, 20) and loop.parse_profile("") == (0, 0)
  with pytest.raises(InputError, match="takes 'first:last' steps, found '10-20'"):
    loop.parse_profile("10-20")
  with pytest.raises(InputError, match="needs 0 <= first < last, found '20:10'"):
    loop.parse_profile("20:10")


# ---- the folder ----


def test_the_lock_works_where_flock_asks_for_a_writable_file(tmp_path, monkeypatch):
  """NFS makes it a lock of fcntl: EBADF for a file opened for reading only, EACCES where another holds it."""
  plain = fcntl.flock

  def flock(file, operation):
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
      raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
      plain(file, operation)
    except BlockingIOError:
      raise OSError(errno.EACCES, os.strerror(errno.EACCES)) from None

  monkeypatch.setattr(workdir.fcntl, "flock", flock)
  run = Workdir(tmp_path / "run", CONFIG)
  run.open()
  with pytest.raises(InputError, match="in use by another process"):
    Workdir(tmp_path / "run", CONFIG).check()
  run.close()
  Workdir(tmp_path / "run", CONFIG).check()


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
  def flock(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(workdir.fcntl, "flock", flock)
  with pytest.raises(InputError, match=r"cannot be locked \(No locks available\)"):
    Workdir(tmp_path / "run", CONFIG).open()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("x")
  with pytest.raises(InputError, match=r"cannot be made: .*/file is a file"):
    Workdir(tmp_path / "file" / "run", CONFIG).check()
  for attempt in (Workdir.check, Workdir.open):
    with pytest.raises(InputError, match="cannot be used: File name too long; take another --workdir"):
      attempt(Workdir(tmp_path / ("x" * 300), CONFIG))
  (tmp_path / "torn").mkdir()
  (tmp_path / "torn" / "config.json").write_text('{"task":')
  with pytest.raises(InputError, match="config.json is not JSON"):
    Workdir(tmp_path / "torn", CONFIG).check()
  (tmp_path / "run").mkdir()
  monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)  # the superuser may write everywhere
  for name in ("run", "a/b"):
    with pytest.raises(InputError, match="not writable"):
      Workdir(tmp_path / name, CONFIG).check()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run", "torn"]  # nothing was written


def test_the_seconds_of_earlier_sessions_count(tmp_path, monkeypatch):
  config = config_lib.from_plain(CONFIG)
  now = [100.0]
  monkeypatch.setattr(workdir.time, "monotonic", lambda: now[0])

  def session(work):
    whole = Workdir(tmp_path / "run", config)
    part = whole.sub("part", config)
    part.open()
    now[0] += work
    return whole, part

  whole, part = session(5.0)
  part.close()
  whole.close()
  whole, part = session(10.0)
  part.keep_seconds()  # as at a checkpoint
  now[0] += 1000.0  # then killed: what came after is not known
  for folder in (whole, part):
    folder._lock.close()
  whole, part = session(20.0)
  for folder in (whole, part):
    folder.write_result({"accuracy": 1.0})
    assert json.loads((folder / "result.json").read_text())["seconds"] == 35.0


def test_a_run_is_finished_for_what_it_read_at_its_start_and_left_at_its_end(tmp_path):
  """What changed while it ran, it may not have seen; what it changed itself, it has."""
  config, there, runs = config_lib.from_plain(CONFIG), {"read": "a", "left": ""}, []
  states = {"reads": lambda: there["read"], "leaves": lambda: there["left"]}

  def run(changes):
    folder = Workdir(tmp_path / "run", config)

    def task():
      folder.open()
      runs.append(dict(there))
      there.update(changes)
      return {"accuracy": 1.0}

    return folder.complete(task, **states)

  run({"left": "mine"})
  run({})
  assert len(runs) == 1
  there["left"] = "another's"
  run({"left": "mine"})
  assert len(runs) == 2
  there["read"] = "b"
  run({"read": "c"})  # while it ran
  run({})
  run({})
  assert len(runs) == 4
  states["reads"] = lambda: None  # never finished
  run({})
  run({})
  assert len(runs) == 6


def test_a_result_shows_every_change_of_its_text(tmp_path):
  folder = Workdir(tmp_path / "run", config_lib.from_plain(CONFIG))
  folder.complete(lambda: folder.open() or {"accuracy": 0.5, "never": float("nan")})
  file = folder / "result.json"
  whole = file.read_bytes()
  assert workdir.result_fault(file) == ""
  for place in range(len(whole)):
    damaged = bytearray(whole)
    damaged[place] ^= 7 if damaged[place] == 10 else 1  # the end of a line becomes another kind of it
    file.write_bytes(damaged)
    assert workdir.result_fault(file) == "it was changed", place
  file.write_text("[]\n")
  assert workdir.result_fault(file) == "it was changed"


# ---- what a run says ----


def test_the_bar_goes_where_the_terminal_is(monkeypatch, capsys):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  with progress.ProgressReport("step", 10) as report:
    report.update(10, "loss 1.234")
  assert "loss 1.234" in terminal.getvalue()
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("in_use", [False, True])
def test_tensorboard_gets_the_metrics_and_tensorflow_no_gpu(tmp_path, monkeypatch, capfd, in_use):
  calls = []

  class Writer:
    def __init__(self, folder):
      calls.append(("made", folder))

    def write_scalars(self, step, metrics):
      calls.append((step, sorted(metrics)))

    def flush(self):
      calls.append("flush")

    def close(self):
      calls.append("close")

  def set_visible_devices(devices, kind):
    calls.append((devices, kind))
    if in_use:
      raise RuntimeError("Visible devices cannot be modified after being initialized")

  def module(name, **contents):
    found = types.ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    found.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, found)
    return found

  module("tensorflow", config=types.SimpleNamespace(set_visible_devices=set_visible_devices))
  module("tensorboard")
  module("clu", metric_writers=module("clu.metric_writers", SummaryWriter=Writer))
  Run(tmp_path, num_steps=20)(validate=lambda s: {"score": 1.0})
  names = ["clean_correct", "grad_norm", "loss"]
  assert calls == [
    ([], "GPU"),
    ("made", str(tmp_path / "tensorboard")),
    *((10, names), "flush", (20, names), "flush", (20, ["validation/score"]), "flush"),
    "close",
  ]
  assert ("TensorFlow is already in use" in capfd.readouterr().err) == in_use


# ---- checkpoints ----


def test_an_unreadable_best_checkpoint_has_a_successor(tmp_path, capfd):
  scores = {10: 0.7, 20: 0.3, 30: 0.2, 40: 0.1}
  run = Run(tmp_path, validate_every=10, checkpoint_every=10)
  final = run(validate=lambda s: {"score": scores[int(s.step)]})
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  assert checkpoints.restore_best(final)[1]["step"] == 10
  shutil.rmtree(tmp_path / "checkpoints/10/state/d")
  capfd.readouterr()
  best, meta = checkpoints.restore_best(final)
  assert int(best.step) == meta["step"] == 30
  said = capfd.readouterr().err
  assert said.count("checkpoint 10 cannot be read") == 1 and "taking step 30, its score is 0.2" in said
  assert "Traceback" not in said
  (tmp_path / "checkpoints/30/metrics/metrics").write_text("{")
  assert checkpoints.restore_best(final)[1]["step"] == 40
  assert "the score of checkpoint 30 cannot be read" in capfd.readouterr().err
  for step in (30, 40):
    shutil.rmtree(tmp_path / f"checkpoints/{step}/state")
  with pytest.raises(RunError, match="none of the checkpoints in .* can be read"):
    checkpoints.restore_best(final)
  checkpoints.close()


def test_without_scores_there_is_no_best(tmp_path):
  final = Run(tmp_path)()
  with Checkpoints(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.restore_best(final) is None


def test_a_resumed_run_holds_one_state_while_it_restores(tmp_path, monkeypatch):
  run = Run(tmp_path)
  signal_at(run, 12)
  with pytest.raises(Stopped):
    run()
  resumed, seen = Run(tmp_path), []
  plain = Checkpoints._restore

  def restore(self, step, template):
    seen.extend(leaf.is_deleted() for leaf in jax.tree.leaves(resumed.fresh))
    return plain(self, step, template)

  monkeypatch.setattr(Checkpoints, "_restore", restore)
  resumed()
  assert seen == [True] * len(jax.tree.leaves(resumed.fresh)) and len(seen) > 5


def full_disk():
  """As TensorStore says it: the system's text within its own."""
  cause = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
  error = ValueError("could not write")
  error.__cause__ = ExceptionGroup("two writers", [ValueError("other"), cause])
  return error


@pytest.mark.parametrize(
  "error, full",
  [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
    (ValueError("RESOURCE_EXHAUSTED: Error writing d/0: [OS error 28: No space left on device]"), True),
    (full_disk(), True),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."), False),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
  ],
)
def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch, error, full):
  checkpoints = Checkpoints(tmp_path)

  def fail(*args, **kwargs):
    raise error

  with monkeypatch.context() as patched:
    patched.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(RunError if full else type(error)) as caught:
      checkpoints.save(1, {}, {})
  assert ("the disk is full" in str(caught.value)) == full
  checkpoints._quiet.remove()


def test_errors_of_others_are_not_held_back(tmp_path, capfd):
  filters = {name: list(logging.getLogger(name).filters) for name in ("absl", "asyncio")}
  hook = sys.unraisablehook
  with Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b"):
    assert sys.unraisablehook != hook

    async def fail():
      raise ValueError("mine")

    async def forget():
      asyncio.ensure_future(fail())
      await asyncio.sleep(0.01)

    handler = logging.StreamHandler(heard := io.StringIO())
    logging.getLogger("asyncio").addHandler(handler)
    asyncio.run(forget())
    logging.getLogger("asyncio").removeHandler(handler)
    assert "Task exception was never retrieved" in heard.getvalue() and "mine" in heard.getvalue()
  assert {name: logging.getLogger(name).filters for name in filters} == filters
  assert sys.unraisablehook == hook


FORGET = """
import asyncio

async def fail():
  raise ValueError("full")

async def task():
  asyncio.ensure_future(fail())
  await asyncio.sleep(0.01)

async def gather():
  asyncio.gather(fail(), fail())
  await asyncio.sleep(0.01)
"""


@pytest.mark.parametrize("how", ["task", "gather"])
@pytest.mark.parametrize("where, held_back", [("site-packages/orbax/checkpoint/x.py", True), ("x.py", False)])
def test_what_asyncio_says_of_orbax_is_held_back(tmp_path, how, where, held_back):
  """A future of asyncio.gather that failed is reported in other words than a task."""
  code = {}
  exec(compile(FORGET, where, "exec"), code)
  handler = logging.StreamHandler(heard := io.StringIO())
  gc.collect()  # or what other tests left would be heard
  logging.getLogger("asyncio").addHandler(handler)
  with Checkpoints(tmp_path):
    asyncio.run(code[how]())
    gc.collect()
  logging.getLogger("asyncio").removeHandler(handler)
  assert ("never retrieved" in heard.getvalue()) != held_back, heard.getvalue()


# ---- several devices, several processes ----


@pytest.mark.slow
def test_eight_devices_train_as_one_and_resume_exactly(tmp_path):
  process = workers.start("fit_worker.py", 8, "meshes", tmp_path / "eight")
  one = np.asarray(Run(tmp_path / "one")().params["kernel"])
  found = workers.answer(process)
  assert found["devices"] == 8
  for name, shape in (("replicated", [64, 16]), ("fsdp", [32, 16])):
    assert found[f"{name}/stopped"].startswith("saved at step 24;")
    assert found[f"{name}/pieces"] == [shape] * 4, name
    assert found[f"{name}/same"] and found[f"{name}/lines"], name
    np.testing.assert_allclose(found[f"{name}/kernel"], one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(tmp_path):
  """SIGTERM to the second, then Ctrl-C to the first, of two processes with four steps a dispatch."""
  before = 0
  for who, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    pair = [workers.start("fit_worker.py", 1, "until_stopped", tmp_path, address, 2, i) for i in range(2)]
    try:
      wait_for_lines(tmp_path, pair, past=before)
      pair[who].send_signal(number)
      found = [workers.answer(process) for process in pair]
    finally:
      for process in pair:
        process.kill()
    assert found[0] == found[1]
    assert found[0]["exit_code"] == 143 and found[0]["latest"] > before
    before = found[0]["latest"]
    assert found[0]["message"].startswith(f"saved at step {before};")
    assert (tmp_path / "checkpoints" / str(before)).is_dir()


def wait_for_lines(path, processes, past, seconds=120):
  """Returns when metrics.jsonl has a line of a step after `past`."""
  end = time.monotonic() + seconds
  while time.monotonic() < end and all(process.poll() is None for process in processes):
    if (path / "metrics.jsonl").exists() and any(json.loads(line)["step"] > past for line in lines(path)):
      return
    time.sleep(0.1)
  raise AssertionError(f"no line of metrics after step {past}")


def test_waiting_for_data_is_told(monkeypatch):
  """Seconds count where the dispatch before was done when the data came; the first dispatch, which compiles, does not."""
  clock, said = [0.0], []
  monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
  monkeypatch.setattr(loop, "say", said.append)
  idle = loop._Idle()
  assert idle.report() is None and not said  # nothing was trained
  for ready, seconds in ((None, 60.0), (True, 2.0), (False, 4.0), (True, 1.0)):
    metrics = None if ready is None else {"loss": types.SimpleNamespace(is_ready=lambda ready=ready: ready)}
    with idle.waiting(metrics):
      clock[0] += seconds
    clock[0] += 10.0  # of the dispatch
    idle.pause()
    clock[0] += 100.0  # of validation
    idle.resume()
  assert idle.report() == pytest.approx(3 / 37)  # seconds
  assert said == ["the devices waited for data in 8.11% of the time of training steps, at most"]
