"""The training loop on a linear classifier of the bundled digits: exact resume, stops, checkpoints, sharding."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff import parallel
from jax_trustdiff.data import pipeline, sources
from jax_trustdiff.training import loop, optimizers, state
from jax_trustdiff.training.checkpoints import Checkpoints
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError, Stopped, to_unit

CONFIG = {"task": "test", "seed": 0}


def init(key):
  return {"params": {"kernel": 0.01 * jax.random.normal(key, (64, 10)), "bias": jnp.zeros(10)}, "batch_stats": {}}


def loss_fn(params, batch_stats, batch, key, step):
  x = to_unit(batch["image"]).reshape(len(batch["image"]), -1)
  x = x + 0.05 * jax.random.normal(key, x.shape)
  logits = x @ params["kernel"] + params["bias"]
  losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
  return losses.mean(), (batch_stats, {"clean_correct": (logits.argmax(1) == batch["label"]).mean()})


class Run:
  """One linear run in `path`, restartable; `poison` makes the loss not a number from that step on."""

  def __init__(self, path, poison=None, **schedule):
    defaults = dict(num_steps=40, log_every=10, checkpoint_every=15, validate_every=20)
    self.schedule = loop.Schedule(**(defaults | schedule))
    self.workdir = Workdir(path, CONFIG)
    self.mesh = parallel.make_mesh()
    source = sources.digits("train")
    self.feed = pipeline.ResidentFeed(source, pipeline.EpochSampler(len(source), 64, seed=5), self.mesh)
    self.optimizer = optimizers.sgd(optimizers.one_cycle(0.5, 1, 40), weight_decay=1e-3)
    self.poison = poison
    self.scores = iter([0.5, 0.4, 0.3, 0.2, 0.1])

  def loss(self, params, batch_stats, batch, key, step):
    loss, aux = loss_fn(params, batch_stats, batch, key, step)
    return (loss if self.poison is None else jnp.where(step >= self.poison, jnp.nan, loss)), aux

  def __call__(self, validate=None, accumulate=1):
    self.workdir.open()
    fresh = state.create_sharded(init, self.optimizer, jax.random.key(3), self.mesh, ())
    step = state.make_train_step(
      self.loss, self.optimizer, lambda t: optimizers.ema_decay(t, 0.9, 4), accumulate
    )
    self.checkpoints = Checkpoints(self.workdir / "checkpoints")
    try:
      return loop.fit(
        fresh, step, self.feed, self.schedule, self.workdir, self.checkpoints, 64, validate=validate, score="score"
      )
    finally:
      self.workdir.close()


def bits(train_state):
  leaves = jax.tree.leaves(dataclasses.replace(train_state, key=jax.random.key_data(train_state.key)))
  return [np.asarray(leaf).tobytes() for leaf in leaves]


def stopping_feed(run, at):
  """Sends this process SIGTERM when the payload of step `at` is asked for."""
  plain = run.feed.next

  def next(num_steps):
    if run.feed.step <= at < run.feed.step + num_steps:
      os.kill(os.getpid(), signal.SIGTERM)
    return plain(num_steps)

  run.feed.next = next


@pytest.mark.floor
@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_stop_and_resume_is_bit_for_bit(tmp_path, per_dispatch):
  undisturbed = Run(tmp_path / "a", steps_per_dispatch=per_dispatch)
  expected = bits(undisturbed())
  for at in (7, 23):
    run = Run(tmp_path / "b", steps_per_dispatch=per_dispatch)
    stopping_feed(run, at)
    with pytest.raises(Stopped) as stopped:
      run()
    assert stopped.value.exit_code == 143 and "the same command goes on" in str(stopped.value)
    assert run.checkpoints.latest_step() > at
  resumed = Run(tmp_path / "b", steps_per_dispatch=per_dispatch)
  assert bits(resumed()) == expected
  lines = [run.workdir.read_metrics() for run in (undisturbed, resumed)]
  assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [10, 20, 30, 40]
  assert lines[0][-1] == lines[1][-1]


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


def test_several_steps_a_dispatch_give_the_same_training(tmp_path):
  one, four = Run(tmp_path / "1")(), Run(tmp_path / "4", steps_per_dispatch=4)()
  np.testing.assert_allclose(one.params["kernel"], four.params["kernel"], rtol=1e-5, atol=1e-6)


def test_accumulation_averages_gradients():
  batch = {"image": jnp.arange(8.0).reshape(8, 1)}

  def loss(params, batch_stats, batch, key, step):
    value = (params["w"] * batch["image"]).mean()
    return value, (batch_stats + 1, {"rows": jnp.float32(len(batch["image"]))})

  optimizer = optimizers.sgd(optimizers.constant(1.0, 1, 1, momentum=0.0), weight_decay=0.0)
  make = lambda key: {"params": {"w": jnp.ones(())}, "batch_stats": jnp.zeros(())}  # noqa: E731
  start = state.create(make, optimizer, jax.random.key(0))
  after = {}
  for accumulate in (1, 4):
    step = jax.jit(state.make_train_step(loss, optimizer, lambda t: 0.5, accumulate))
    after[accumulate], metrics = step(start, batch)
    assert metrics["rows"] == 8 / accumulate and after[accumulate].batch_stats == accumulate
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
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["30", "35", "40"]


def test_an_unreadable_newest_checkpoint_is_set_aside(tmp_path, capfd):
  expected = bits(Run(tmp_path / "a")())
  run = Run(tmp_path / "b")
  stopping_feed(run, 32)
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


def test_dispatches_end_at_every_event():
  schedule = loop.Schedule(num_steps=25, log_every=10, checkpoint_every=7, steps_per_dispatch=4)
  ends, step = [], 0
  while step < 25:
    step = schedule.dispatch_end(step)
    ends.append(step)
  assert ends == [4, 7, 8, 10, 12, 14, 16, 20, 21, 24, 25]
  with pytest.raises(InputError, match="train.log_every must be at least 1, found 0"):
    loop.Schedule(num_steps=25, log_every=0, checkpoint_every=7)
