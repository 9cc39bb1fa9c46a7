"""Distances between sets of images by their features: FID, KID, precision and recall, with moments that add up.

Values compare only between sets of the same size, features of the same network and images resized by the same rule
(`models.inception`): FID falls with the number of images.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jax_trustdiff.pytrees import register_pytree
from jax_trustdiff.types import InputError

CHUNK = 4096  # features of one matrix product of `moments`: adding up a d x d matrix for fewer takes longer


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class PixelFeatures:
  """Images uint8 [b h w c] -> features [b h*w*c] in float32: the pixels in [0, 1], without any network.

  For small images such as 8x8 digits, where a network trained on photographs says little, and for tests. What is
  computed of them compares with nothing published.
  """

  def __call__(self, images: Shaped[Array, "b h w c"]) -> Float[Array, "b d"]:
    if images.dtype != jnp.uint8:
      raise InputError(f"features are taken of uint8 images [b h w c], found {images.dtype} {images.shape}")
    return images.reshape(len(images), -1).astype(jnp.float32) / 255


@dataclasses.dataclass(frozen=True)
class Moments:
  """Number, mean and scatter of a set of features, in float64 on the host: what FID needs of a set.

  The scatter is taken about the mean, so that it keeps its digits for features far from 0. Features come to the host
  (8 KiB an image for 2048) because devices sum in float32, which does not.
  """

  count: int
  mean: np.ndarray  # [d]
  scatter: np.ndarray  # [d d]: sum of (f - mean) (f - mean)^T

  @property
  def covariance(self) -> np.ndarray:
    """[d d], divided by count - 1; InputError for fewer than 2 features."""
    if self.count < 2:
      raise InputError(f"a covariance needs at least 2 images, found {self.count}")
    return self.scatter / (self.count - 1)


def moments(features: Float[Array | np.ndarray, "n d"]) -> Moments:
  """The moments of `features`, n >= 1, for a stream part by part with `merge`. InputError if one is not finite."""
  if len(features) < 1:
    raise InputError("moments need at least one feature")
  parts = (_moments(features[i : i + CHUNK]) for i in range(0, len(features), CHUNK))
  return functools.reduce(merge, parts)


def merge(a: Moments, b: Moments) -> Moments:
  """The moments of the union of two sets (Chan, Golub and LeVeque 1983), in any order and grouping but for rounding.

  mean = mean_a + n_b / n (mean_b - mean_a)
  scatter = scatter_a + scatter_b + n_a n_b / n (mean_b - mean_a) (mean_b - mean_a)^T,   n = n_a + n_b
  """
  if a.mean.shape != b.mean.shape:
    raise InputError(f"moments of {a.mean.size} and of {b.mean.size} features do not add up")
  count = a.count + b.count
  shift = b.mean - a.mean
  scatter = np.multiply.outer(a.count * b.count / count * shift, shift)
  scatter += a.scatter
  scatter += b.scatter
  return Moments(count, a.mean + b.count / count * shift, scatter)


def frechet_distance(
  mu1: Float[np.ndarray, "d"],
  sigma1: Float[np.ndarray, "d d"],
  mu2: Float[np.ndarray, "e"],
  sigma2: Float[np.ndarray, "e e"],
) -> float:
  """The squared Frechet distance between two Gaussians, the FID of their sets of features (Heusel et al. 2017, eq. 6):

      |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))

  The trace of the root is the sum of the roots of the eigenvalues of sigma1^(1/2) sigma2 sigma1^(1/2), which is
  symmetric: covariances of fewer images than features are no trouble. In float64; exact matches give 0 but for
  rounding, which may be below 0. InputError for shapes that do not fit or values that are not finite.
  """
  mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
  _check_moments(mu1, sigma1, mu2, sigma2)
  root = _root(sigma1)
  values = np.linalg.eigvalsh(root @ sigma2 @ root)
  return _frechet(mu1 - mu2, np.trace(sigma1) + np.trace(sigma2), values)


class FrechetDistanceTo:
  """`frechet_distance` from one Gaussian, whose root is taken once, to any number of sets of features.

  For fewer features than dimensions the eigenvalues are taken from their Gram matrix [n n] in the metric of sigma: a bootstrap
  of hundreds takes seconds.
  """

  def __init__(self, mu: Float[np.ndarray, "d"], sigma: Float[np.ndarray, "d d"]):
    self.mu, self.sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    _check_moments(self.mu, self.sigma, self.mu, self.sigma)
    self._root = _root(self.sigma)

  def __call__(self, features: Float[Array | np.ndarray, "n d"]) -> float:
    """The distance to the Gaussian with mean and covariance (by n - 1) of the features. InputError for fewer than 2."""
    return self.of_rows(features)(np.arange(len(features)))

  def of_rows(
    self, features: Float[Array | np.ndarray, "n d"]
  ) -> Callable[[Int[np.ndarray, "m"]], float]:
    """Of any m rows of these features, as often as they are drawn; what all such sets have in common is computed once."""
    features = np.asarray(features, np.float64)
    if len(features) < 2 or features.shape[1] != self.mu.size:
      raise InputError(f"at least 2 features of {self.mu.size} values are needed, found {features.shape}")
    turned = features @ self._root

    def distance(rows):
      if len(rows) < 2:
        raise InputError(f"at least 2 features are needed, found {len(rows)}")
      mean = features[rows].mean(0)
      x, y = ((of[rows] - of[rows].mean(0)) / np.sqrt(len(rows) - 1) for of in (features, turned))
      gram = y @ y.T if len(rows) < self.mu.size else y.T @ y
      return _frechet(self.mu - mean, np.trace(self.sigma) + (x**2).sum(), np.linalg.eigvalsh(gram))

    return distance


def _check_moments(mu1, sigma1, mu2, sigma2) -> None:
  d = mu1.size
  shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
  if shapes != [(d,), (d, d)] * 2:
    raise InputError(f"means [d] and covariances [d d] of one d are needed, found {shapes[0]}, {shapes[2]}")
  if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
    raise InputError("means and covariances must be finite")


def _root(sigma: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(sigma)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _frechet(shift: np.ndarray, traces: float, values: np.ndarray) -> float:
  return float(shift @ shift + traces - 2 * np.sqrt(np.maximum(values, 0)).sum())


def kernel_distance(
  x: Float[Array | np.ndarray, "n d"], y: Float[Array | np.ndarray, "m e"], tile: int = 2048
) -> float:
  """KID of two sets of features: the unbiased squared MMD (Binkowski et al. 2018) with the kernel (x.y / d + 1)^3.

      sum_{i != j} k(x_i, x_j) / n(n - 1) + sum_{i != j} k(y_i, y_j) / m(m - 1) - 2 sum_{ij} k(x_i, y_j) / nm

  Its mean is 0 for sets drawn from one distribution, so single values fall below 0. In float64 on the host, `tile` rows
  at a time; for large sets see `kernel_distance_of_subsets`. InputError for fewer than 2 features in a set.
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  n, m = len(x), len(y)
  if min(n, m) < 2 or x.shape[1] != y.shape[1]:
    raise InputError(f"KID needs two sets of at least 2 features of one length, found {x.shape}, {y.shape}")
  within = (_kernel_sum(x, x, tile) - _kernel_diagonal(x)) / (n * (n - 1))
  within += (_kernel_sum(y, y, tile) - _kernel_diagonal(y)) / (m * (m - 1))
  return float(within - 2 * _kernel_sum(x, y, tile) / (n * m))


