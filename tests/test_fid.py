"""FID, KID, precision and recall: reference values, closed forms, moments in parts, and files of statistics."""

import functools
import itertools

import jax
import numpy as np
import pytest
from conftest import shared_dir
from scipy import linalg, spatial

from jax_trustdiff.evaluation import fid
from jax_trustdiff.interop.fid_statistics import FeatureStatistics, load_statistics, save_statistics
from jax_trustdiff.types import InputError

pytestmark = pytest.mark.computes


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(shared_dir("golden", "fid", "metric_only_64d.npz")))


def normal(n, d=8, seed=0, scale=1.0, shift=0.0):
  return np.random.RandomState(seed).randn(n, d) * scale + shift


def covariance(d, seed):
  a = np.random.RandomState(seed).randn(d, d)
  return a @ a.T / d + 0.1 * np.eye(d)


# ---------------------------------------------------------------------------------- reference values


def test_fid_and_kid_of_given_features(golden):
  a, b = (fid.moments(golden[name]) for name in ("features_a", "features_b"))
  value = fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
  np.testing.assert_allclose(value, golden["fid"], rtol=1e-10)
  np.testing.assert_allclose(value, golden["fid_symmetric_eig"], rtol=1e-10)
  np.testing.assert_allclose(np.trace(a.covariance), golden["trace_a"], rtol=1e-12)
  np.testing.assert_allclose(np.trace(b.covariance), golden["trace_b"], rtol=1e-12)
  kid = fid.kernel_distance(golden["features_a"], golden["features_b"], tile=77)
  np.testing.assert_allclose(kid, golden["kid_unbiased"], atol=1e-12)
  # the other side: the covariance divided by n, and the biased estimator, are seen
  wrong = fid.frechet_distance(a.mean, a.scatter / a.count, b.mean, b.scatter / b.count)
  assert abs(wrong / golden["fid"] - 1) > 1e-4
  n = len(golden["features_a"])
  assert fid._kernel_diagonal(golden["features_a"].astype(np.float64)) / n**2 > 1e-3


# ------------------------------------------------------------------------------------- closed forms


@pytest.mark.floor
def test_fid_of_gaussians_whose_covariances_commute():
  """With common axes it is |mu1 - mu2|^2 + sum (std1 - std2)^2, whatever the axes.

  A direction without variance costs half of the digits: a root is taken of a rounding error.
  """
  axes = linalg.qr(normal(6, 6))[0]
  std1, std2 = np.array([3, 2, 1, 0.5, 0.1, 0]), np.array([0, 2, 3, 0.4, 0.1, 1])
  sigma1, sigma2 = (axes * std1**2) @ axes.T, (axes * std2**2) @ axes.T
  mu1, mu2 = normal(2, 6, seed=1)
  expected = np.sum((mu1 - mu2) ** 2) + np.sum((std1 - std2) ** 2)
  np.testing.assert_allclose(fid.frechet_distance(mu1, sigma1, mu2, sigma2), expected, rtol=1e-7)


def test_fid_of_any_gaussians_is_the_formula_with_a_matrix_root_and_is_symmetric():
  sigma1, sigma2 = covariance(20, 0), covariance(20, 1)
  mu1, mu2 = normal(2, 20, seed=2)
  root = linalg.sqrtm(sigma1 @ sigma2).real
  expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)
  value = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
  np.testing.assert_allclose(value, expected, rtol=1e-10)
  np.testing.assert_allclose(fid.frechet_distance(mu2, sigma2, mu1, sigma1), value, rtol=1e-10)
  assert abs(fid.frechet_distance(mu1, sigma1, mu1, sigma1)) < 1e-10


def test_fid_of_fewer_images_than_features():
  """Singular covariances: a set against itself is 0, against itself moved it is the squared distance."""
  few = fid.moments(normal(10, 50))
  assert abs(fid.frechet_distance(few.mean, few.covariance, few.mean, few.covariance)) < 1e-5
  moved = few.mean + 0.5
  value = fid.frechet_distance(few.mean, few.covariance, moved, few.covariance)
  np.testing.assert_allclose(value, 50 * 0.25, rtol=1e-6)


@pytest.mark.parametrize("count", [10, 80], ids=["fewer-than-features", "more"])
def test_fid_from_one_reference_is_the_distance_of_moments(count):
  few = normal(count, 50, seed=3) * np.linspace(0.1, 2, 50) + 0.3
  found, mu, sigma = fid.moments(few), normal(1, 50)[0], covariance(50, 4)
  to_reference = fid.FrechetDistanceTo(mu, sigma)
  expected = fid.frechet_distance(mu, sigma, found.mean, found.covariance)
  np.testing.assert_allclose(to_reference(few), expected, rtol=1e-6)
  with pytest.raises(InputError, match="at least 2 features of 50"):
    to_reference(few[:, :20])


