"""The wiring of classifier training: every name can be chosen, and an initial network is used as it is."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.attacks.registry import ATTACKS
from jax_trustdiff.data import mixing
from jax_trustdiff.data.augment import AUGMENTATIONS
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.interop import export
from jax_trustdiff.models.registry import MODELS
from jax_trustdiff.robustness.objectives import OBJECTIVES
from jax_trustdiff.tasks import classifiers, reports, train_classifier
from jax_trustdiff.training import state
from jax_trustdiff.training.optimizers import OPTIMIZERS, SCHEDULES
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

SMOKE = "configs/at_cifar.py:smoke"
CHOICES = [
  (section, name)
  for section, registry in {
    "model": MODELS,
    "augment": AUGMENTATIONS,
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "eval.attack": ATTACKS,
  }.items()
  for name in registry
]


def built(config):
  """(network, data, trainer) of a config."""
  mesh = parallel.make_mesh()
  data = classifiers.load_data(config)
  network = classifiers.build_network(config.model, data.train)
  return network, data, train_classifier.build_trainer(config, network, data, mesh)


@pytest.mark.parametrize("section, name", CHOICES)
def test_every_name_can_be_chosen(section, name):
  overrides = {f"{section}.name": name}
  if name == "preact_resnet":
    overrides |= {"model.depth": 18, "model.width": 2}
  if name == "one_cycle_epochs":
    overrides |= {"schedule.warmup_fraction": 0.75}
  config = config_lib.load(SMOKE, overrides)
  network, data, trainer = built(config)
  attack = config_lib.build(ATTACKS, config.eval.attack)
  assert attack.norm == config.eval.attack.norm
  if section != "objective":
    return
  shapes = jax.eval_shape(lambda key: state.create(trainer.init, trainer.optimizer, key), jax.random.key(0))
  batch = {"image": jnp.zeros((64, 8, 8, 1), jnp.uint8), "label": jnp.zeros(64, jnp.int32)}
  after, metrics = jax.eval_shape(trainer.step, shapes, batch)
  assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, shapes)
  assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_best_checkpoint_is_the_most_robust_but_of_standard_training(tmp_path, monkeypatch, name):
  """Standard training withstands PGD least at its end: its most robust checkpoint would be one of the first."""

  class Asked(Exception):
    pass

  def ask(*args, score, **kwargs):
    raise Asked(score)

  monkeypatch.setattr(train_classifier.loop, "fit", ask)
  config = config_lib.load(SMOKE, {"objective.name": name, "train.num_train": 256})
  with pytest.raises(Asked, match="clean_accuracy" if name == "standard" else "pgd2_accuracy"):
    train_classifier.run(config, Workdir(tmp_path / "run", config))


@pytest.mark.parametrize("score, marked", [("clean_accuracy", "validation/clean_accuracy"), ("", "")])
def test_the_report_marks_the_step_of_the_best_checkpoint(tmp_path, monkeypatch, score, marked):
  class Asked(Exception):
    pass

  def ask(*args, score):
    raise Asked(score)

  monkeypatch.setattr(reports.report, "training_curves", ask)
  config = config_lib.load(SMOKE)
  workdir = Workdir(tmp_path / "run", config)
  workdir.open()
  with pytest.raises(Asked) as asked:
    verdicts = classifiers.Verdicts(np.ones(1, bool), np.ones(1, bool), {})
    reports.classifier_report(config, workdir, (), verdicts, {}, score)
  assert asked.value.args == (marked,)


def test_an_augmentation_that_does_not_fit_the_images_writes_nothing(tmp_path):
  config = config_lib.load(SMOKE, {"augment.name": "cutout"})
  with pytest.raises(InputError, match="18"):
    train_classifier.run(config, Workdir(tmp_path / "run", config))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_can_be_chosen(tmp_path, name):
  overrides = {"data.name": name}
  if name not in ("digits", "npz_or_digits"):
    overrides["data.path"] = str(tmp_path / "absent")
  if name == "tfds":
    overrides["data.dataset"] = "mnist"
  config = config_lib.load(SMOKE, overrides)
  if name in ("digits", "npz_or_digits"):
    assert len(classifiers.load_data(config).train) == 512 - 64
  else:
    with pytest.raises(InputError, match="absent"):
      classifiers.load_data(config)


@pytest.mark.parametrize("how", ["auto", "yes", "no"])
def test_images_are_resident_or_streamed_as_the_config_says(how):
  _, data, trainer = built(config_lib.load(SMOKE, {"train.resident": how}))
  resident = bool(jax.tree.leaves(trainer.feed.arrays))
  assert resident == (how != "no")
  trainer.feed.start(0)
  batch = trainer.feed.take(trainer.feed.arrays, jax.tree.map(lambda x: x[0], trainer.feed.next(1)))
  assert batch["image"].shape == (64, 8, 8, 1)
  trainer.feed.close()


@pytest.mark.parametrize(
  "num_images, batch_size, expected",
  [(50_000, 512, 98), (50_000, 1024, 49), (50_000, 2048, 25), (73_257, 2048, 36), (100_000, 512, 196)],
)
def test_an_epoch_is_counted_as_the_original_counts(num_images, batch_size, expected):
  assert train_classifier.steps_per_epoch(num_images, batch_size) == expected


def test_an_epoch_ends_with_a_batch_that_is_not_full():
  """All 1437 digits, of which 64 are for validation, in batches of 64: 23 steps, not 22."""
  _, data, trainer = built(config_lib.load(SMOKE, {"train.num_train": 0}))
  assert (data.epoch_images, len(data.train), trainer.steps_per_epoch) == (1437, 1373, 23)
  assert trainer.plan.num_steps == 2 * 23 and trainer.plan.validates_at(23)
  trainer.feed.close()


@pytest.mark.parametrize("how", ["yes", "no"])
def test_generated_images_are_in_every_batch_and_nowhere_else(tmp_path, how):
  """A quarter of 64 rows is real; the epoch stays that of the 512 real images, of which 64 are for validation."""
  np.savez(tmp_path / "a.npz", image=np.full((2000, 8, 8, 1), 7, np.uint8), label=np.arange(2000) % 10)
  settings = {"mixing.generated": str(tmp_path / "a.npz"), "mixing.ratio": 0.25, "train.resident": how}
  _, data, trainer = built(config_lib.load(SMOKE, settings))
  _, plain_data, plain = built(config_lib.load(SMOKE))
  assert trainer.plan == plain.plan and trainer.plan.num_steps == 2 * 512 // 64
  for name in ("train", "validation", "test"):
    ours, theirs = getattr(data, name), getattr(plain_data, name)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.images[:], theirs.images[:])
    assert not (ours.images[:] == 7).all(axis=(1, 2, 3)).any()
  assert (len(data.train), len(data.validation), len(data.generated)) == (448, 64, 2000)
  trainer.feed.start(0)
  for _ in range(3):
    batch = trainer.feed.take(trainer.feed.arrays, jax.tree.map(lambda x: x[0], trainer.feed.next(1)))
    generated = np.asarray(batch["id"]) < 0
    assert generated.sum() == 48 and (np.asarray(batch["image"])[generated] == 7).all()
    assert (np.asarray(batch["label"])[generated] == (-1 - np.asarray(batch["id"])[generated]) % 10).all()
    assert np.isin(np.asarray(batch["id"])[~generated], data.train.ids).all()
  trainer.feed.close()
  fewer = classifiers.load_data(config_lib.load(SMOKE, settings | {"mixing.num_generated": 100}))
  assert len(fewer.generated) == 100
  with pytest.raises(InputError, match=r"\[0, 1\], found 2.0"):
    built(config_lib.load(SMOKE, settings | {"mixing.ratio": 2.0}))


@pytest.mark.slow
@pytest.mark.computes
@pytest.mark.parametrize("walk", mixing.WALKS)
def test_a_run_with_generated_images_that_lost_its_end_ends_bit_for_bit_the_same(tmp_path, capfd, walk):
  """In the middle of an epoch of the real images and of a walk through the generated ones."""
  images = np.random.RandomState(0).randint(0, 256, (100, 8, 8, 1), np.uint8)
  np.savez(tmp_path / "a.npz", image=images, label=np.arange(100) % 10)
  settings = {"mixing.generated": str(tmp_path / "a.npz"), "mixing.ratio": 0.25, "mixing.walk": walk}
  settings |= {"objective.name": "standard", "train.validate_every_epochs": 0, "train.checkpoint_every": 10}
  config = config_lib.load(SMOKE, settings | {"eval.num_test": 60, "eval.attack.num_steps": 1})

  def complete(folder):
    workdir = Workdir(folder, config)
    return workdir.complete(lambda: train_classifier.run(config, workdir))

  metrics = complete(tmp_path / "run")
  again = tmp_path / "again"
  shutil.copytree(tmp_path / "run", again)
  for name in ("checkpoints/16", "export", "export_last", "report"):
    shutil.rmtree(again / name)
  (again / "result.json").unlink()
  capfd.readouterr()
  assert complete(again) == metrics
  assert "resuming at step 10 of 16" in capfd.readouterr().err
  for name in ("export_last/model.safetensors", "metrics.jsonl"):
    assert (again / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["trades", "standard", "ikl"])
def test_cutmix_trains_on_mixtures_with_soft_labels(name):
  """16 images in 4 mixtures are a step of 64; every label is of its image and of one other, with the shares of their pixels."""
  settings = {"train.cutmix": 4, "train.batch_size": 16, "objective.name": name}
  network, data, trainer = built(config_lib.load(SMOKE, settings))
  x, y = train_classifier._views(
    1,
    lambda images, key: images,
    4,
    10,
    {k: jnp.asarray(v) for k, v in data.train.take(range(16)).items()},
    jax.random.key(0),
  )
  assert x.shape == (64, 8, 8, 1) and y.shape == (64, 10)
  np.testing.assert_allclose(y.sum(1), 1, rtol=1e-6)
  assert ((y > 0).sum(1) <= 2).all() and ((y > 0).sum(1) == 2).any()
  shapes = jax.eval_shape(lambda key: state.create(trainer.init, trainer.optimizer, key), jax.random.key(0))
  batch = {"image": jnp.zeros((16, 8, 8, 1), jnp.uint8), "label": jnp.zeros(16, jnp.int32)}
  after, metrics = jax.eval_shape(trainer.step, shapes, batch)
  assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, shapes)
  assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"train.cutmix": 4, "objective.name": "consistency"}, "compares two augmentations"),
    ({"train.cutmix": -1}, "at least 0"),
    ({"train.cutmix": 4, "objective.name": "mart"}, "'mart' takes classes as labels"),
  ],
)
def test_cutmix_does_not_go_with_everything(overrides, message):
  with pytest.raises(InputError, match=message):
    built(config_lib.load(SMOKE, overrides))


def test_random_validation_holds_out_other_images_than_first():
  first, random = (
    classifiers.load_data(config_lib.load(SMOKE, {"train.validation_split": how})).validation
    for how in ("first", "random")
  )
  rows = np.arange(len(first))
  assert len(first) == len(random) == 64
  assert not np.array_equal(first.take(rows)["image"], random.take(rows)["image"])


def test_statistics_that_came_with_parameters_are_kept(tmp_path):
  config = config_lib.load(SMOKE, {"train.bn_momentum": 0.0, "objective.num_steps": 1})
  network, data, trainer = built(config)
  variables = jax.jit(network.init)(jax.random.key(1))
  variables["batch_stats"] = jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])
  section = classifiers.model_section(config, network)
  export.save_export(tmp_path / "export", section, jax.device_get(variables))
  tuned = config_lib.load(SMOKE, {"train.bn_momentum": 0.0, "init_from": str(tmp_path / "export")})
  found = classifiers.initial_variables(tuned, network)
  jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(variables))

  batch = {
    "image": jax.random.randint(jax.random.key(2), (64, 8, 8, 1), 0, 256).astype(jnp.uint8),
    "label": jnp.arange(64) % 10,
  }
  for settings, kept in ((config, False), (tuned, True)):
    step = train_classifier.build_trainer(settings, network, data, parallel.make_mesh()).step
    fresh = state.with_variables(state.create(network.init, trainer.optimizer, jax.random.key(0)), variables)
    after, _ = jax.jit(step)(fresh, batch)
    same = [
      np.allclose(a, b)
      for a, b in zip(jax.tree.leaves(after.collections), jax.tree.leaves(fresh.collections), strict=True)
    ]
    assert all(same) if kept else not any(same)


@pytest.mark.parametrize("change", [{"activation": "relu"}, {"mean": (0.1,)}, {"width": 2}])
def test_an_export_of_another_network_is_refused(tmp_path, change):
  config = config_lib.load(SMOKE)
  network, _, _ = built(config)
  variables = jax.device_get(jax.jit(network.init)(jax.random.key(1)))
  export.save_export(tmp_path / "export", classifiers.model_section(config, network), variables)
  other = config_lib.load(
    SMOKE, {"init_from": str(tmp_path / "export")} | {f"model.{k}": v for k, v in change.items()}
  )
  with pytest.raises(InputError, match=next(iter(change))):
    classifiers.initial_variables(other, dataclasses.replace(network, **change))