def kernel_distance_of_subsets(
  x: Float[Array | np.ndarray, "n d"],
  y: Float[Array | np.ndarray, "m e"],
  key: Key[Array, ""],
  num_subsets: int = 100,
  size: int = 1000,
) -> tuple[float, float]:
  """(mean, standard deviation) of KID over pairs of random subsets of `size` features, as it is usually reported.

  Each subset is drawn without replacement. InputError if a set has fewer than `size` features.
  """
  x, y = np.asarray(x), np.asarray(y)
  if min(len(x), len(y)) < size:
    raise InputError(f"subsets of {size} features cannot be drawn from sets of {len(x)} and {len(y)}")
  draw = np.random.default_rng(np.asarray(jax.random.key_data(key), np.uint32))
  values = [
    kernel_distance(draw.choice(x, size, replace=False), draw.choice(y, size, replace=False))
    for _ in range(num_subsets)
  ]
  return float(np.mean(values)), float(np.std(values))


def precision_recall(
  real: Float[Array | np.ndarray, "n d"],
  generated: Float[Array | np.ndarray, "m e"],
  k: int = 3,
  tile: int = 1024,
) -> tuple[float, float]:
  """(precision, recall) in [0, 1] by manifolds of nearest neighbours (Kynkaanniemi et al. 2019, eqs. 1-3).

  A set's manifold is the union of balls around its features, each as large as the distance to the k-th nearest other
  feature of the set. Precision: the fraction of generated features in the manifold of the real ones; recall: the
  fraction of real features in the manifold of the generated ones. Distances are computed on the device, `tile` rows
  at a time, in the features' type, about the mean of the real features. InputError for sets of k features or fewer,
  or features of different lengths.
  """
  if min(len(real), len(generated)) <= k or k < 1:
    raise InputError(
      f"{k} neighbours need k >= 1 and sets of more than k; found {len(real)}, {len(generated)}"
    )
  real, generated = _about_mean_of_first(real, generated)
  precision = _in_manifold(generated, real, _radii(real, k, tile), tile).mean()
  recall = _in_manifold(real, generated, _radii(generated, k, tile), tile).mean()
  return float(precision), float(recall)


