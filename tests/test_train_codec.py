"""Training a codec: what a run writes, resuming, starting anew, what its attacks measure, bad input."""

import json
import os
import shutil

import numpy as np
import pytest

import jax_trustdiff
from jax_trustdiff import config as config_lib
from jax_trustdiff.evaluation import image_attacks
from jax_trustdiff.interop import export
from jax_trustdiff.tasks import codecs, image_training, train_codec
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError, to_unit

OVERRIDES = {
  "model.num_bits": 4,
  "model.width": 16,
  "train.num_images": 4800,
  "train.num_train": 600,
  "train.num_validation": 64,
  "train.log_every": 25,
  "train.checkpoint_every": 75,
  "train.validate_every": 75,
  "schedule.learning_rate": 0.005,
  "schedule.rampup_images": 320,
  "ema.half_life": 320,
  "gate.wait": 20,
  "gate.ramp": 60,
  "distortions.rotate": (),
  "distortions.crop": (0.0, 0.1),
}


def config_of(**overrides):
  return config_lib.load("configs/wm_codec.py:smoke", OVERRIDES | overrides)


def complete(path, config):
  workdir = Workdir(path, config)
  return workdir.complete(lambda: train_codec.run(config, workdir))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(workdir, config, metrics) of a run of 150 steps on the digits."""
  path, config = tmp_path_factory.mktemp("codec") / "run", config_of()
  return path, config, complete(path, config)


def test_a_run_writes_what_it_found(trained):
  path, config, metrics = trained
  assert (metrics["num_steps"], metrics["first/step"], metrics["restarts"]) == (150, 75, 0)
  assert metrics["bit_accuracy"] > 0.95 and metrics["psnr"] > metrics["first/psnr"]
  assert 0 < metrics["learned_at_step"] < 75
  assert json.loads((path / "result.json").read_text())["metrics"] == metrics
  names = {
    f"bit_accuracy_after_{kind}_{s:g}" for kind, strengths in config.eval.attacks.items() for s in strengths
  }
  assert names == {name for name in metrics if name.startswith("bit_accuracy_after_")}
  page = (path / "report/report.html").read_text()
  assert page.count("data:image/png") == 3 and "noise_0.05" in page and "of 64 held-out" not in page
  assert f"{metrics['psnr']:.1f} dB" in page and "On 64 held-out images" in page
  rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
  weights = [row["image_weight"] for row in rows if "image_weight" in row]
  assert weights[0] == 0 and config.gate.largest * 0.8 < weights[-1] <= config.gate.largest


def test_the_export_marks_and_reads_as_was_measured(trained):
  """Loaded in one call, marked by hand, attacked by hand: the accuracies are those in result.json."""
  path, config, metrics = trained
  codec = jax_trustdiff.load_codec(path / "export")
  assert (codec.network.num_bits, codec.network.image_shape) == (4, (8, 8, 1))
  held_out = image_training.load_data(config).validation
  rows = held_out.take(np.arange(64))
  bits = train_codec.bits_of(codec.network, config.seed, rows["id"])
  marked = np.asarray(codecs.marked_bytes(codec, rows["image"], bits))
  for name, images in (
    ("bit_accuracy", marked),
    ("bit_accuracy_after_jpeg_50", image_attacks.apply("jpeg", 50, marked)),
    ("bit_accuracy_after_noise_0.1", image_attacks.apply("noise", 0.1, marked, config.seed)),
  ):
    right = (np.asarray(codec.decode(to_unit(images))) > 0) == bits
    assert right.mean() == pytest.approx(metrics[name]), name
  error = np.square((marked.astype(float) - rows["image"]) / 255).mean((1, 2, 3))
  assert (-10 * np.log10(error)).mean() == pytest.approx(metrics["psnr"], abs=1e-3)
  one = codec.encode(to_unit(rows["image"][:2]), np.array([0, 1, 1, 0]))
  np.testing.assert_allclose(one, codec.encode(to_unit(rows["image"][:2]), np.array([[0, 1, 1, 0]] * 2)))
  meta = export.read_description(path / "export")
  assert meta["metrics"] == metrics


def test_a_fingerprint_is_of_the_values(trained):
  path, _, _ = trained
  codec = jax_trustdiff.load_codec(path / "export")
  assert codecs.fingerprint(codec) == codecs.fingerprint(jax_trustdiff.load_codec(path / "export"))
  codec.variables["params"]["decoder"]["first"]["bias"] += 1
  assert codecs.fingerprint(codec) != codecs.fingerprint(jax_trustdiff.load_codec(path / "export"))


def test_a_run_that_lost_its_second_half_ends_bit_for_bit_the_same(trained, tmp_path):
  path, config, metrics = trained
  again = tmp_path / "again"
  shutil.copytree(path, again)
  for name in ("checkpoints/150", "export", "report"):
    shutil.rmtree(again / name)
  (again / "result.json").unlink()
  assert complete(again, config) == metrics
  for name in ("export/model.safetensors", "metrics.jsonl"):
    assert (again / name).read_bytes() == (path / name).read_bytes(), name


# ---- starting anew ----

FEW = {"train.num_images": 640, "train.validate_every": 10, "train.checkpoint_every": 5, "train.log_every": 5}


@pytest.fixture(scope="module")
def second_seed(tmp_path_factory):
  """The parameters of 20 steps from the seed of a second attempt."""
  path = tmp_path_factory.mktemp("second") / "run"
  complete(path, config_of(seed=train_codec.SEED_STEP, **FEW))
  return (path / "export/model.safetensors").read_bytes()


def fails_at_first(monkeypatch):
  """The first attempt is not learned at its second validation."""
  look = train_codec.Watch.__call__

  def call(self, train_state):
    if self.attempt == 0 and int(train_state.step) == 20:
      raise train_codec.NotLearned("after 20 steps only 50.0% of the bits are read right")
    return look(self, train_state)

  monkeypatch.setattr(train_codec.Watch, "attempt", 0, raising=False)
  monkeypatch.setattr(train_codec.Watch, "__call__", call)
  aside = train_codec._set_aside

  def set_aside(workdir, attempt):
    aside(workdir, attempt)
    train_codec.Watch.attempt = attempt + 1

  monkeypatch.setattr(train_codec, "_set_aside", set_aside)


def test_an_attempt_that_is_not_learned_is_set_aside(monkeypatch, tmp_path, capfd, second_seed):
  fails_at_first(monkeypatch)
  metrics = complete(tmp_path / "run", config_of(**FEW))
  assert metrics["restarts"] == 1 and metrics["num_steps"] == 20
  assert (tmp_path / "run/export/model.safetensors").read_bytes() == second_seed
  aside = tmp_path / "run/not-learned-0"
  assert [json.loads(line)["step"] for line in (aside / "metrics.jsonl").read_text().splitlines()] == [
    5,
    10,
    10,
    15,
    20,
  ]
  assert sorted(int(p.name) for p in (aside / "checkpoints").glob("[0-9]*")) == [10, 15]
  said = capfd.readouterr().err
  assert "only 50.0% of the bits" in said and f"set aside in {aside}, and seed 1000 begins" in said


def test_a_run_that_was_killed_while_it_set_an_attempt_aside(monkeypatch, tmp_path, second_seed):
  """Metrics were moved, checkpoints were not: the first attempt does not go on."""
  fails_at_first(monkeypatch)
  replace, config = os.replace, config_of(**FEW)

  def killed(source, target):
    if str(source).endswith("checkpoints"):
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(train_codec.os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    complete(tmp_path / "run", config)
  monkeypatch.setattr(train_codec.os, "replace", replace)
  assert (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/not-learned-0").exists()
  assert complete(tmp_path / "run", config)["restarts"] == 1
  assert (tmp_path / "run/export/model.safetensors").read_bytes() == second_seed


def test_a_codec_that_is_never_read_is_an_error(tmp_path):
  """With a learning rate of nothing no seed learns; every attempt is kept."""
  few = FEW | {"train.learned_by": 10, "schedule.learning_rate": 1e-9, "train.max_restarts": 1}
  with pytest.raises(
    RunError, match=r"after 10 steps only .*% of the bits .*attempt 2, the last.*learning_rate"
  ):
    complete(tmp_path / "run", config_of(**few))
  assert (tmp_path / "run/not-learned-0/metrics.jsonl").exists()
  assert not (tmp_path / "run/result.json").exists()


# ---- bad input ----


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"train.num_validation": 1}, "give at least 2"),
    ({"train.accumulate": 2}, "the gate of a codec counts steps"),
    ({"train.learned_above": 0.5}, "between 0.5 and 1"),
    ({"train.max_restarts": -1}, "max_restarts and train.learned_by must be at least 0"),
    ({"eval.attacks.jpeg": (75.0, 101.0)}, "strengths of the attack 'jpeg' lie within 1 to 100, got 101"),
    ({"distortions.blur": (0.0, 9.0)}, "strengths of the distortion 'blur' rise within 0 to 2, got 0 to 9"),
    ({"distortions.blur": (0.5,)}, "distortions.blur needs two strengths"),
    ({"gate.ramp": 0}, "a gate needs ramp of at least 1"),
    ({"model.num_bits": 0}, "num_bits must be at least 1"),
    ({"report.num_images": 0}, "report.num_images must be at least 1"),
    ({"init_from": "nowhere"}, "nowhere"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(tmp_path / "run", config_of(**overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_original_codec_does_not_take_digits(tmp_path):
  with pytest.raises(InputError, match="squares whose side 32 divides, got 8x8"):
    complete(tmp_path / "run", config_lib.load("configs/wm_codec.py:stamp,smoke", {}))


def test_other_networks_are_no_codecs(trained, tmp_path):
  path, _, _ = trained
  for load, message in (
    (
      jax_trustdiff.load_classifier,
      "holds a watermark codec .residual_codec., no classifier: see load_codec",
    ),
    (jax_trustdiff.load_denoiser, "holds a watermark codec .residual_codec., no diffusion model"),
    (jax_trustdiff.load_noise_classifier, "holds another network .residual_codec."),
  ):
    with pytest.raises(InputError, match=message):
      load(path / "export")
  section = {"name": "preact_resnet", "num_classes": 10, "image_shape": (8, 8, 1)}
  export.save_export(tmp_path / "other", section, {"params": {}})
  with pytest.raises(InputError, match=r"holds another network .preact_resnet., no watermark codec"):
    jax_trustdiff.load_codec(tmp_path / "other")