def test_kid_is_its_formula_and_unbiased():
  """Brute force over pairs; over many draws of one distribution the mean is 0, and not for a small shift."""
  x, y = normal(7, 5), normal(9, 5, seed=1)

  def k(a, b):
    return (a @ b / 5 + 1) ** 3

  expected = sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (7 * 6)
  expected += sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (9 * 8)
  expected -= 2 * sum(k(a, b) for a in x for b in y) / (7 * 9)
  np.testing.assert_allclose(fid.kernel_distance(x, y, tile=4), expected, rtol=1e-12)

  def t_statistic(shift):
    values = [
      fid.kernel_distance(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1, shift=shift))
      for i in range(400)
    ]
    return np.mean(values) / (np.std(values) / np.sqrt(len(values)))

  assert abs(t_statistic(0)) < 4
  assert t_statistic(0.2) > 6


def test_kid_of_subsets():
  x, y = normal(40, 4), normal(60, 4, seed=1, shift=0.3)
  key = jax.random.key(0)
  mean, std = fid.kernel_distance_of_subsets(x, y, key, num_subsets=300, size=15)
  assert (mean, std) == fid.kernel_distance_of_subsets(x, y, key, num_subsets=300, size=15)
  assert mean != fid.kernel_distance_of_subsets(x, y, jax.random.key(1), num_subsets=300, size=15)[0]
  # Subsets without replacement leave the estimator unbiased for the two sets as they are.
  assert abs(mean - fid.kernel_distance(x, y)) < 5 * std / np.sqrt(300)
  mean, std = fid.kernel_distance_of_subsets(x, y[:40], key, num_subsets=3, size=40)
  np.testing.assert_allclose(mean, fid.kernel_distance(x, y[:40]), rtol=1e-10)
  assert std < 1e-12


def brute_force_precision_recall(real, generated, k):
  def covered(points, centres):
    radii = np.sort(spatial.distance.cdist(centres, centres), 1)[:, k]  # column 0 is the point itself
    return (spatial.distance.cdist(points, centres) <= radii).any(1).mean()

  return covered(generated, real), covered(real, generated)


@pytest.mark.floor
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k):
  real = normal(83, 3, shift=5).astype(np.float32)
  generated = np.concatenate([normal(40, 3, seed=1, shift=5), normal(30, 3, seed=2, shift=8)])
  generated = generated.astype(np.float32)
  expected = brute_force_precision_recall(real, generated, k)
  assert 0.2 < expected[0] < 0.9 and 0.2 < expected[1] < 0.95
  for tile in (1000, 16):
    np.testing.assert_allclose(fid.precision_recall(real, generated, k, tile), expected, atol=1e-6)


def test_precision_and_recall_tell_quality_from_variety():
  real = np.concatenate([normal(60, 3), normal(60, 3, seed=1, shift=50)])
  one_mode, with_rubbish = real[:60] + 1e-3, np.concatenate([real, normal(120, 3, seed=2, shift=-90)])
  assert fid.precision_recall(real, one_mode) == (1.0, 0.5)
  assert fid.precision_recall(real, with_rubbish) == (0.5, 1.0)
  assert fid.precision_recall(real, real) == (1.0, 1.0)


def test_nearest_by_brute_force():
  features, queries = (normal(n, 6, seed=n, shift=3).astype(np.float32) for n in (50, 9))
  expected = np.argsort(spatial.distance.cdist(queries, features), 1)[:, :4]
  np.testing.assert_array_equal(fid.nearest(features, queries, 4, tile=4), expected)
  with pytest.raises(InputError, match="k must be from 1 to the number of features, 50; found 51"):
    fid.nearest(features, queries, 51)


# ---------------------------------------------------------------------------------- moments in parts


@pytest.mark.floor
def test_moments_add_up_in_any_grouping(monkeypatch):
  x = normal(100, 8, shift=1e4).astype(np.float32)  # far from 0: sums of squares would lose the digits
  expected_mean, expected = x.astype(np.float64).mean(0), np.cov(x.astype(np.float64).T)
  parts = [fid.moments(x[i:j]) for i, j in itertools.pairwise([0, 1, 14, 50, 51, 100])]
  forward, backward = functools.reduce(fid.merge, parts), functools.reduce(fid.merge, parts[::-1])
  pairs = fid.merge(
    fid.merge(parts[3], parts[0]), functools.reduce(fid.merge, [parts[4], parts[2], parts[1]])
  )
  monkeypatch.setattr(fid, "CHUNK", 7)
  for found in (forward, backward, pairs, fid.moments(x)):
    assert found.count == 100 and found.scatter.dtype == np.float64
    np.testing.assert_allclose(found.mean, expected_mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-9)
  in_float32 = (x.T @ x - len(x) * np.outer(x.mean(0), x.mean(0))) / (len(x) - 1)
  assert abs(in_float32 - expected).max() > 1e-2


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: fid.moments(normal(1)).covariance, "at least 2 images, found 1"),
    (lambda: fid.moments(np.zeros((0, 3))), "at least one feature"),
    (lambda: fid.moments(np.array([[0.0, np.nan]])), "finite"),
    (lambda: fid.merge(fid.moments(normal(3, 4)), fid.moments(normal(3, 5))), "of 4 and of 5 features"),
    (lambda: fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), r"\(2,\), \(3,\)"),
    (lambda: fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.inf)), "finite"),
    (lambda: fid.kernel_distance(normal(5, 3), normal(1, 3)), "at least 2 features"),
    (lambda: fid.kernel_distance(normal(5, 3), normal(5, 4)), "of one length"),
    (
      lambda: fid.kernel_distance_of_subsets(normal(5), normal(9), jax.random.key(0), 2, 6),
      "subsets of 6 features cannot be drawn from sets of 5 and 9",
    ),
    (lambda: fid.precision_recall(normal(3), normal(9)), "3 neighbours need k >= 1 and sets of more than k"),
    (lambda: fid.precision_recall(normal(9, 3), normal(9, 4)), "of one length"),
  ],
)
def test_errors_say_what_was_found(call, message):
  with pytest.raises(InputError, match=message) as error:
    call()
  assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- files of statistics