def nearest(
  features: Float[Array | np.ndarray, "n d"],
  queries: Float[Array | np.ndarray, "m e"],
  k: int = 1,
  tile: int = 1024,
) -> Int[np.ndarray, "m k"]:
  """Of each query the positions of the k nearest `features`, the nearest first. InputError for fewer than k."""
  if not 1 <= k <= len(features):
    raise InputError(f"k must be from 1 to the number of features, {len(features)}; found {k}")
  features, queries = _about_mean_of_first(features, queries)

  def of_row(row: jax.Array) -> jax.Array:
    return lax.top_k(-_squared_distances(row, features), k)[1]

  return np.asarray(lax.map(of_row, queries, batch_size=tile))


def _about_mean_of_first(
  a: Float[Array | np.ndarray, "n d"], b: Float[Array | np.ndarray, "m e"]
) -> tuple[jax.Array, jax.Array]:
  """Both sets of features less the mean of the first: squared distances then cancel less."""
  if a.shape[1] != b.shape[1]:
    raise InputError(f"features of one length are needed, found {a.shape} and {b.shape}")
  a, b = jnp.asarray(a), jnp.asarray(b)
  centre = a.mean(0)
  return a - centre, b - centre


def _moments(features: Float[Array | np.ndarray, "n d"]) -> Moments:
  features = np.asarray(features, np.float64)
  if not np.isfinite(features).all():
    raise InputError(f"moments need finite features; of {features.shape} some are not")
  mean = features.mean(0)
  centred = features - mean
  return Moments(len(features), mean, centred.T @ centred)


def _kernel_sum(x: np.ndarray, y: np.ndarray, tile: int) -> float:
  d = x.shape[1]
  return sum(_cube(x[i : i + tile] @ y.T / d + 1).sum() for i in range(0, len(x), tile))


def _kernel_diagonal(x: np.ndarray) -> float:
  return _cube(np.square(x).sum(1) / x.shape[1] + 1).sum()


def _cube(x: np.ndarray) -> np.ndarray:
  return x * x * x  # `x**3` takes the general power, tens of times slower


def _radii(x: jax.Array, k: int, tile: int) -> jax.Array:
  """[n]: the squared distance from each row of `x` to its k-th nearest other row."""
  columns = jnp.arange(len(x))

  def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
    index, value = row
    distances = jnp.where(columns == index, jnp.inf, _squared_distances(value, x))
    return -lax.top_k(-distances, k)[0][-1]

  return lax.map(of_row, (columns, x), batch_size=tile)


def _in_manifold(x: jax.Array, centres: jax.Array, radii: jax.Array, tile: int) -> Bool[Array, "n"]:
  return lax.map(lambda row: (_squared_distances(row, centres) <= radii).any(), x, batch_size=tile)


def _squared_distances(row: jax.Array, x: jax.Array) -> jax.Array:
  product = jnp.dot(x, row, precision=lax.Precision.HIGHEST)
  return jnp.square(x).sum(1) + jnp.square(row).sum() - 2 * product
