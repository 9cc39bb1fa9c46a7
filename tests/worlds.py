"""A world with known answers: images from a mixture of isotropic Gaussians, whose denoiser is known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jax_trustdiff.cdm import shards as cdm_shards
from jax_trustdiff.diffusion import solvers
from jax_trustdiff.pytrees import register_pytree


@register_pytree
@dataclasses.dataclass(frozen=True)
class GaussianMixture:
  """Equal weights, component k with mean[k] (flattened in any one order) and variance[k]; a `DenoiseFn`."""

  mean: jax.Array  # [k d]
  variance: jax.Array  # [k]

  def log_parts(self, x, sigma):
    """log of the density of each component at noise level sigma, up to a constant: [b k]."""
    flat = x.reshape(x.shape[0], -1)
    total = self.variance[None] + jnp.square(sigma)[:, None]
    distance = jnp.square(flat[:, None] - self.mean[None]).sum(-1)
    return -distance / (2 * total) - flat.shape[1] / 2 * jnp.log(total)

  def log_density(self, x, sigma):
    """log p(x; sigma), [b]."""
    constant = jnp.log(len(self.variance)) + x[0].size / 2 * jnp.log(2 * jnp.pi)
    return jax.scipy.special.logsumexp(self.log_parts(x, sigma), axis=1) - constant

  def __call__(self, x, sigma):
    weight = jax.nn.softmax(self.log_parts(x, sigma), axis=1)
    flat, noise = x.reshape(x.shape[0], 1, -1), jnp.square(sigma)[:, None, None]
    parts = (self.variance[:, None] * flat + noise * self.mean) / (self.variance[:, None] + noise)
    return jnp.einsum("bk,bkd->bd", weight, parts).reshape(x.shape)

  def with_variables(self, own):
    """The mixture with these means and variances: what `cdm.shards` puts in for a shard."""
    return GaussianMixture(**own)

  def sample(self, key, shape):
    """Clean images [b ...]."""
    choice, noise = jax.random.split(key)
    k = jax.random.randint(choice, shape[:1], 0, len(self.variance))
    flat = jax.random.normal(noise, (shape[0], self.mean.shape[1]))
    return (self.mean[k] + jnp.sqrt(self.variance[k])[:, None] * flat).reshape(shape)

  def score(self, x, sigma):
    """Gradient of log p(x; sigma) by x: Tweedie's formula."""
    return (self(x, sigma) - x) / jnp.square(sigma)[:, None, None, None]


def far_apart():
  """Three components of different width in 4 dimensions, whose samples are told apart: see `fit`."""
  mean = jnp.array([[-3.0, 0.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, -3.0, 0.0, 2.0]])
  return GaussianMixture(mean, jnp.array([0.09, 0.04, 0.16]))


def high_dimensional():
  """Three components in 768 dimensions, where the norms of noise and score are nearly those expected."""
  mean = jnp.zeros((3, 768)).at[jnp.arange(3), jnp.arange(3)].set(3.0)
  return GaussianMixture(mean, jnp.array([0.09, 0.04, 0.16]))


def shards(apart=3.0, dtype=jnp.float32):
  """Three shards of five components each in 4 dimensions, around -apart, 0 and apart, with proportions 0.5, 0.3 and 0.2."""
  rng = np.random.RandomState(0)
  own = [
    {
      "mean": jnp.asarray(shift + rng.normal(0, 0.7, (5, 4)), dtype),
      "variance": jnp.asarray(rng.uniform(0.05, 0.4, 5) ** 2, dtype),
    }
    for shift in (-apart, 0.0, apart)
  ]
  return cdm_shards.stack(GaussianMixture(**own[0]), own, [0.5, 0.3, 0.2])


@register_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class LogDensities:
  """log p^i(x; sigma) of every slot of a stack, [s b]; one after the other, so that a slot's bits do not depend on how many there are."""

  shards: cdm_shards.Shards

  def __call__(self, x, sigma):
    return jax.lax.map(lambda own: GaussianMixture(**own).log_density(x, sigma), self.shards.own)


def log_density_of_all(stacked, x, sigma):
  """log sum_i lambda_i p^i(x; sigma), [b]."""
  parts = stacked.log_prior[:, None] + LogDensities(stacked)(x, sigma)
  return jax.nn.logsumexp(parts, 0)


def samples_of_shards(stacked, key, count):
  """(clean images [n 2 2 1], the shard of each [n])."""
  choice, key = jax.random.split(key)
  origin = jax.random.categorical(choice, stacked.log_prior, shape=(count,))
  drawn = [
    stacked.member(i).sample(jax.random.fold_in(key, i), (count, 2, 2, 1)) for i in range(stacked.capacity)
  ]
  return jnp.stack(drawn)[origin, jnp.arange(count)], origin


def small(n=8, seed=0, shape=(2, 2, 1)):
  """(keys, noise) of images of a few pixels."""
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))
  return keys, solvers.initial_noise(keys, shape)


def fit(world, images):
  """p-values that `images` are of the world, whose components are far apart: by their numbers, and by their radii.

  Chi-square tests; the squared distance to the nearest mean over its variance has a chi-square distribution.
  """
  x, mean, variance = (
    np.asarray(value).reshape(len(value), -1) for value in (images, world.mean, world.variance)
  )
  distance = ((x[:, None] - mean) ** 2).sum(-1)
  nearest = distance.argmin(1)
  counts = np.bincount(nearest, minlength=len(mean))
  radius = distance[np.arange(len(x)), nearest] / variance[nearest, 0]
  edges = scipy.stats.chi2(mean.shape[1]).ppf(np.linspace(0, 1, 11))
  shells = np.histogram(radius, edges)[0]
  return scipy.stats.chisquare(counts).pvalue, scipy.stats.chisquare(shells).pvalue
