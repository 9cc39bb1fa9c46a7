"""Marks on the initial noise of samples: what is read back, what a run keeps, both kinds of marks, bad input."""

import json
import stat

import pytest

from jax_trustdiff import config as config_lib
from jax_trustdiff.data.sources import SOURCES
from jax_trustdiff.tasks import mark_initial_noise
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

# A network that has learned nothing is a shrinkage of the image: its ODE is solved well both ways.
FEW = {"sampler.num_steps": 6, "attacks.noise": (0.1,), "detect.num_images": 64}


def config_of(**overrides):
  return config_lib.load("configs/wm_noise.py:smoke", FEW | overrides)


def complete(path, config):
  workdir = Workdir(path, config)
  return workdir.complete(lambda: mark_initial_noise.run(config, workdir))


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
  """A file with one secret for all: one in twenty would give unmarked images a p-value below 0.05, as it must."""
  file = tmp_path_factory.mktemp("secret") / "secret.txt"
  file.write_text("the secret of the tests of initial noise, 1")
  return str(file)


@pytest.fixture(scope="module")
def shaded(tmp_path_factory, secret):
  path = tmp_path_factory.mktemp("shaded") / "run"
  return path, complete(path, config_of(secret_file=secret))


def test_bits_come_back_from_samples(shaded):
  path, metrics = shaded
  assert metrics["none/bit_accuracy"] > 0.99 and metrics["none/matches"] == 32
  assert metrics["none/p"] == 2.0**-32 and metrics["none/detected_share"] > 0.95
  assert abs(metrics["unmarked/bit_accuracy"] - 0.5) < 0.1 and metrics["unmarked/p"] > 1e-4
  assert 0.6 < metrics["noise_0.1/bit_accuracy"] <= metrics["none/bit_accuracy"]
  low, high = (metrics[f"pixel_fid_difference_{end}"] for end in ("low", "high"))
  assert low < metrics["pixel_fid_difference"] < high and metrics["pixel_fid_difference_p"] > 0.01
  assert metrics["pixel_fid_difference"] == pytest.approx(
    metrics["none/pixel_fid"] - metrics["unmarked/pixel_fid"]
  )
  verdict = json.loads((path / "verdict.json").read_text())
  assert verdict["decision"] is True and verdict["scheme"] == "gaussian_shading"
  assert stat.S_IMODE((path / "secret.txt").stat().st_mode) == 0o600
  assert len((path / "report/table.md").read_text().splitlines()) == 2 + 3
  assert (path / "report/report.html").read_text().count("data:image/png") == 2


def test_the_same_secret_marks_the_same_images(shaded, tmp_path):
  path, metrics = shaded
  again = complete(tmp_path / "same", config_of(secret_file=str(path / "secret.txt")))
  assert again == metrics
  one, same = (json.loads((p / "images/manifest.json").read_text()) for p in (path, tmp_path / "same"))
  assert one["provenance"] == same["provenance"] and len(one["provenance"]["secret_id"]) == 16
  assert (path / "secret.txt").read_text().strip() not in json.dumps(one)


def test_the_mark_of_a_store_is_read_with_its_secret_and_its_ids(shaded, tmp_path, secret):
  path, metrics = shaded
  assert SOURCES["image_store"](path=str(path / "images")).image_shape == (8, 8, 1)
  read = {"images": str(path / "images"), "attacks.noise": ()}
  found = complete(tmp_path / "read", config_of(secret_file=secret, **read))
  assert found == {name: value for name, value in metrics.items() if name.startswith("none/") and "fid" not in name}
  other = tmp_path / "other.txt"
  other.write_text("another secret than that of the images")
  marked = complete(tmp_path / "marked", config_of(secret_file=str(other), **{"attacks.noise": ()}))
  assert marked["none/bit_accuracy"] > 0.99
  ids = {
    json.loads((p / "images/manifest.json").read_text())["provenance"]["secret_id"]
    for p in (path, tmp_path / "marked")
  }
  assert len(ids) == 2
  found = complete(tmp_path / "wrong", config_of(secret_file=str(other), **read))
  assert abs(found["none/bit_accuracy"] - 0.5) < 0.1 and found["none/p"] > 1e-4


def test_one_secret_has_other_streams_for_another_model(shaded, tmp_path, secret, capsys):
  path, metrics = shaded
  read = {"images": str(path / "images"), "attacks.noise": (), "secret_file": secret}
  capsys.readouterr()
  found = complete(tmp_path / "read", config_of(**read, **{"untrained.model.num_blocks": 2}))
  assert "was made with another model: its mark is not found" in capsys.readouterr().err
  assert abs(found["none/bit_accuracy"] - 0.5) < 0.1 and metrics["none/matches"] == 32


def test_a_fresh_secret_survives_an_interruption(tmp_path, monkeypatch):
  config = config_of()
  with monkeypatch.context() as patch:
    patch.setattr(
      mark_initial_noise._Solver, "invert", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
      complete(tmp_path / "run", config)
  secret = (tmp_path / "run/secret.txt").read_bytes()
  assert len(secret) > 32 and complete(tmp_path / "run", config)["none/matches"] == 32
  assert (tmp_path / "run/secret.txt").read_bytes() == secret


def test_rings_are_found(tmp_path, secret):
  rings = {"secret_file": secret, "mark.name": "rings", "mark.low": 1, "mark.high": 3, "detect.false_positive_rate": 0.05}
  metrics = complete(tmp_path / "run", config_of(**rings))
  assert "none/bit_accuracy" not in metrics
  assert metrics["none/p"] < 0.05 < metrics["unmarked/p"]  # three rings cannot say much
  assert metrics["none/detected_share"] > 0.9 > metrics["unmarked/detected_share"]
  assert metrics["none/median_p"] < metrics["unmarked/median_p"]


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"init_from": ""}, "init_from is empty"),
    ({"mark.num_bits": 65}, "noise of 64 values carries 1 to 64 bits, not 65"),
    ({"mark.num_bits": 16}, "16 bits cannot reach a false-positive rate of 1e-06"),
    ({"detect.num_images": 1}, "at least 2, found 1"),
    ({"detect.batch_size": 0}, "batch size 0"),
    ({"detect.false_positive_rate": 1.0}, "must lie between 0 and 1"),
    ({"sampler.churn": 5.0}, "unknown config key"),
    ({"sampler.name": "euler_maruyama"}, "cannot be inverted: take 'edm'"),
    ({"attacks.jpeg": (500.0,)}, "lie within 1 to 100"),
    ({"detect.num_resamples": 2}, "num_resamples of at least 20"),
    ({"metrics.fid_only": True}, "metrics.fid_only=False"),
    ({"untrained.image_shape": (16, 16, 1)}, r"the reference has images of \(8, 8, 1\)"),
    ({"secret_file": "nowhere"}, "no file with a secret, nowhere"),
    ({"images": "somewhere"}, "give secret_file"),
  ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message) as caught:
    complete(tmp_path / "run", config_of(**overrides))
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