def test_statistics_in_the_form_of_edm(tmp_path):
  """Files of others hold mu and sigma alone, and others read ours."""
  mu, sigma = normal(1, 5)[0], covariance(5, 0)
  np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
  found = load_statistics(tmp_path / "theirs.npz")
  np.testing.assert_array_equal(found.mu, mu)
  np.testing.assert_array_equal(found.sigma, sigma)
  assert found.features is None and found.num_images is None and found.network == ""
  save_statistics(tmp_path / "ours.npz", found)
  with np.load(tmp_path / "ours.npz") as file:
    assert {name: file[name].dtype.kind for name in ("mu", "sigma")} == {"mu": "f", "sigma": "f"}
    np.testing.assert_array_equal(file["mu"], mu)
    np.testing.assert_array_equal(file["sigma"], sigma)


def test_statistics_with_features_round_trip(tmp_path):
  features = normal(9, 4).astype(np.float32)
  m = fid.moments(features)
  save_statistics(tmp_path / "s.npz", FeatureStatistics(m.mean, m.covariance, features, 9, "pixels"))
  found = load_statistics(tmp_path / "s.npz")
  np.testing.assert_array_equal(found.features, features)
  np.testing.assert_array_equal(found.sigma, m.covariance)
  assert found.num_images == 9 and found.network == "pixels" and found.features.dtype == np.float32
  assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def statistics_file(path, **arrays):
  np.savez(path, **({"mu": np.zeros(3), "sigma": np.eye(3)} | arrays))


class Runs:
  """Leaves a trace if a pickle of it is read as a pickle."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), "w")


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"sigma": np.eye(4)}, r"mu \[d\] and sigma \[d d\]"),
    ({"mu": np.array([0, np.nan, 0])}, "not finite"),
    ({"sigma": np.triu(np.ones((3, 3)))}, "no covariance"),
    ({"sigma": -np.eye(3)}, "no covariance"),
    ({"mu": np.array(["a", "b", "c"])}, "real numbers"),
    ({"features": np.zeros((5, 2))}, r"expected features \[n 3\]"),
    ({"features": np.full((5, 3), np.inf)}, "not finite"),
    ({"features": np.zeros((5, 3)), "num_images": np.array(4)}, "num_images is 4, and there are 5"),
    ({"num_images": np.array(1)}, "num_images must be a number from 2 on"),
    ({"network": np.array(3)}, "network must be a name"),
  ],
)
def test_statistics_that_are_none_are_refused(tmp_path, arrays, message):
  statistics_file(tmp_path / "s.npz", **arrays)
  with pytest.raises(InputError, match=message) as error:
    load_statistics(tmp_path / "s.npz")
  assert str(error.value).startswith(str(tmp_path / "s.npz")) and "\n" not in str(error.value)


def test_damaged_and_foreign_statistics_are_refused(tmp_path):
  file = tmp_path / "s.npz"
  with pytest.raises(InputError, match="no such file"):
    load_statistics(file)
  np.savez(file, mu=np.zeros(3))
  with pytest.raises(InputError, match="there is no sigma"):
    load_statistics(file)
  statistics_file(file)
  whole = file.read_bytes()
  for data in (whole[: len(whole) // 2], b"not a zip", whole.replace(b"NUMPY", b"NUMBY"), b""):
    file.write_bytes(data)
    with pytest.raises(InputError, match="not an .npz file of arrays, or truncated"):
      load_statistics(file)
  np.savez(file, mu=np.array([Runs(tmp_path / "trace")], dtype=object), sigma=np.eye(1))
  (tmp_path / "trace").unlink(missing_ok=True)
  with pytest.raises(InputError, match="not an .npz file of arrays"):
    load_statistics(file)
  assert not (tmp_path / "trace").exists()
  with pytest.raises(InputError, match=r"must end in \.npz"):
    save_statistics(tmp_path / "s.npy", FeatureStatistics(np.zeros(3), np.eye(3)))
  with pytest.raises(InputError, match="no covariance"):
    save_statistics(file, FeatureStatistics(np.zeros(3), -np.eye(3)))
