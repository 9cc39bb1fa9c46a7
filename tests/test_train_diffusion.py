"""Training of diffusion models as a task: recipes, resuming, what is exported, bad input."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LONG

import jax_trustdiff
from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.data import records
from jax_trustdiff.models.registry import num_params
from jax_trustdiff.tasks import denoisers, image_training, posthoc_ema, train_diffusion
from jax_trustdiff.tasks.sampling import ImageSampler, balanced_labels
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

SMALL = "configs/edm_cifar.py:digits"
OVERRIDES = {
  "model.name": "uvit",
  "model.size": "tiny",
  "model.patch_size": 2,
  "model.embed_dim": 32,
  "model.depth": 2,
  "model.num_heads": 2,
  "train.num_images": 640,
  "train.batch_size": 32,
  "train.num_train": 512,
  "train.log_every": 5,
  "train.checkpoint_every": 10,
  "train.validate_every": 10,
  "schedule.rampup_images": 64,
  "ema.power_stds": (0.05, 0.1),
  "eval.num_samples": 32,
  "eval.num_reference": 64,
  "eval.num_pictures": 8,
  "eval.batch_size": 16,
  "sampler.num_steps": 3,
  "metrics.batch_size": 32,
  "metrics.kid_subset_size": 16,
  "metrics.kid_subsets": 2,
}


def config_of(**overrides):
  return config_lib.load(SMALL, OVERRIDES | overrides)


def complete(path, config):
  workdir = Workdir(path, config)
  return workdir.complete(lambda: train_diffusion.run(config, workdir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, config, metrics) of a run of 20 steps."""
  path, config = tmp_path_factory.mktemp("diffusion") / "run", config_of()
  return path, config, complete(path, config)


def test_a_run_writes_what_it_found(trained):
  path, config, metrics = trained
  assert metrics["num_steps"] == 20 and metrics["first/step"] == 10
  assert metrics["loss"] < metrics["first/loss"]
  assert metrics["num_generated"] == 32 and metrics["num_reference"] == 64
  assert {"pixel_fid", "pixel_kid", "pixel_precision", "pixel_recall", "first/pixel_fid"} <= set(metrics)
  assert "fid" not in metrics  # pixels make no FID that anyone publishes
  assert [p.name for p in sorted((path / "samples").iterdir())] == ["00000010.png", "00000020.png"]
  page = (path / "report/report.html").read_text()
  assert "pixel_fid" in page and page.count("data:image/png") == 4
  lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "validation/loss" in line] == [10, 20]


def test_the_export_is_the_averaged_model(trained):
  """Loaded in one call it makes the pictures of the last step."""
  path, config, _ = trained
  denoise = jax_trustdiff.load_denoiser(path / "export")
  meta = denoisers.describe(path / "export")
  assert meta["class_names"] == tuple("0123456789") and meta["sampler"] == config_lib.to_plain(config.sampler)
  sampler = denoisers.build_sampler(meta["sampler"], denoise.preconditioning)
  sample = ImageSampler(sampler, denoise.network.image_shape, parallel.make_mesh(data=1), 16, config.seed)
  images = sample(denoise, np.arange(8), balanced_labels(np.arange(8), 10))
  from PIL import Image

  shown = np.asarray(Image.open(path / "samples/00000020.png").convert("L"))
  tile = shown[: 8 * 8, : 8 * 8].reshape(8, 8, 8, 8)[
    :, 0, :, 0
  ]  # every pixel is 8 x 8, the first image at the corner
  np.testing.assert_array_equal(tile, images[0, ..., 0])


