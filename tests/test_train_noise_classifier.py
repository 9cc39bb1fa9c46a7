"""Noise classifiers from training to guided generation: what a run writes, resuming, kinds of exports, guided images."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_trustdiff
from jax_trustdiff import config as config_lib
from jax_trustdiff import main as main_lib
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.diffusion.solvers import initial_noise
from jax_trustdiff.interop import export, pretrained, safetensors_io
from jax_trustdiff.models.registry import NOISE_CLASSIFIERS, forward_flops
from jax_trustdiff.tasks import denoisers, image_training, noise_classifiers, train_noise_classifier
from jax_trustdiff.tasks import generate as generate_task
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, to_signed

SMALL = "configs/noise_classifier.py:smoke"
OVERRIDES = {
  "model.model_channels": 16,
  "model.channel_mult": (1, 2),
  "diffusion.loss.name": "edm",  # not much noise: it is learned sooner
  "diffusion.loss.log_mean": -0.7,
  "train.num_images": 3200,
  "train.num_train": 600,
  "train.log_every": 25,
  "train.checkpoint_every": 50,
  "train.validate_every": 50,
  "schedule.learning_rate": 0.005,
  "schedule.rampup_images": 320,
  "ema.half_life": 640,
  "eval.sigmas": (0.1, 0.5, 5.0),
}
TINY = dict(model_channels=8, channel_mult=(1,), num_blocks=1, attention_resolutions=())


def config_of(**overrides):
  return config_lib.load(SMALL, OVERRIDES | overrides)


def complete(path, config):
  workdir = Workdir(path, config)
  return workdir.complete(lambda: train_noise_classifier.run(config, workdir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, config, metrics) of a run of 100 steps on the digits."""
  path, config = tmp_path_factory.mktemp("classifier") / "run", config_of()
  return path, config, complete(path, config)


# ---- training ----


def test_a_run_writes_what_it_found(trained):
  path, _, metrics = trained
  assert (metrics["num_steps"], metrics["first/step"]) == (100, 50)
  assert metrics["loss"] < metrics["first/loss"] < np.log(10)
  assert metrics["sigma_0.1_accuracy"] > 0.7 and "first/sigma_5_accuracy" in metrics
  assert metrics["sigma_0.1_accuracy"] > metrics["sigma_5_accuracy"]
  assert json.loads((path / "result.json").read_text())["metrics"] == metrics
  page = (path / "report/report.html").read_text()
  assert "sigma_0.5_accuracy" in page and page.count("data:image/png") == 2
  assert f"{metrics['loss']:.3f} nats" in page and "2.303" in page


def test_the_export_is_the_averaged_classifier(trained):
  """Loaded in one call it has the loss and the accuracies of the last step."""
  path, config, metrics = trained
  classifier = jax_trustdiff.load_noise_classifier(path / "export")
  assert classifier.network.num_classes == 10 and classifier.network.image_shape == (8, 8, 1)
  held_out = image_training.load_data(config).validation
  batch = held_out.take(np.arange(32))
  keys, x0 = image_training.held_out_keys(config.seed, batch["id"]), to_signed(batch["image"])
  for sigma in config.eval.sigmas:
    x = x0 + sigma * initial_noise(keys, (8, 8, 1))
    found = jax.jit(lambda f, x, sigma: f(x, jnp.full(32, sigma)))(classifier, x, sigma).argmax(1)
    assert (found == batch["label"]).mean() == metrics[noise_classifiers.accuracy_at(sigma)]
  meta = export.read_description(path / "export")
  assert meta["class_names"] == list("0123456789") and meta["metrics"] == metrics
  assert meta["preconditioning"] == {"name": "edm", "sigma_data": 0.5}


def test_a_run_that_lost_its_second_half_ends_bit_for_bit_the_same(trained, tmp_path):
  path, config, metrics = trained
  again = tmp_path / "again"
  shutil.copytree(path, again)
  for name in ("checkpoints/100", "export", "report"):
    shutil.rmtree(again / name)
  (again / "result.json").unlink()
  assert complete(again, config) == metrics
  for name in ("export/model.safetensors", "metrics.jsonl"):
    assert (again / name).read_bytes() == (path / name).read_bytes(), name


@pytest.mark.slow
def test_training_goes_on_from_an_export(trained, tmp_path):
  path, _, metrics = trained
  few = {"train.num_images": 320, "schedule.learning_rate": 1e-4}
  found = complete(tmp_path / "more", config_of(init_from=str(path / "export"), **few))
  assert found["num_steps"] == 10 and found["loss"] == pytest.approx(metrics["loss"], rel=0.05)


