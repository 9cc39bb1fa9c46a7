"""From a codec to a verdict: marking a data set, its key file, interruptions, detection in images, files and samples, bad input."""

import dataclasses
import json
import os
import shutil
import stat
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import jax_trustdiff
from jax_trustdiff import config as config_lib
from jax_trustdiff.data import image_store
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.evaluation import image_attacks
from jax_trustdiff.interop import export
from jax_trustdiff.models.watermark_codec import ResidualCodec
from jax_trustdiff.tasks import (
  attack_watermark,
  codecs,
  detect_watermark,
  embed_watermark,
  train_codec,
  train_diffusion,
)
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError, RunError, to_unit
from jax_trustdiff.watermark import detection, keys, removal

NUM_BITS = 16
SECRET = "nobody guesses this text of the test"


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  """The export of a codec for the digits, 16 bits, that reads what it writes."""
  path = tmp_path_factory.mktemp("codec") / "run"
  overrides = {
    "model.num_bits": NUM_BITS,
    "model.width": 16,
    "model.strength": 0.8,
    "train.num_images": 19200,
    "train.num_train": 800,
    "train.validate_every": 600,
    "train.checkpoint_every": 600,
    "train.log_every": 100,
    "schedule.learning_rate": 0.005,
    "schedule.rampup_images": 320,
    "ema.half_life": 640,
    "gate.largest": 0.0,
  }
  config = config_lib.load("configs/wm_codec.py:smoke", overrides)
  for kind in config.distortions:
    config.distortions[kind] = ()
  metrics = complete(train_codec, path, config)
  assert metrics["bit_accuracy"] > 0.99
  return path / "export"


def complete(task, path, config):
  workdir = Workdir(path, config)
  return workdir.complete(lambda: task.run(config, workdir))


def embed_config(codec, **overrides):
  return config_lib.load("configs/wm_embed.py:smoke", {"init_from": str(codec)} | overrides)


def detect_config(codec, **overrides):
  usual = {"codec": str(codec), "key.demo": False, "detect.false_positive_rate": 1e-3}
  return config_lib.load("configs/wm_detect.py:smoke", usual | overrides)


@pytest.fixture(scope="module")
def marked(codec, tmp_path_factory):
  """(workdir of marked digits, metrics)."""
  folder = tmp_path_factory.mktemp("marked")
  (folder / "secret.txt").write_text(SECRET)
  config = embed_config(
    codec, **{"embed.least_bit_accuracy": 0.9, "key.secret_file": str(folder / "secret.txt"), "key.user": 1}
  )
  return folder / "run", complete(embed_watermark, folder / "run", config)


# ---- marking ----


def test_a_store_holds_the_marked_images(codec, marked):
  path, metrics = marked
  image_store.verify(path / "images")
  store, clean = SOURCES["image_store"](path=str(path / "images")), SOURCES["digits"]()
  np.testing.assert_array_equal(store.labels, clean.labels[:96])
  np.testing.assert_array_equal(store.ids, clean.ids[:96])
  assert store.class_names == clean.class_names and metrics["num_images"] == metrics["marked"] == 96
  bound, key = jax_trustdiff.load_codec(codec), codecs.read_key(path)
  images = np.asarray(store.images)
  np.testing.assert_array_equal(
    images, jax.jit(codecs.marked_bytes)(bound, np.asarray(clean.images[:96]), key.array)
  )
  right = (np.asarray(bound.decode(to_unit(images))) > 0) == key.array
  assert right.mean() == pytest.approx(metrics["bit_accuracy"]) and right.mean() > 0.9
  assert right.all(1).mean() == pytest.approx(metrics["exact"])
  error = np.square((images - clean.images[:96].astype(float)) / 255).mean((1, 2, 3))
  assert (-10 * np.log10(error)).mean() == pytest.approx(metrics["psnr"], abs=1e-3)
  assert (path / "report/report.html").read_text().count("data:image/png") == 2