def test_power_averages_make_another_average(trained, tmp_path):
  """Snapshots of both validations are there, and the task for any length of average reads them."""
  path, _, _ = trained
  names = sorted(p.name for p in (path / "ema").iterdir())
  assert names == [f"{step:08d}-std{std}.safetensors" for step in (10, 20) for std in (0.05, 0.1)]
  config = config_lib.load("configs/posthoc_ema.py", {"init_from": str(path), "ema.std": 0.1})
  workdir = Workdir(tmp_path / "posthoc", config)
  workdir.complete(lambda: posthoc_ema.run(config, workdir))
  made = jax_trustdiff.load_denoiser(tmp_path / "posthoc/export")
  stored = next(s for s in posthoc_ema.read_snapshots(path / "ema") if (s.step, s.std) == (20, 0.1)).load()
  for ours, theirs in zip(jax.tree.leaves(made.variables["params"]), jax.tree.leaves(stored), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_run_that_lost_its_second_half_ends_bit_for_bit_the_same(trained, tmp_path):
  path, config, metrics = trained
  again = tmp_path / "again"
  shutil.copytree(path, again)
  shutil.rmtree(again / "checkpoints/20")
  for name in ("export", "report", "ema"):
    shutil.rmtree(again / name)
  (again / "result.json").unlink()
  assert complete(again, config) == metrics
  for name in (
    "export/model.safetensors",
    "metrics.jsonl",
    "samples/00000020.png",
    "ema/00000020-std0.1.safetensors",
  ):
    assert (again / name).read_bytes() == (path / name).read_bytes(), name


@pytest.mark.slow
def test_micro_batches_train_too(trained, tmp_path):
  path, _, metrics = trained
  found = complete(tmp_path / "run", config_of(**{"train.accumulate": 16, "ema.power_stds": ()}))
  assert found["loss"] == pytest.approx(metrics["loss"], rel=0.2)


def test_training_goes_on_from_an_export(trained, tmp_path):
  """The average is not forgotten: after few steps it is still near that of the export."""
  path, _, metrics = trained
  config = config_of(init_from=str(path / "export"), **{"train.num_images": 320})
  found = complete(tmp_path / "more", config)
  assert found["loss"] < metrics["first/loss"]
  before, after = (
    jax_trustdiff.load_denoiser(p / "export").variables["params"] for p in (path, tmp_path / "more")
  )
  moved = [
    float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
  ]
  assert 0 < max(moved) < 0.01


def source(shape, num_classes):
  images = np.zeros((2, *shape), np.uint8)
  return records.image_source([images], [np.zeros(2, np.int32)], "zeros", num_classes)


@pytest.mark.parametrize(
  "recipe, shape, num_classes, count",
  [
    ("edm_cifar.py", (32, 32, 3), 10, 55_735_299),
    ("edm_cifar.py:uncond", (32, 32, 3), 10, 55_733_891),
    ("edm_cifar.py:ncsnpp", (32, 32, 3), 10, 56_400_643),
    ("edm_cifar.py:uncond,config_e", (32, 32, 3), 10, 55_732_739),
    ("edm_cifar.py:uncond,config_a", (32, 32, 3), 10, 61_804_419),
    ("edm_64.py:ffhq", (64, 64, 3), 1, 61_805_571),
    ("edm_64.py:afhqv2,ncsnpp", (64, 64, 3), 3, 62_761_091),
    ("edm_64.py:imagenet", (64, 64, 3), 1000, 295_899_267),
    ("edm_64.py:tinyimagenet", (64, 64, 3), 200, 295_286_595),
  ],
)
def test_recipes_have_the_networks_of_the_paper(recipe, shape, num_classes, count):
  model = train_diffusion.build_model(config_lib.load(f"configs/{recipe}"), source(shape, num_classes))
  assert num_params(jax.eval_shape(model.network.init, jax.random.key(0))) == count


def test_configurations_change_one_thing_after_another():
  """Table 2 of Karras et al. 2022 upwards: each row keeps what the one below it has."""
  rows = [config_lib.load(f"configs/edm_cifar.py:uncond,config_{letter}") for letter in "abcde"]
  rows.append(config_lib.load("configs/edm_cifar.py:uncond"))
  changed = [
    {line.split(":")[0].split(".")[0] for line in config_lib.difference(a, b)}
    for a, b in zip(rows, rows[1:], strict=False)
  ]
  assert changed[0] == {"optimizer", "schedule", "ema", "model", "train", "eval"}  # hyper-parameters
  assert changed[1] == {"model"}  # capacity
  assert changed[2] == {"diffusion"} and rows[3].diffusion.preconditioning.name == "edm"
  assert changed[3] == {"diffusion"} and rows[4].diffusion.loss.name == "edm"
  assert changed[4] == {"augment", "augment_pipe"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "variant",
  [
    "vp",
    "ve",
    "ddpm",
    pytest.param("ncsnpp", marks=LONG),
    pytest.param("uncond", marks=LONG),
    pytest.param("config_a", marks=LONG),
    "ncsnpp,config_c",
    "model.name=adm",
    "model.name=uvit,model.embed_dim=32,model.depth=2,model.num_heads=2,model.patch_size=2",
  ],
)
def test_every_variant_trains_and_samples(tmp_path, variant):
  """Two steps of the smallest network; samples lie in range and the loss is a number."""
  few = {"sampler.num_steps": 3, "eval.num_samples": 0, "train.num_images": 64, "train.validate_every": 2}
  if "uvit" not in variant:
    few["model.channel_mult"] = (1,)
  config = config_lib.load(f"configs/edm_cifar.py:{variant},smoke", few)
  found = complete(tmp_path / "run", config)
  assert np.isfinite(found["loss"]) and found["num_steps"] == 2
  assert list((tmp_path / "run/samples").iterdir())


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"train.num_images": 10}, "less than one batch"),
    ({"train.accumulate": 3}, "does not divide"),
    ({"eval.num_samples": 1}, "at least 2"),
    ({"eval.num_reference": 10_000}, "training images"),
    ({"eval.num_pictures": 0}, "num_pictures"),
    ({"eval.metrics_every": 15}, "multiple of train.validate_every"),
    ({"ema.half_life": 0}, "half_life"),
    ({"model.embed_dim": 33}, "embed_dim"),
    ({"model.patch_size": 3}, "divisible"),
    ({"diffusion.loss.log_std": 0.0}, "log_std"),
    ({"sampler.num_steps": 1}, "num_steps"),
    ({"train.num_validation": 600}, "validation"),
    ({"init_from": "nowhere"}, "nowhere"),
    ({"augment_pipe.name": "edm"}, "augmentation"),
    ({"metrics.kid_subset_size": 50}, "kid_subset_size"),
    ({"ema.power_stds": (0.5,)}, "std"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(tmp_path / "run", config_of(**overrides))
  assert "\n" not in str(caught.value)
  assert list(pathlib.Path(tmp_path).iterdir()) == []


@pytest.mark.slow
def test_the_loss_sees_augmentation_labels_dropout_and_classes():
  """Each of them changes the loss of one batch: none is lost on the way to the network."""
  changes = {"augment_pipe.name": "edm", "model.dropout": 0.5, "model.channel_mult": (1,)}
  config = config_lib.load("configs/edm_cifar.py:smoke", changes)
  data = image_training.load_data(config)
  batch = jax.tree.map(jnp.asarray, data.train.take(np.arange(4)))
  fresh = train_diffusion.build_model(config, data.train).network.init(jax.random.key(1))
  leaves, tree = jax.tree.flatten(fresh)
  keys = jax.random.split(jax.random.key(2), len(leaves))  # layers that start at zero would hide everything
  noisy = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
  variables = jax.tree.unflatten(tree, noisy)

  def loss_of(labels=None, **overrides):
    changed = config_lib.from_plain(config_lib.to_plain(config))
    config_lib.override(changed, overrides)
    loss = train_diffusion.make_loss(changed, train_diffusion.build_model(changed, data.train))
    label = batch["label"] if labels is None else jnp.full(4, labels)
    return np.asarray(loss(variables, batch | {"label": label}, jax.random.key(3)))

  base = loss_of()
  np.testing.assert_array_equal(loss_of(), base)
  assert (loss_of(labels=11 - batch["label"][0]) != base).all()
  assert (loss_of(**{"model.dropout": 0.0}) != base).all()
  assert (loss_of(**{"augment_pipe.probability": 1.0}) != base).all()  # each image gets all of them
  assert (loss_of(**{"model.label_dropout": 0.99}) != base).any()