def test_another_preconditioning_is_refused(trained, tmp_path):
  path, _, _ = trained
  other = config_of(init_from=str(path / "export"), **{"diffusion.preconditioning.sigma_data": 0.7})
  with pytest.raises(
    InputError, match="was trained with EDMPreconditioning.*and diffusion.preconditioning is"
  ):
    complete(tmp_path / "run", other)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"eval.sigmas": ()}, "eval.sigmas must be different positive noise levels"),
    ({"eval.sigmas": (0.0, 1.0)}, "eval.sigmas"),
    ({"eval.sigmas": (1.0, 1.0)}, "eval.sigmas"),
    ({"train.num_validation": 0}, "give at least 1"),
    ({"eval.batch_size": 0}, "batch size 0 is not divisible"),
    ({"train.num_images": 10}, "less than one batch"),
    ({"model.model_channels": 10}, "multiple of 4"),
    ({"diffusion.loss.log_std": 0.0}, "log_std"),
    ({"init_from": "nowhere"}, "nowhere"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(tmp_path / "run", config_of(**overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


# ---- exports ----


def save(folder, **changes):
  """An export of a tiny classifier with constant variables; its network."""
  changes = {"image_shape": (8, 8, 1), "num_classes": 10, "class_names": list("0123456789")} | changes
  names, preconditioning = changes.pop("class_names"), changes.pop("preconditioning", {"name": "edm"})
  network = NOISE_CLASSIFIERS["noise_classifier"](**TINY | changes)
  section = noise_classifiers.model_section({"name": "noise_classifier"} | TINY, network)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
  noise_classifiers.save_noise_classifier(folder, section, preconditioning, variables, {"class_names": names})
  return network, variables


def test_exports_keep_the_preconditioning(tmp_path):
  network, variables = save(tmp_path, preconditioning={"name": "ve", "sigma_max": 50.0})
  classifier = noise_classifiers.load_noise_classifier(tmp_path)
  assert classifier.network == network and (classifier.preconditioning.sigma_max, classifier.dropout_key) == (
    50,
    None,
  )
  jax.tree.map(np.testing.assert_array_equal, classifier.variables, variables)
  assert (
    pretrained.load_variables(tmp_path, dataclasses.replace(network, dropout=0.5))[1]["num_classes"] == 10
  )


def test_every_kind_of_network_is_told_from_the_others(tmp_path):
  network, variables = save(tmp_path / "noisy")
  clean = dict(name="wide_resnet", depth=10, width=1, num_classes=2, image_shape=(8, 8, 1))
  export.save_export(tmp_path / "clean", clean, {})
  export.save_export(tmp_path / "diffusion", {"name": "ddpmpp"}, {})
  section = noise_classifiers.model_section({"name": "noise_classifier"} | TINY, network)
  for name, extra in (("bare", {}), ("other", {"preconditioning": {"name": "edn"}})):
    export.save_export(tmp_path / name, section, variables, extra)
  safetensors_io.save_flat(tmp_path / "x.safetensors", {"x": np.zeros(1)})
  load = noise_classifiers.load_noise_classifier
  for name, read, message in (
    ("noisy", jax_trustdiff.load_classifier, "classifier of noisy images .*: see load_noise_classifier"),
    ("noisy", denoisers.load_denoiser, r"holds a classifier \(noise_classifier\), no diffusion model"),
    ("clean", load, r"another network \(wide_resnet\), no classifier of noisy images"),
    ("diffusion", load, r"another network \(ddpmpp\), no classifier of noisy images"),
    ("bare", load, "model.json needs 'preconditioning': {'name': one of edm, "),
    ("other", load, "unknown name 'edn' .did you mean 'edm'"),
    ("absent", load, "no export in"),
    ("x.safetensors", lambda path: pretrained.load_variables(path, network), "has no names of torch"),
  ):
    with pytest.raises(InputError, match=message) as caught:
      read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
  with pytest.raises(InputError, match="has no names of torch"):
    pretrained.save_torch(tmp_path / "y.safetensors", network, variables)


def test_flops_are_counted():
  """The convolutions and products of a tiny network, by hand."""
  network = NOISE_CLASSIFIERS["noise_classifier"](num_classes=3, image_shape=(4, 4, 2), **TINY)
  pixels, width = 16, 32
  convolutions = 2 * pixels * 9 * (2 * 8 + 2 * 8 * 8)
  products = 2 * (8 * width + width * width + width * 2 * 8 + 8 * 3)
  assert forward_flops(network, 2) == 2 * (convolutions + products)


# ---- generation ----


def generate(workdir, *more):
  few = ("num_images=40", "images_per_shard=40", "micro_batch=8", "batch_size=8")
  arguments = ["--config=configs/generate_cifar.py:smoke", f"--workdir={workdir}"]
  arguments += ["--config.untrained.num_classes=0", "--config.sampler.num_steps=8"]
  arguments += ["--config.sampler.sigma_min=0.02", "--config.sampler.sigma_max=5.0"]
  return main_lib.main(["main", *arguments, *(f"--config.generate.{key}" for key in few), *more])


def test_a_classifier_guides_a_model_without_classes(trained, tmp_path):
  """An untrained model is the exact denoiser of white noise images; guided, they are what the classifier wants."""
  path, _, _ = trained
  guided = (f"--config.guidance.classifier={path}/export", "--config.guidance.classifier_scale=6.0")
  assert generate(tmp_path / "unguided", "--config.generate.labels=none") == 0
  assert generate(tmp_path / "guided", *guided) == 0
  assert generate(tmp_path / "batch", *guided, "--config.generate.batch_size=40") == 0
  unguided, images = (
    np.asarray(SOURCES["image_store"](str(tmp_path / name / "images")).images)
    for name in ("unguided", "guided")
  )
  source = SOURCES["image_store"](str(tmp_path / "guided/images"))
  np.testing.assert_array_equal(source.labels, np.arange(40) % 10)
  assert source.class_names == tuple("0123456789")
  np.testing.assert_array_equal(images, SOURCES["image_store"](str(tmp_path / "batch/images")).images)

  classifier = jax_trustdiff.load_noise_classifier(path / "export")
  judge = jax.jit(lambda f, x: f(x, jnp.full(len(x), 0.05)).argmax(1))
  right = [(judge(classifier, to_signed(x)) == source.labels).mean() for x in (unguided, images)]
  assert right[0] < 0.3 and right[1] > 0.8, right
  metrics = json.loads((tmp_path / "guided/result.json").read_text())["metrics"]
  assert metrics["nfe"] == metrics["network_evaluations"] == 15 and metrics["count/3"] == 4


def test_the_origin_of_guided_images_is_the_classifier_itself(tmp_path):
  """Not its path: a copy is the same, other variables or another preconditioning are not."""
  save(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "copy")
  save(tmp_path / "told", preconditioning={"name": "edm", "sigma_data": 0.4})
  shutil.copytree(tmp_path / "a", tmp_path / "moved")
  variables = safetensors_io.load(tmp_path / "a" / export.ARRAYS)
  variables = jax.tree.map(lambda x: x + 1, variables)
  safetensors_io.save(tmp_path / "moved" / export.ARRAYS, variables)

  def origin(name, **more):
    changes = {"guidance.classifier": str(tmp_path / name) if name else ""} | more
    return generate_task.load_model(config_lib.load("configs/generate_cifar.py:smoke", changes)).provenance["guidance"]

  plain = {"scale": 1.0, "sigma_min": 0.0, "sigma_max": 1e9}
  assert origin("") == plain  # that of the stores made before there were classifiers
  one = origin("a")
  assert one == plain | {"classifier": one["classifier"], "classifier_scale": 1.0} == origin("copy")
  assert len({origin(name)["classifier"] for name in ("a", "told", "moved")}) == 3
  assert origin("a", **{"guidance.classifier_scale": 2.0}) == one | {"classifier_scale": 2.0}


@pytest.mark.parametrize(
  "classifier, changes, says",
  [
    (None, {"guidance.classifier_scale": 2.0}, "needs guidance.classifier"),
    (None, {"untrained.num_classes": 0}, "is not possible without guidance.classifier"),
    ({}, {"generate.labels": "none"}, "guidance.classifier needs labels"),
    ({}, {"untrained.num_classes": 0, "guidance.scale": 2.0}, "needs a model with classes"),
    ({}, {"untrained.num_classes": 0, "generate.labels": "10"}, "classes are 0..9"),
    ({"image_shape": (8, 8, 3)}, {}, r"images of \(8, 8, 3\), and those of the model are \(8, 8, 1\)"),
    ({"num_classes": 3, "class_names": list("abc")}, {}, "knows 3 classes, and the model has 10"),
    (
      {"preconditioning": {"name": "ve", "sigma_max": 50.0}},
      {},
      "classifier of the guidance knows 0.02 to 50",
    ),
  ],
)
def test_a_guidance_that_does_not_fit_is_one_line(tmp_path, capsys, classifier, changes, says):
  if classifier is not None:
    save(tmp_path / "export", **classifier)
    changes = {"guidance.classifier": tmp_path / "export"} | changes
  arguments = ["--config=configs/generate_cifar.py:smoke", f"--workdir={tmp_path}/run"]
  assert main_lib.main(["main", *arguments, *(f"--config.{k}={v}" for k, v in changes.items())]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert re.search(says, line), line
  assert not (tmp_path / "run").exists()


def test_classes_must_have_the_names_of_the_model(tmp_path):
  network, _ = save(tmp_path)
  model = denoisers.build_network({"name": "ddpmpp"} | TINY, (8, 8, 1), 10)
  names = lambda model, given: noise_classifiers.load_to_guide(tmp_path, model, given)[1]["class_names"]  # noqa: E731
  assert names(model, ()) == names(model, tuple("0123456789")) == tuple("0123456789")
  assert names(dataclasses.replace(model, num_classes=0), ("cat", "dog")) == tuple("0123456789")
  with pytest.raises(InputError, match="class 2 is '2'; in the model it is 'x'"):
    names(model, tuple("01x3456789"))