def test_a_key_file_is_its_owners(codec, marked):
  path, _ = marked
  key = codecs.read_key(path)
  assert stat.S_IMODE((path / "key.json").stat().st_mode) == 0o600
  assert key.drawn and len(key.bits) == NUM_BITS and key.image_shape == (8, 8, 1)
  assert key.codec_sha256 == codecs.fingerprint(jax_trustdiff.load_codec(codec))
  about = json.loads((path / "images/plan.json").read_text())["provenance"]
  assert about["key_id"] == key.key_id and key.bits not in json.dumps(about)


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_marking_that_was_cut_off_ends_in_the_same_store(codec, marked, tmp_path, monkeypatch, killed_after):
  path, _ = marked
  config = embed_config(codec, **{"embed.least_bit_accuracy": 0.9, "key.file": str(path)})
  write, written = image_store.ImageStore.write, []

  def dies(self, shard, *arrays):
    if len(written) == killed_after:
      raise KeyboardInterrupt
    written.append(shard)
    write(self, shard, *arrays)

  with monkeypatch.context() as patch:
    patch.setattr(image_store.ImageStore, "write", dies)
    with pytest.raises(KeyboardInterrupt):
      complete(embed_watermark, tmp_path / "run", config)
  metrics = complete(embed_watermark, tmp_path / "run", config)
  assert metrics["marked"] == 96 - 32 * killed_after and metrics["num_images"] == 96
  for file in (path / "images").iterdir():
    assert (tmp_path / "run/images" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_fresh_key_survives_an_interruption(codec, tmp_path, monkeypatch):
  """The string that the first shard carries is that of the second."""
  config = embed_config(codec, **{"embed.least_bit_accuracy": 0.9})
  with monkeypatch.context() as patch:
    patch.setattr(image_store.ImageStore, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      complete(embed_watermark, tmp_path / "run", config)
  before = (tmp_path / "run/key.json").read_bytes()
  assert complete(embed_watermark, tmp_path / "run", config)["marked"] == 0
  assert (tmp_path / "run/key.json").read_bytes() == before


def test_two_workers_with_one_secret_fill_one_store(codec, tmp_path):
  (tmp_path / "secret.txt").write_text(SECRET + "\n")
  for worker in (0, 1):
    config = embed_config(
      codec,
      **{
        "key.secret_file": str(tmp_path / "secret.txt"),
        "key.user": 7,
        "embed.store": str(tmp_path / "store"),
        "embed.num_workers": 2,
        "embed.worker": worker,
      },
    )
    metrics = complete(embed_watermark, tmp_path / f"run{worker}", config)
    assert ("bit_accuracy" in metrics) == bool(worker)
  assert image_store.verify(tmp_path / "store") == 96
  user = keys.as_text(keys.draw(SECRET, [7], NUM_BITS)[0])
  assert codecs.read_key(tmp_path / "run0").bits == codecs.read_key(tmp_path / "run1").bits == user


def test_a_codec_that_is_not_read_gives_no_store(tmp_path):
  config = config_lib.load("configs/wm_embed.py:smoke", {"embed.least_bit_accuracy": 0.999})
  with pytest.raises(RunError, match=r"only .*% of the bits are read back .* gets no manifest"):
    complete(embed_watermark, tmp_path / "run", config)
  assert not (tmp_path / "run/images/manifest.json").exists()
  with pytest.raises(InputError, match="is not complete"):
    SOURCES["image_store"](path=str(tmp_path / "run/images"))


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"init_from": ""}, "init_from is empty: give the export of a codec"),
    ({"key.demo": True, "key.file": "x"}, "the key comes from one place, found key.file and key.demo"),
    ({"key.file": "nowhere.json"}, "no key file nowhere.json"),
    ({"key.file": sys.executable}, "cannot be read as a key file: it is no text"),
    ({"key.user": 3}, "give key.secret_file"),
    ({"key.secret_file": "nowhere.txt"}, "no file with a secret, nowhere.txt"),
    ({"embed.num_workers": 2, "embed.store": "s"}, "several workers need one key"),
    ({"embed.images_per_shard": 0}, "images_per_shard must be at least 1"),
    ({"embed.batch_size": 0}, "batch size 0"),
    ({"embed.least_bit_accuracy": 2.0}, "least_bit_accuracy must lie between 0 and 1"),
    ({"untrained_codec.image_shape": (16, 16, 1)}, r"made for images of \(16, 16, 1\).*embed.any_size=True"),
    ({"untrained_codec.image_shape": (8, 8, 3)}, "ResidualCodec takes images of 3 channels, got 1"),
    ({"untrained_codec.model.num_bits": 12, "key.demo": True}, "published strings of 4, 8"),
  ],
)
def test_marking_refuses_in_one_line(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(embed_watermark, tmp_path / "run", config_lib.load("configs/wm_embed.py:smoke", overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_key_of_another_codec_is_refused(codec, marked, tmp_path):
  path, _ = marked
  other = ResidualCodec(NUM_BITS, (8, 8, 1), width=16, num_blocks=1, strength=0.4)
  section = dict(
    name="residual_codec", num_bits=NUM_BITS, width=16, num_blocks=1, strength=0.4, image_shape=(8, 8, 1)
  )
  export.save_export(tmp_path / "other", section, jax.tree.map(np.asarray, other.init(jax.random.key(9))))
  config = embed_config(tmp_path / "other", **{"key.file": str(path)})
  with pytest.raises(InputError, match="the key was made for another codec"):
    complete(embed_watermark, tmp_path / "run", config)
  with pytest.raises(InputError, match="the key was made for another codec"):
    complete(detect_watermark, tmp_path / "run", detect_config(tmp_path / "other", **{"key.file": str(path)}))
  fewer = {"key.file": str(path), "codec": "untrained"}
  with pytest.raises(InputError, match="the key has 16 bits and the codec 32"):
    complete(
      detect_watermark,
      tmp_path / "run",
      config_lib.load("configs/wm_detect.py:smoke", fewer | {"key.demo": False}),
    )
  assert not (tmp_path / "run").exists()


def test_a_payload_is_read_in_spite_of_wrong_bits(codec, tmp_path):
  pytest.importorskip("galois", reason="no galois: pip install 'jax_trustdiff[ecc]'")
  payload = {"key.payload": 13, "key.num_errors": 2, "embed.least_bit_accuracy": 0.9}
  complete(embed_watermark, tmp_path / "marked", embed_config(codec, **payload))
  key = codecs.read_key(tmp_path / "marked")
  assert (key.num_errors, key.drawn) == (2, True) and codecs.read_payload(key, key.array) == (13, 0)
  assert codecs.read_payload(key, key.array ^ np.eye(16, dtype=int)[[3, 9]].sum(0)) == (13, 2)
  of_store = {"data.name": "image_store", "data.path": str(tmp_path / "marked/images")}
  config = detect_config(codec, **{"key.file": str(tmp_path / "marked")}, **of_store)
  metrics = complete(detect_watermark, tmp_path / "run", config)
  assert metrics["payload_is_right"] == 1
  verdict = json.loads((tmp_path / "run/verdict.json").read_text())
  assert verdict["payload"]["read"] == 13 and 0 < verdict["payload"]["false_accept"] < 0.5
  assert "13, with 0 wrong bits" in (tmp_path / "run/report/report.html").read_text()
  broken = dataclasses.replace(key, mask="0" * 16, bits="1" * 15 + "0")
  if codecs.read_payload(broken, broken.array) in (None, (0, 1)):
    with pytest.raises(InputError, match="no code word"):
      codecs.own_payload(broken)
  secret, room = "a secret of this test", (13, 2)
  assert (keys.mask(secret, 0, 64, room) != keys.mask(secret, 0, 64, (14, 2))).sum() > 10
  for changes, message in (
    (
      {"key.payload": 10**6},
      "key.payload=1000000: a code word of 16 bits with 2 errors has room for 0 to 63",
    ),
    ({"key.demo": True}, "not with key.file or key.demo"),
    ({"key.payload": -2}, "a number from 0 on, or -1 for none"),
    ({"key.num_errors": 0}, "at least 1 error"),
  ):
    with pytest.raises(InputError, match=message):
      complete(embed_watermark, tmp_path / "bad", embed_config(codec, **payload | changes))


# ---- a diffusion model on marked images ----

FEW = {"train.num_images": 96, "train.num_train": 80, "train.num_validation": 16, "train.validate_every": 3}
FEW |= {
  "model.name": "uvit",  # fewer operations to compile than a U-Net
  "model.size": "tiny",
  "model.patch_size": 2,
  "model.embed_dim": 16,
  "model.depth": 2,
  "model.num_heads": 2,
  "train.checkpoint_every": 3,
  "eval.num_samples": 0,
  "eval.num_pictures": 4,
  "augment_pipe.name": "none",
}


def edm_config(**overrides):
  return config_lib.load("configs/wm_edm.py:smoke", FEW | overrides)


@pytest.mark.slow
def test_marking_batch_by_batch_trains_the_same_model(codec, marked, tmp_path):
  """As on the store: to rounding, since the program is another one. Without marks it is another model."""
  path, _ = marked
  of_store = {"data.name": "image_store", "data.path": str(path / "images")}
  first = complete(train_diffusion, tmp_path / "store", edm_config(**of_store))
  on_the_fly = {"watermark.codec": str(codec), "watermark.key": str(path)}
  second = complete(train_diffusion, tmp_path / "fly", edm_config(**on_the_fly))
  clean = complete(train_diffusion, tmp_path / "clean", edm_config())
  assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
  assert clean["loss"] != pytest.approx(first["loss"], rel=1e-2)
  described = [export.read_description(tmp_path / name / "export") for name in ("store", "fly", "clean")]
  key_id = codecs.read_key(path).key_id
  assert [about.get("watermark") for about in described] == [{"key_id": key_id}] * 2 + [None]
  modes = [
    stat.S_IMODE((tmp_path / name / "checkpoints").stat().st_mode) & 0o077 for name in ("fly", "store")
  ]
  assert modes[0] == 0 != modes[1]  # those with the string are their owner's
  shutil.rmtree(tmp_path / "fly/checkpoints/3")
  (tmp_path / "fly/result.json").unlink()
  assert complete(train_diffusion, tmp_path / "fly", edm_config(**on_the_fly)) == second


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"watermark.codec": ""}, "watermark.codec and watermark.key go together"),
    (
      {"watermark.codec": "", "watermark.key": "", "watermark.required": True},
      "the images are not marked: give data.path",
    ),
    ({"watermark.least_bit_accuracy": 1.1}, "of the bits are read back from the first 64 images"),
    ({"augment.name": "flip"}, "does not survive augment.name='flip'"),
    (
      {"data.name": "npz", "data.path": "rgb.npz"},
      r"the key is for images of \(8, 8, 1\), and these are \(8, 8, 3\)",
    ),
    ({"data.name": "image_store", "data.path": "marked"}, "the images are marked already, with the key"),
    (
      {
        "data.name": "image_store",
        "data.path": "marked",
        "watermark.codec": "",
        "watermark.key": "",
        "augment.name": "flip",
      },
      "does not survive augment.name='flip'",
    ),
  ],
)
def test_training_on_marks_refuses_in_one_line(codec, marked, tmp_path, monkeypatch, overrides, message):
  path, _ = marked
  monkeypatch.chdir(tmp_path)
  np.savez("rgb.npz", x_train=np.zeros((128, 8, 8, 3), np.uint8), y_train=np.zeros(128, np.int32))
  os.symlink(path / "images", "marked")
  usual = {"watermark.codec": str(codec), "watermark.key": str(path)}
  with pytest.raises(InputError, match=message) as caught:
    complete(train_diffusion, tmp_path / "run", edm_config(**usual | overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_marked_images_are_not_marked_again(codec, marked, tmp_path):
  of_store = {"data.name": "image_store", "data.path": str(marked[0] / "images")}
  with pytest.raises(InputError, match="the images are marked already, with the key"):
    complete(embed_watermark, tmp_path / "run", embed_config(codec, **of_store))


# ---- detection ----


def test_marked_images_are_detected_and_clean_ones_are_not(codec, marked, tmp_path):
  path, _ = marked
  config = detect_config(
    codec,
    **{
      "key.file": str(path),
      "data.name": "image_store",
      "data.path": str(path / "images"),
      "null.name": "digits",
      "detect.num_images": 0,
    },
  )
  metrics = complete(detect_watermark, tmp_path / "run", config)
  verdict = json.loads((tmp_path / "run/verdict.json").read_text())
  assert metrics["detected"] == 1 and verdict["decision"] is True and verdict["key_drawn"] is True
  assert (metrics["matches"], metrics["threshold"], metrics["num_images"]) == (16, 15, 96)
  assert metrics["p"] == 2.0**-16 and metrics["key_drawn"] == 1
  assert codecs.read_key(path).bits not in (tmp_path / "run/verdict.json").read_text()
  low, high = verdict["detected_share_interval"]
  assert 0 < low < metrics["detected_share"] <= high <= 1
  control = verdict["control"]
  assert len(control["p"]) == 20 and metrics["control/smallest_p"] == min(control["p"]) > 2.0**-16
  null = verdict["null"]
  assert null["num_images"] == len(SOURCES["digits"]()) and abs(null["bit_accuracy"] - 0.5) < 0.3
  assert null["false_positive_rate"] < 0.2 and null["p"] > 1e-3
  page = (tmp_path / "run/report/report.html").read_text()
  assert "These images carry the mark" in page and page.count("data:image/png") == 3


def test_files_of_pictures_are_read(codec, marked, tmp_path):
  path, _ = marked
  store = SOURCES["image_store"](path=str(path / "images"))
  folder = tmp_path / "suspect"
  folder.mkdir()
  for i, image in enumerate(np.asarray(store.images[:32])):
    Image.fromarray(image[..., 0]).save(folder / f"{i}.png")
  config = detect_config(
    codec, **{"key.file": str(path), "data.name": "pictures", "data.path": str(folder), "data.channels": 1}
  )
  metrics = complete(detect_watermark, tmp_path / "run", config)
  assert metrics["num_images"] == 32 and metrics["detected"] == 1


def test_the_user_is_found_among_many(codec, tmp_path):
  (tmp_path / "secret.txt").write_text(SECRET)
  secret = {"key.secret_file": str(tmp_path / "secret.txt")}
  complete(embed_watermark, tmp_path / "marked", embed_config(codec, **secret, **{"key.user": 37}))
  of_store = {"data.name": "image_store", "data.path": str(tmp_path / "marked/images")}
  few = detect_config(
    codec, **secret, **of_store, **{"key.num_users": 40, "detect.false_positive_rate": 1e-2}
  )
  metrics = complete(detect_watermark, tmp_path / "few", few)
  assert (metrics["detected"], metrics["user"], metrics["matches"]) == (1, 37, 16)
  assert metrics["p"] == pytest.approx(1 - (1 - 2.0**-16) ** 40)
  many = detect_config(codec, **secret, **of_store, **{"key.num_users": 10**6})
  with pytest.raises(
    InputError, match=r"16 bits cannot reach a false-positive rate of 0.001 among 1000000 key"
  ):
    complete(detect_watermark, tmp_path / "many", many)
  assert not (tmp_path / "many").exists()


def test_clean_images_among_many_users(codec, marked, tmp_path):
  """Null images are judged by the best of all keys too, each by its own."""
  (tmp_path / "secret.txt").write_text("another secret of this test")
  config = detect_config(
    codec,
    **{
      "key.secret_file": str(tmp_path / "secret.txt"),
      "key.num_users": 500,
      "detect.false_positive_rate": 0.2,
      "data.name": "digits",
      "null.name": "digits",
      "detect.num_images": 300,
    },
  )
  metrics = complete(detect_watermark, tmp_path / "run", config)
  verdict = json.loads((tmp_path / "run/verdict.json").read_text())
  assert verdict["threshold"] == detection.threshold(16, 0.2, 500) > detection.threshold(16, 0.2)
  # of 500 keys the best agrees with any string in more than half of the bits
  assert verdict["null"]["highest_bit_accuracy"] > 0.75
  assert verdict["null"]["bit_accuracy"] == pytest.approx(metrics["bit_accuracy"])  # one key, the same images
  assert verdict["null"]["p"] == metrics["p"]  # the same images, so the same best key
  assert metrics["null/highest_bit_accuracy"] > metrics["null/bit_accuracy"]


def test_a_published_key_is_no_evidence(codec, tmp_path):
  complete(
    embed_watermark,
    tmp_path / "marked",
    embed_config(codec, **{"key.demo": True, "embed.least_bit_accuracy": 0.9}),
  )
  of_store = {"data.name": "image_store", "data.path": str(tmp_path / "marked/images")}
  metrics = complete(
    detect_watermark, tmp_path / "run", detect_config(codec, **{"key.demo": True}, **of_store)
  )
  assert metrics["matches"] == 16 and metrics["key_drawn"] == 0
  page = (tmp_path / "run/report/report.html").read_text()
  assert (
    "These images agree with a published key in 16 of 16 bits" in page and "no probability of chance" in page
  )


def test_a_verdict_on_more_bits_than_are_shown_one_by_one(tmp_path):
  """The codec is fresh, so nothing is there; the report has no bar for each of 128 bits."""
  metrics = complete(
    detect_watermark,
    tmp_path / "run",
    config_lib.load("configs/wm_detect.py:smoke", {"untrained_codec.model.num_bits": 128}),
  )
  assert metrics["num_bits"] == 128
  assert (tmp_path / "run/report/report.html").read_text().count("data:image/png") == 2


def test_samples_of_a_model_without_a_mark(codec, marked, tmp_path):
  path, _ = marked
  config = detect_config(
    codec,
    **{"key.file": str(path), "init_from": "untrained", "sampler.num_steps": 3, "detect.num_images": 32},
  )
  metrics = complete(detect_watermark, tmp_path / "run", config)
  assert metrics["num_images"] == 32 and metrics["detected"] == 0


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"key.demo": False}, "give one of key.file"),
    ({"codec": ""}, "codec is empty: give the export of a codec"),
    ({"key.num_users": 3}, "goes with key.secret_file"),
    (
      {"key.demo": False, "key.secret_file": "configs/wm_detect.py", "key.num_users": 0},
      "at least 1, found 0",
    ),
    (
      {"detect.false_positive_rate": 1e-12},
      "32 bits cannot reach a false-positive rate of 1e-12.*take at least 40 bits",
    ),
    ({"detect.control_keys": -1}, "control_keys must be at least 0"),
    ({"detect.false_positive_rate": 0.0}, "must lie between 0 and 1"),
    (
      {"untrained_codec.image_shape": (16, 16, 1)},
      r"made for images of \(16, 16, 1\), and these are \(8, 8, 1\)",
    ),
    (
      {"untrained_codec.image_shape": (8, 8, 3)},
      r"for images of 3 channel\(s\), and these have 1: files are read with data.channels",
    ),
    ({"init_from": "untrained", "detect.num_images": 0}, "so many samples"),
    ({"init_from": "nowhere"}, "nowhere"),
    ({"data.name": "pictures", "data.path": "nowhere"}, "nowhere"),
  ],
)
def test_detection_refuses_in_one_line(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(detect_watermark, tmp_path / "run", config_lib.load("configs/wm_detect.py:smoke", overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


# ---- attacks ----


def attack_config(codec, marked, attacks, **overrides):
  usual = {
    "codec": str(codec),
    "key.demo": False,
    "key.file": str(marked),
    "data.name": "image_store",
    "data.path": str(marked / "images"),
    "detect.batch_size": 32,
    "detect.false_positive_rate": 1e-3,
    "detect.num_images": 64,
  }
  config = config_lib.load("configs/wm_attack.py:cpu", usual)
  for kind in config.attacks:
    config.attacks[kind] = attacks.get(kind, ())
  config_lib.override(config, overrides)
  return config


ATTACKS = {"noise": (0.05, 0.5), "flip": (1.0,), "flip_bits": (0.8,)}


@pytest.fixture(scope="module")
def attacked(codec, marked, tmp_path_factory):
  path = tmp_path_factory.mktemp("attacked") / "run"
  return path, complete(attack_watermark, path, attack_config(codec, marked[0], ATTACKS))


def test_attacks_leave_less_of_the_mark(codec, marked, attacked):
  path, metrics = attacked
  assert metrics["none/bit_accuracy"] > 0.95 and metrics["none/matches"] == 16
  assert (
    metrics["none/bit_accuracy"] >= metrics["noise_0.05/bit_accuracy"] > metrics["noise_0.5/bit_accuracy"]
  )
  assert metrics["flip_bits_0.8/bit_accuracy"] < 0.5 < metrics["flip_bits_0.8/p"]
  assert metrics["noise_0.05/psnr"] > metrics["noise_0.5/psnr"] and "none/psnr" not in metrics
  store = SOURCES["image_store"](path=str(marked[0] / "images"))
  images = image_attacks.apply("noise", 0.5, np.asarray(store.images[:64]))
  bound, key = jax_trustdiff.load_codec(codec), codecs.read_key(marked[0]).array
  right = (np.asarray(bound.decode(to_unit(images))) > 0) == key
  assert right.mean() == pytest.approx(metrics["noise_0.5/bit_accuracy"])
  table = (path / "report/table.md").read_text()
  assert len(table.splitlines()) == 2 + 5 and f"| {metrics['none/matches']} of 16 |" in table
  assert (path / "report/report.html").read_text().count("data:image/png") == 2


def test_attacks_that_are_done_are_kept(codec, marked, attacked, tmp_path, monkeypatch):
  path, metrics = attacked
  config, apply = attack_config(codec, marked[0], ATTACKS), image_attacks.apply

  def dies(kind, strength, images, seed):
    if strength == 0.5:
      raise KeyboardInterrupt
    return apply(kind, strength, images, seed)

  with monkeypatch.context() as patch:
    patch.setattr(image_attacks, "apply", dies)
    with pytest.raises(KeyboardInterrupt):
      complete(attack_watermark, tmp_path / "run", config)
  (journal,) = (tmp_path / "run").glob("journal-*")
  assert stat.S_IMODE(journal.stat().st_mode) == 0o700
  done = {file.stem for file in journal.glob("*.npz")}
  assert done == {"none", "flip_1", "flip_bits_0.8", "noise_0.05"}
  with monkeypatch.context() as patch:
    patch.setattr(removal, "flip_bits", None)  # not called again
    assert complete(attack_watermark, tmp_path / "run", config) == metrics


@pytest.mark.parametrize(
  "attacks, overrides, message",
  [
    ({"steps": (4.0,)}, {}, "attacks.steps is on a model: give init_from"),
    ({"regenerate": (0.3,)}, {}, "attacks.regenerate needs a diffusion model"),
    ({"jpeg": (0.0,)}, {}, "strengths of the attack 'jpeg' lie within 1 to 100"),
    ({"weight_bits": (2.5,)}, {"init_from": "untrained"}, "takes whole numbers, found 2.5"),
    ({"weight_bits": (32.0,)}, {"init_from": "untrained"}, "within 2 to 16, found 32"),
    ({"prune": (1.5,)}, {"init_from": "untrained"}, "above 0 within 0 to 1, found 1.5"),
    ({"bfloat16": (7.0,)}, {"init_from": "untrained"}, "within 1 to 1, found 7"),
    ({"crop": (0.05,)}, {}, "the attack 'crop' of 0.05 changes nothing of images of 8x8"),
    ({"regenerate": (1000.0,)}, {"init_from": "untrained", "regenerate.num_steps": 1}, "num_steps"),
    ({}, {"detect.num_images": 1}, "at least 2, found 1"),
    ({}, {"detect.false_positive_rate": 1e-9}, "16 bits cannot reach"),
    ({}, {"key.file": ""}, "give one of key.file"),
    ({}, {"key.file": "", "key.secret_file": "configs/wm_attack.py"}, "measured with one string"),
  ],
)
def test_attacks_refuse_in_one_line(codec, marked, tmp_path, attacks, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(attack_watermark, tmp_path / "run", attack_config(codec, marked[0], attacks, **overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
