"""Metrics of generated images: the extractor on a mesh, the numbers, files as reference, the report, the errors."""

import json

import jax
import numpy as np
import pytest
from metrics_worker import main, tiny_source
from workers import answer, start

from jax_trustdiff import config as config_lib
from jax_trustdiff import parallel
from jax_trustdiff.evaluation import fid
from jax_trustdiff.interop.fid_statistics import FeatureStatistics, load_statistics
from jax_trustdiff.tasks import evaluate_generation, generation_metrics
from jax_trustdiff.tasks.generation_metrics import FeatureExtractor
from jax_trustdiff.training.workdir import Workdir
from jax_trustdiff.types import InputError

RECIPE = "configs/evaluate_generation.py:smoke"


def extractor(batch_size=16, keep=True):
  return FeatureExtractor("pixels", fid.PixelFeatures(), batch_size, parallel.make_mesh(data=-1), keep)


@pytest.fixture
def folders(tmp_path):
  """Two sets of images of 4x4 as npz files."""
  paths = []
  for name, source in (("reference", tiny_source(45, 0)), ("generated", tiny_source(37, 1))):
    np.savez(tmp_path / f"{name}.npz", image=source.images, label=source.labels)
    paths.append(str(tmp_path / f"{name}.npz"))
  return paths


def config(folders, **overrides):
  values = {
    "data.name": "npz",
    "data.path": folders[0],
    "generated.name": "npz",
    "generated.path": folders[1],
  }
  values |= {"eval.generated_split": "train", "eval.num_reference": 0}
  values |= {"metrics.kid_subset_size": 20, "metrics.kid_subsets": 3}
  values |= overrides
  if values["data.name"] == "digits":
    del values["data.path"]
  return config_lib.load(RECIPE, values)


def run(config, path):
  workdir = Workdir(path, config)
  return workdir.complete(lambda: evaluate_generation.run(config, workdir))


def test_features_do_not_depend_on_the_batch(monkeypatch):
  """Batches that leave a rest, moments of one part and of many; features kept or not."""
  source = tiny_source(37, 0)
  expected = np.asarray(source.images, np.float32).reshape(37, 48) / np.float32(255)
  whole = extractor(64)(source)
  monkeypatch.setattr(fid, "CHUNK", 10)
  parts, moments_only = extractor(8)(source), extractor(8, keep=False)(source)
  for found in (whole, parts):
    np.testing.assert_allclose(found.features, expected, rtol=1e-6)
    assert found.num_images == 37 and found.network == "pixels"
  assert moments_only.features is None
  for found in (whole, parts, moments_only):
    np.testing.assert_allclose(found.mu, expected.astype(np.float64).mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.sigma, np.cov(expected.astype(np.float64).T), rtol=1e-5, atol=1e-7)


def test_eight_devices_give_the_numbers_of_one():
  one, eight = main(), answer(start("metrics_worker.py", 8))
  assert [one["devices"], eight["devices"]] == [1, 8]
  np.testing.assert_array_equal(eight["features"], one["features"])
  assert eight["metrics"].keys() == one["metrics"].keys()
  for name, value in one["metrics"].items():
    np.testing.assert_allclose(eight["metrics"][name], value, rtol=1e-9, err_msg=name)


def test_the_metrics_are_those_of_the_features(folders, tmp_path):
  found = run(config(folders), tmp_path / "run")
  real, fake = (extractor()(tiny_source(n, seed)).features for n, seed in ((45, 0), (37, 1)))
  m1, m2 = fid.moments(real), fid.moments(fake)
  distance = fid.frechet_distance(m1.mean, m1.covariance, m2.mean, m2.covariance)
  kid, kid_std = fid.kernel_distance_of_subsets(real, fake, jax.random.key(0), 3, 20)
  precision, recall = fid.precision_recall(real, fake, 3)
  expected = {"pixel_fid": distance, "pixel_kid": kid, "pixel_kid_std": kid_std}
  expected |= {"pixel_precision": precision, "pixel_recall": recall, "num_generated": 37, "num_reference": 45}
  assert list(found) == list(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
  assert precision != recall  # so that an exchange of the sets would be seen
  assert json.loads((tmp_path / "run/result.json").read_text())["metrics"] == found
  page = (tmp_path / "run/report/report.html").read_text()
  assert "37 generated against 45 reference images" in page and "compare with nothing published" in page
  assert (tmp_path / "run/report/generated_images.png").stat().st_size > 0


def test_a_file_of_statistics_stands_for_the_reference(folders, tmp_path):
  """Our own file gives every number again; one in the form of EDM the FID alone."""
  expected = run(config(folders, **{"eval.save_statistics": True}), tmp_path / "first")
  ours = tmp_path / "first/statistics/reference.npz"
  reference = {"data.path": "/nowhere", "eval.reference_statistics": str(ours)}
  assert run(config(folders, **reference), tmp_path / "second") == expected
  statistics = load_statistics(ours)
  np.savez(tmp_path / "theirs.npz", mu=statistics.mu, sigma=statistics.sigma)
  reference["eval.reference_statistics"] = str(tmp_path / "theirs.npz")
  found = run(config(folders, **reference), tmp_path / "third")
  assert found == {name: expected[name] for name in ("pixel_fid", "num_generated")}
  found = run(config(folders, **{"metrics.fid_only": True}), tmp_path / "fourth")
  assert found.keys() == {"pixel_fid", "num_generated", "num_reference"}
  np.testing.assert_allclose(found["pixel_fid"], expected["pixel_fid"], rtol=1e-9)


@pytest.mark.parametrize(
  "overrides, message",
  [
    ({"metrics.kid_subset_size": 40}, "kid_subset_size must be from 2 to the 37 generated images, found 40"),
    ({"metrics.neighbours": 37}, "neighbours must be at least 1 and below the 37 generated images"),
    ({"metrics.kid_subsets": 0}, "kid_subsets must be at least 1"),
    ({"metrics.batch_size": 0}, "batch size 0"),
    ({"eval.num_generated": 1}, "at least 2 generated images, found 1"),
    ({"eval.reference_statistics": "/nowhere.npz"}, "/nowhere.npz: no such file"),
    ({"data.name": "digits"}, r"generated images are \[4, 4, 3\] and the reference images \[8, 8, 1\]"),
    ({"metrics.features.name": "inception", "metrics.features.weights": "/nowhere.pth"}, "no such file"),
    ({"report.num_images": 0}, "report.num_images must be at least 1"),
    ({"report.num_neighbours": 0}, "report.num_neighbours must be at least 1"),
  ],
)
def test_bad_input_is_found_before_anything_is_written(folders, tmp_path, overrides, message):
  with pytest.raises(InputError, match=message):
    run(config(folders, **overrides), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_statistics_of_another_network_are_refused():
  section = config_lib.load(RECIPE).metrics
  mu, sigma = np.zeros(3), np.eye(3)
  of_pixels, of_inception, unknown = (
    FeatureStatistics(mu, sigma, None, 500, name) for name in ("pixels", generation_metrics.INCEPTION, "")
  )
  with pytest.raises(InputError, match="of the network 'inception-2015-12-05', the generated of 'pixels'"):
    generation_metrics.generation_metrics(of_pixels, of_inception, section)
  found = generation_metrics.generation_metrics(of_inception, unknown, section)
  assert found.keys() == {"fid", "num_generated", "num_reference"} and abs(found["fid"]) < 1e-12
